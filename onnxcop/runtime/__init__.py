"""What runs a model: ONNX Runtime sessions, providers, latency, and running a graph in pieces.

It may import `images` and the packages below it. Start at `session`, then `segments`.
"""
