"""Prune a model through Olive: `OnnxCop` as a pass of a workflow, and on demand Olive's own quantization after it.

    pip install olive-ai requests onnxruntime . && python tools/try_olive.py models/digits_resnet.onnx \\
        --data models/digits_calib.npz --macs 0.7 -o olive_out

Wants an environment of its own: `olive-ai` brings PyTorch with it. Writes the package configuration, the
workflow and both models to the output folder, and prints one JSON object: files, sizes and, with
`--test`, the accuracy of each on arrays named `input` and `labels`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcop.integrations.olive import package_config


def workflow(model: Path, passes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A workflow of Olive on the CPU: one model in, one out."""
    return {
        "input_model": {"type": "ONNXModel", "model_path": str(model.resolve())},
        "systems": {
            "local": {
                "type": "LocalSystem",
                "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
            }
        },
        "passes": passes,
        "target": "local",
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "output"),
        "no_artifacts": True,
    }


def run_workflow(model: Path, passes: dict[str, Any], folder: Path, packages: Path) -> Path:
    """Run a workflow and return the model that comes out of it."""
    from olive.workflows import run

    best = run(workflow(model, passes, folder), package_config=packages).get_best_candidate()
    if best is None:
        raise SystemExit("Olive returned no model; its log says why")
    return Path(best.model_path)


def data_config(arrays: Path) -> dict[str, Any]:
    """Data in Olive's own form: the `input` and `labels` of an .npz file, as a data set that is registered here."""
    import torch
    from olive.data.registry import Registry

    @Registry.register_dataset("npz_arrays")
    def load(path: str, **_: Any) -> list[tuple[dict[str, torch.Tensor], int]]:
        held = np.load(path)
        pairs = zip(held["input"], held["labels"], strict=True)
        return [({"input": torch.from_numpy(picture)}, int(label)) for picture, label in pairs]

    return {
        "name": "calibration",
        "load_dataset_config": {"type": "npz_arrays", "params": {"path": str(arrays.resolve())}},
        "dataloader_config": {"params": {"batch_size": 32}},
    }


def accuracy(model: Path, test: Path) -> float:
    """The share of samples whose label the model finds."""
    import onnxruntime as ort

    arrays = np.load(test)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: arrays["input"]})
    return float((np.asarray(scores).argmax(axis=1) == arrays["labels"]).mean())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("olive_out"))
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--quantize", action="store_true", help="then quantize to 8 bits, with the same data")
    parser.add_argument("--data-config", action="store_true", help="give the data in Olive's own form")
    return parser.parse_args()


def main() -> None:
    """Run the workflow and say what came out."""
    given = arguments()
    os.environ.setdefault("OLIVE_DISABLE_TELEMETRY", "1")
    given.output.mkdir(parents=True, exist_ok=True)
    packages = given.output / "olive_packages.json"
    packages.write_text(json.dumps(package_config(), indent=4), encoding="utf-8")
    prune: dict[str, Any] = {"type": "OnnxCop", "macs": given.macs}
    if given.data is not None:
        prune |= {"data_config": data_config(given.data)} if given.data_config else {"data": str(given.data.resolve())}
    passes = {"prune": prune}
    if given.quantize:
        passes["quantize"] = {"type": "OnnxStaticQuantization", "data_config": data_config(given.data)}
    made = run_workflow(given.model, passes, given.output, packages)
    target = given.output / "model.onnx"
    shutil.copyfile(made, target)
    onnx.checker.check_model(str(target), full_check=True)
    report: dict[str, Any] = {
        "model": str(target),
        "bytes": [given.model.stat().st_size, target.stat().st_size],
    }
    if given.test is not None:
        report["accuracy"] = [accuracy(given.model, given.test), accuracy(target, given.test)]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
