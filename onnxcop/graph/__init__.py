"""The ONNX model as data: reading and writing files, subgraphs, shapes, constants.

It may import `_base`. Start at `io`, then `subgraphs` and `shapes`.
"""
