"""Fixtures and markers that every test may use."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measurements of this machine are kept for one session of tests, apart from the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNXCOP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of the model zoo: `trained/`, `skeletons/`, `data/`."""
    folder = Path(os.environ.get("ONNXCOP_ZOO") or REPO_ROOT.parent / "shared" / "zoo")
    if not folder.is_dir():
        pytest.skip(f"no model zoo at {folder}; set ONNXCOP_ZOO to its folder")
    return folder


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The folder of the models that the repository ships."""
    return REPO_ROOT / "models"


@functools.cache
def cuda_problem() -> str | None:
    """The reason why ONNX Runtime cannot compute on a CUDA device here, or None if it can.

    The build of ONNX Runtime lists its CUDA provider on machines without a GPU too, so only a
    session that was given the provider and ran on it is proof.
    """
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper

    provider = "CUDAExecutionProvider"
    if provider not in ort.get_available_providers():
        return "this build of ONNX Runtime has no CUDA provider"
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds CUDA and cuDNN where pip installed them
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model, options, providers=[provider])
        if provider not in session.get_providers():
            return "ONNX Runtime could not start its CUDA provider"
        (result,) = session.run(None, {"x": np.zeros(2, np.float32)})
    except Exception as error:  # any failure here means no usable device
        return f"ONNX Runtime failed on CUDA: {error}"
    return None if np.array_equal(result, np.ones(2, np.float32)) else "CUDA computes wrongly"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` if there is no working CUDA device."""
    if item.get_closest_marker("gpu") is not None:
        problem = cuda_problem()
        if problem is not None:
            pytest.skip(problem)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The file of a small model."""
    from small_models import chain, written

    return written(chain(), tmp_path / "net.onnx")


@pytest.fixture
def pruned(model: Path) -> tuple[Path, Path, Path]:
    """The file of a small model, what was made of it, and the plan."""
    from cli_runs import BARE

    from onnxcop.cli import main as cli

    out, plan = model.with_name("small.onnx"), model.with_name("plan.json")
    assert cli.run([str(model), "-o", str(out), "--plan-out", str(plan), "-q", *BARE]) == 0
    return model, out, plan
