"""What runs a model: ONNX Runtime sessions, providers, latency, and running a graph in pieces.

It may import `graph` and `_base`. Start at `session`, then `segments`.
"""
