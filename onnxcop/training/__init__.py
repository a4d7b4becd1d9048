"""Training without a framework: self-distillation, fine-tuning on labels, and the parts of a training loop.

The backward graph is written as ONNX nodes (:mod:`onnxcop.gradient`) and run by ONNX Runtime.
It may import `allocation` and the packages below it. Start at `distill`, then `loop`.
"""
