"""`python -m onnxcop`: the same as the console script."""

from __future__ import annotations

from onnxcop.cli.main import main

if __name__ == "__main__":
    main()
