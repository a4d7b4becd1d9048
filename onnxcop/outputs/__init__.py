"""Kinds of model outputs (class scores, vectors, boxes …), and the divergence between outputs of two networks.

It may import `calibration` and the packages below it.
Start at `kinds`: every kind of output is one entry of :data:`onnxcop.outputs.kinds.KINDS`.
"""
