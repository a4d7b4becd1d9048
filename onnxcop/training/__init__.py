"""Training without a framework: self-distillation, fine-tuning on labels, and the parts of a training loop.

The backward graph is written as ONNX nodes (:mod:`onnxcop.gradient`) and run by ONNX Runtime.
It may import `allocation` and the packages below it. Start at `distill`, then `loop`.

The names here are the pieces for a training loop of one's own: a model with a loss (:func:`objective`) becomes one
graph that makes a step (:func:`build_step`), a :class:`Trainer` runs it, and :func:`with_weights` puts the result in a
model.
"""

import lazy_loader

# Names and their homes are in `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
