#!/usr/bin/env python3
"""Makes the exports in tests/exports, each framework in an environment of its own.

    python tools/make_exports.py --environments FOLDER            # all of them
    python tools/make_exports.py --environments FOLDER jax paddle # these

FOLDER gets one virtual environment per framework, about 4 GB together; one that is there already is
used again, and `--discard` deletes each when its exports are made. Python 3.11 and PyPI are needed.
Weights are seeded, so that the same versions make the same networks. Made anew from empty environments of
Python 3.11 with the versions below, all exports are those of tests/exports to the byte, but for the two of
tf2onnx, which numbers some tensors otherwise from run to run.

The torch package of PyPI brings CUDA libraries of several GB; PyTorch's own index of CPU builds,
given through PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS, spares them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
EXPORTS = TOOLS.parent / "tests" / "exports"


@dataclass(frozen=True, slots=True)
class Framework:
    """Requirements of one export program.

    Attributes:
        program: Its file in tools/exports; it writes models to the folder that it is given.
        steps: Requirements, one `pip install` after another.
    """

    program: str
    steps: tuple[tuple[str, ...], ...]


FRAMEWORKS = {
    "torch": Framework(
        "from_torch.py", (("torch==2.13.0",), ("numpy==2.4.6", "onnx==1.23.2", "onnxscript==0.7.2", "onnx-ir==1.1.0"))
    ),
    "keras": Framework(
        "from_keras.py",
        (("tensorflow-cpu==2.20.0", "keras==3.15.1", "tf2onnx==1.17.0", "numpy==2.4.6", "onnx==1.23.2"),),
    ),
    "paddle": Framework(
        "from_paddle.py",
        (("paddlepaddle==3.3.1", "paddle2onnx==2.1.0", "numpy==2.4.6", "onnx==1.17.0", "packaging"),),
    ),
    "jax": Framework(
        "from_jax.py",
        (("jax==0.10.2", "jaxlib==0.10.2", "flax==0.12.8", "jax2onnx==0.17.1", "numpy==2.4.6", "onnx==1.23.2"),),
    ),
    "sklearn": Framework(
        "from_sklearn.py", (("scikit-learn==1.9.1", "skl2onnx==1.20.0", "numpy==2.4.6", "onnx==1.23.2"),)
    ),
}


def main() -> int:
    """Parse the command line and run; returns how many frameworks failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("frameworks", nargs="*", metavar="FRAMEWORK", help=f"{', '.join(FRAMEWORKS)} (default: all)")
    parser.add_argument("--environments", type=Path, required=True, help="folder of the virtual environments")
    parser.add_argument("--out", type=Path, default=EXPORTS, help="where the exports go (default: tests/exports)")
    parser.add_argument("--discard", action="store_true", help="delete each environment after use")
    options = parser.parse_args()
    if unknown := set(options.frameworks) - set(FRAMEWORKS):
        parser.error(f"no such framework: {', '.join(sorted(unknown))}")
    failed = 0
    for name in options.frameworks or FRAMEWORKS:
        environment = options.environments.resolve() / name
        try:
            made = make(FRAMEWORKS[name], environment, options.out)
            print("\n".join(f"{name}: {path.name}, {path.stat().st_size / 1000:.1f} kB" for path in made), flush=True)
        except subprocess.CalledProcessError as error:
            failed += 1
            print(f"{name}: `{' '.join(map(str, error.cmd))}` failed", file=sys.stderr, flush=True)
        if options.discard:
            shutil.rmtree(environment, ignore_errors=True)
    return failed


def make(framework: Framework, environment: Path, out: Path) -> list[Path]:
    """Run a framework's program in its environment, which is made first where it is missing.

    Args:
        framework: The program and its requirements.
        environment: Folder of the virtual environment.
        out: Folder that gets the exports.

    Returns:
        The exports.

    Raises:
        subprocess.CalledProcessError: The installation or the program failed; `out` is as it was.
    """
    python = environment / "bin" / "python"
    if not (environment / "complete").exists():
        venv.create(environment, clear=True, with_pip=True)
        for requirements in framework.steps:
            run([str(python), "-m", "pip", "install", "--quiet", *requirements])
        (environment / "complete").touch()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        run([str(python), str(TOOLS / "exports" / framework.program), scratch])
        return [Path(shutil.copy(path, out)) for path in sorted(Path(scratch).glob("*.onnx"))]


def run(command: Sequence[str]) -> None:
    """Run a command; what it prints is only for errors and goes to standard error."""
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | os.environ
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)


if __name__ == "__main__":
    sys.exit(main())
