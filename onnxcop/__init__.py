"""Structural pruning of ONNX models: fewer filters, smaller tensors, the same inputs and outputs.

    import onnxcop
    result = onnxcop.prune("model.onnx", macs=0.7)
    result.save("small.onnx")

The stages one by one: :func:`analyze` → :func:`statistics` → a :class:`Criterion`'s ranking →
:func:`choose` → :func:`recover` → :func:`apply` → :func:`verify`.
"""

import lazy_loader

# Names and their homes are in `__init__.pyi`. They are loaded on first use, so that `onnxcop --help` stays quick.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
