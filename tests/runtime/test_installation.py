"""Several packages of ONNX Runtime in one folder: found and named with what size_fixes it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import REPO_ROOT

from onnxcop.runtime.installation import find_installation, package_for

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from onnxcop.runtime.providers import resolve_provider
from onnxcop.cli.console import logging_to_stderr
from onnxcop.errors import EngineError
with logging_to_stderr():
    for name in sys.argv[2:]:
        try:
            print(resolve_provider(name))
        except EngineError as error:
            print(error)
"""


def _installed(site: Path, *packages: str, active: str = "", whole: bool = True) -> Path:
    """A folder as pip leaves it, with a stub for the module itself."""
    (site / "onnxruntime" / "capi").mkdir(parents=True)
    if not whole:
        (site / "onnxruntime" / "__init__.py").write_text("")
    else:
        (site / "onnxruntime" / "__init__.py").write_text(
            "InferenceSession = object\nget_available_providers = lambda: ['CPUExecutionProvider']\n"
        )
        (site / "onnxruntime" / "capi" / "__init__.py").write_text("")
        (site / "onnxruntime" / "capi" / "build_and_package_info.py").write_text(f"package_name = {active!r}\n")
    for package in packages:
        info = site / f"{package.replace('-', '_')}-1.20.1.dist-info"
        info.mkdir()
        (info / "RECORD").write_text(f"{info.name}/METADATA,,\nonnxruntime/__init__.py,sha256=x,1\n")
    other = site / "onnxruntime_extensions-0.13.0.dist-info"
    other.mkdir()
    (other / "RECORD").write_text("onnxruntime_extensions/__init__.py,,\n")
    return site


def test_one_package_is_no_clash(tmp_path: Path) -> None:
    found = find_installation(_installed(tmp_path, "onnxruntime-gpu"), "onnxruntime-gpu")
    assert found.packages == ("onnxruntime-gpu",)
    assert found.clash() == ""


def test_a_clash_is_named_with_the_command_that_mends_it(tmp_path: Path) -> None:
    found = find_installation(_installed(tmp_path, "onnxruntime-openvino", "onnxruntime-gpu"), "onnxruntime-gpu")
    assert found.clash() == (
        "onnxruntime-gpu, onnxruntime-openvino are installed over each other: the files are those of onnxruntime-gpu, "
        "and what onnxruntime-openvino could do is missing; keep one: "
        "pip uninstall -y onnxruntime-gpu onnxruntime-openvino && pip install --no-deps onnxruntime-openvino"
    )
    both = find_installation(_installed(tmp_path / "b", "onnxruntime", "onnxruntime-gpu"), "onnxruntime")
    assert both.clash().endswith("&& pip install --no-deps onnxruntime-gpu")


def _run(site: Path, *providers: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, str(site), *providers], capture_output=True, text=True, check=True
    )


def test_a_run_says_it_once(tmp_path: Path) -> None:
    site = _installed(tmp_path, "onnxruntime-directml", "onnxruntime", active="onnxruntime")
    done = _run(site, "cpu", "auto", "dml")
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and "onnxruntime-directml are installed over each other" in warnings[0]
    fix = "pip uninstall -y onnxruntime onnxruntime-directml && pip install --no-deps onnxruntime-directml"
    assert "provider 'dml' is not in this build" in done.stdout and done.stdout.strip().endswith(fix)


def test_half_an_installation_is_named(tmp_path: Path) -> None:
    done = _run(_installed(tmp_path, "onnxruntime-gpu", whole=False), "auto")
    assert "ONNX Runtime is only partly installed" in done.stdout
    assert "pip uninstall -y onnxruntime-gpu && pip install --no-deps onnxruntime-gpu" in done.stdout


def test_the_page_on_providers_lists_all_other_dependencies() -> None:
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {re.split(r"[<>=;\[ ]", entry)[0] for entry in project["dependencies"]}
    page = (REPO_ROOT / "docs" / "howto" / "providers.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^pip install (click .*)$", page, re.MULTILINE)
    assert set(listed.split()) == {name for name in wanted if not name.startswith("onnxruntime")}


@pytest.mark.parametrize(
    ("provider", "package"),
    [("OpenVINOExecutionProvider", "onnxruntime-openvino"), ("QNNExecutionProvider", "onnxruntime-qnn"), ("X", "")],
)
def test_packages_of_providers(provider: str, package: str) -> None:
    assert package_for(provider) == package
