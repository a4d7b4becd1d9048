"""Other toolchains: passes for Olive and onnx_ir, state dicts of PyTorch, folders and vocabularies of Hugging Face.

They may import `pipeline` and the packages below it; only the command line imports them. Start at `onnx_ir`.
"""
