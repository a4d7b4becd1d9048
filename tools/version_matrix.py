#!/usr/bin/env python3
"""Runs tests with the oldest and the newest allowed versions of ONNX, ONNX Runtime and NumPy, and tabulates the result.

    python tools/version_matrix.py --environments FOLDER --out docs/versions.md
    python tools/version_matrix.py --environments FOLDER oldest newest -- tests/graph tests/rewrite

Every combination gets a virtual environment in FOLDER, about 500 MB each, which is used again. The oldest versions are
the lower bounds in pyproject.toml; the newest are what pip finds. ONNX Runtime is its CPU package. The table in FILE is
written between two comments, `<!-- matrix:begin -->` and `<!-- matrix:end -->`.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from pages import write_table

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("onnx", "onnxruntime", "numpy")
COMBINATIONS: dict[str, tuple[str, ...]] = {  # which packages are at their oldest
    "oldest": PACKAGES,
    "oldest onnx": ("onnx",),
    "oldest onnxruntime": ("onnxruntime",),
    "oldest numpy": ("numpy",),
    "newest": (),
}
TESTS = (
    "tests/graph", "tests/rewrite", "tests/coupling/ops", "tests/calibration", "tests/runtime/test_engine.py",
    "tests/verification/test_compare.py", "tests/pipeline/test_quantize.py", "tests/cli/test_cli.py",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the table.

    Attributes:
        name: Of the combination.
        versions: Of :data:`PACKAGES`.
        result: The last line of pytest, or of what went wrong before.
        passed: Whether all tests passed or skipped.
    """

    name: str
    versions: tuple[str, ...]
    result: str
    passed: bool


def main() -> int:
    """Parse the command line and run; returns how many combinations failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="COMBINATION", help=f"{', '.join(COMBINATIONS)} (default: all)")
    parser.add_argument("--environments", type=Path, required=True, help="folder of the virtual environments")
    parser.add_argument("--out", type=Path, help="page whose table is written anew")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what pytest runs")
    options = parser.parse_args()
    if unknown := set(options.names) - set(COMBINATIONS):
        parser.error(f"no such combination: {', '.join(sorted(unknown))}")
    outcomes = []
    for name in options.names or COMBINATIONS:
        outcomes.append(tried(name, options.environments.resolve() / name.replace(" ", "-"), options.tests))
        print(row(outcomes[-1]), flush=True)
    if options.out is not None:
        write(options.out, outcomes)
    return sum(not outcome.passed for outcome in outcomes)


def tried(name: str, environment: Path, tests: Sequence[str]) -> Outcome:
    """Make the environment of a combination where it is missing, and run the tests in it."""
    python = environment / "bin" / "python"
    try:
        if not (environment / "complete").exists():
            venv.create(environment, clear=True, with_pip=True)
            run([str(python), "-m", "pip", "install", "--quiet", *requirements(COMBINATIONS[name])])
            (environment / "complete").touch()
        ask = f"from importlib.metadata import version; print(*map(version, {PACKAGES!r}))"
        versions = tuple(run([str(python), "-c", ask]).split())
    except subprocess.CalledProcessError as error:
        return Outcome(name, ("?",) * len(PACKAGES), (error.stdout or "").strip().splitlines()[-1], False)
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=ROOT, capture_output=True, text=True,
        check=False, env={"PYTHONPATH": str(ROOT), "PATH": str(python.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))), file=sys.stderr)
    last = re.sub(r" in [\d.]+s.*", "", lines[-1]) if lines else done.stderr.strip()[-200:]
    return Outcome(name, versions, last, done.returncode == 0)


def requirements(oldest: Sequence[str]) -> list[str]:
    """What pip installs: the dependencies of the package and of its tests, some at their lower bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [entry for entry in project["dependencies"] if not entry.startswith("onnxruntime")]
    runtime = next(entry for entry in project["dependencies"] if entry.startswith("onnxruntime>="))
    listed = [*listed, runtime.split(";")[0], *project["optional-dependencies"]["test"]]
    return [
        entry.replace(">=", "==") if re.split("[>=<]", entry)[0] in oldest and ">=" in entry else entry
        for entry in listed
    ]


def run(command: Sequence[str]) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


def row(outcome: Outcome) -> str:
    """A row of the table."""
    return f"| {outcome.name} | {' | '.join(outcome.versions)} | {outcome.result} |"


def write(page: Path, outcomes: Sequence[Outcome]) -> None:
    """Put the table between the comments of a page."""
    head = f"| combination | {' | '.join(PACKAGES)} | tests |\n|{'---|' * (len(PACKAGES) + 2)}\n"
    said = f"Python {platform.python_version()}, {date.today():%B %Y}:\n\n"
    table = said + head + "\n".join(map(row, outcomes))
    write_table(page, "matrix", table)


if __name__ == "__main__":
    raise SystemExit(main())
