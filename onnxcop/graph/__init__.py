"""The ONNX model as data: reading and writing files, subgraphs, shapes, constants.

It may import `_base` and the packages below it. Start at `io`, then `subgraphs` and `shapes`.
"""
