"""What a model's outputs are (class scores, vectors, boxes …), and how far those of two networks are apart.

It may import `calibration` and the packages below it.
Start at `kinds`: every kind of output is one entry of :data:`onnxcop.outputs.kinds.KINDS`.
"""
