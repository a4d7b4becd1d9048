"""Helpers for every package: files, types, options, plug-ins, progress, timing and formatting.

It may import nothing of onnxcop but `onnxcop.errors`.
Start at `files`, which writes several files together or none.
"""
