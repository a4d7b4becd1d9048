"""Passes for other toolchains: Olive and onnx_ir.

They may import `pipeline` and the packages below it; nothing imports them. Start at `onnx_ir`.
"""
