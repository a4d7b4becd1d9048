"""The installed package of ONNX Runtime, and whether several packages overwrite each other.

`onnxruntime`, `onnxruntime-gpu`, `onnxruntime-openvino` and others unpack into the same folder. pip does not notice:
the last one provides the files, the providers of the others are missing, and removing one breaks the rest.
"""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

log = logging.getLogger("onnxcop")

_OWNED = "onnxruntime/__init__.py"
_PACKAGES = {  # provider: the package that contains it
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "DmlExecutionProvider": "onnxruntime-directml",
    "QNNExecutionProvider": "onnxruntime-qnn",
    "MIGraphXExecutionProvider": "onnxruntime-migraphx",
    "ROCMExecutionProvider": "onnxruntime-rocm",
    "CoreMLExecutionProvider": "onnxruntime",
}


@dataclass(frozen=True, slots=True)
class Installation:
    """The packages in the folder that `onnxruntime` is imported from.

    Attributes:
        packages: Names of all distributions that claim its files, sorted.
        active: The package that the files come from; empty if they do not say.
    """

    packages: tuple[str, ...]
    active: str

    def clash(self) -> str:
        """The problem and its fix; empty if one package owns the files."""
        if len(self.packages) < 2:
            return ""
        hidden = [name for name in self.packages if name != self.active]
        return (
            f"{', '.join(self.packages)} are installed over each other: the files are those of "
            f"{self.active or 'the one installed last'}, and what {' and '.join(hidden)} could do is missing; "
            f"keep one: {self.fix(_wanted(self.packages))}"
        )

    def fix(self, package: str) -> str:
        """The command line that keeps only one package of ONNX Runtime."""
        uninstall = f"pip uninstall -y {' '.join(self.packages)} && " if self.packages else ""
        return f"{uninstall}pip install --no-deps {package}"


def find_installation(folder: Path, active: str = "") -> Installation:
    """The distributions that claim the files of `onnxruntime` in a folder such as `site-packages`.

    Args:
        folder: The folder that holds `onnxruntime/`.
        active: The package that the files themselves name.
    """
    packages = []
    for info in folder.glob("*.dist-info"):
        if not info.name.lower().startswith(("onnxruntime", "ort")):
            continue
        try:
            owns = _OWNED in (info / "RECORD").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if owns:
            packages.append(re.sub(r"[-_.]+", "-", info.name.removesuffix(".dist-info").rsplit("-", 1)[0]).lower())
    return Installation(tuple(sorted(packages)), active)


def installation_of(module: ModuleType) -> Installation:
    """The installation that an imported `onnxruntime` comes from."""
    folder = Path(next(iter(module.__path__))).parent
    try:
        from onnxruntime.capi import build_and_package_info

        active = str(build_and_package_info.package_name)
    except (ImportError, AttributeError):
        active = ""
    return find_installation(folder, active)


@functools.cache
def warn_of_clash(module: ModuleType) -> None:
    """Warn once if several packages overwrite each other."""
    clash = installation_of(module).clash()
    if clash:
        log.warning("%s", clash)


def package_for(provider: str) -> str:
    """The package of ONNX Runtime that has a provider, by the provider's full name; empty if unknown."""
    return _PACKAGES.get(provider, "")


def _wanted(packages: tuple[str, ...]) -> str:
    """The package that its user most likely chose: not one that comes as a dependency."""
    chosen = [name for name in packages if name not in ("onnxruntime", "onnxruntime-gpu")]
    return chosen[0] if chosen else "onnxruntime-gpu"
