"""Everything that runs models: ONNX Runtime sessions, providers, latency, and execution in pieces.

It may import `images` and the packages below it. Start at `session`, then `segments`.
"""
