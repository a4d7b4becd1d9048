"""Training without a framework: self-distillation, and the pieces of a loop of one's own.

The backward graph is written as ONNX nodes (:mod:`onnxcop.gradient`) and run by ONNX Runtime.
It may import `allocation` and the packages below it. Start at `distill`, then `loop`.
"""
