"""Ground floor: errors' helpers, types, files, timing, progress and formatting.

It may import nothing of onnxcop but `onnxcop.errors`. Start at `files`, which writes several files together or none.
"""
