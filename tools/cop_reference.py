"""Run the implementation of COP that its authors released on three small networks, and store its figures.

    python tools/cop_reference.py CHECKOUT tests/criteria/data/cop_reference.npz

CHECKOUT is a copy of github.com/ZJULearning/COP; nothing of it is part of this project. Its functions take
NumPy arrays; TensorFlow, which it imports and does not need here, is replaced by an empty module. They run
in double precision, on the networks of `tests/paper_models.py`, and the tests compare with what is stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import re
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {  # rate, (alpha, beta, gamma), measure, normalization
    "vgg16": [(0.65, (1, 0, 3), "correlation", "max"), (0.4, (1, 1, 1), "cosine", "l1"),
              (0.4, (0.5, 2, 1), "inner_product", "l2")],
    "resnet": [(0.3, (1, 3, 0), "correlation", "max"), (0.5, (1, 1, 1), "correlation", "l2")],
    "mobilenet": [(0.5, (1, 0.1, 0.9), "correlation", "max"), (0.5, (1, 1, 1), "correlation", "l1")],
}  # fmt: skip
CLASSES = {
    "vgg16": ("prune_vgg16", "PruneVgg16"), "resnet": ("prune_resnet32", "PruneResNet32"),
    "mobilenet": ("prune_mobilenet_for_cifar", "PruneMobileNetForCifar"),
}  # fmt: skip


def reference_name(network: str, layer: str) -> str:
    """Name of the kernel of a layer in the reference."""
    if network == "vgg16":
        named = {"hidden": "dense1/kernel", "classes": "dense2/kernel"}
        return named.get(layer) or re.sub(r"conv(\d)_(\d)", r"conv\1/conv_\2/kernel", layer)
    if layer == "classes":
        return "dense/kernel" if network == "resnet" else "dense/dense/kernel"
    if layer == "stem":
        return "conv0/conv2d/kernel"
    if network == "mobilenet":
        return f"block{int(layer[2:]) + 1}/{'dw' if layer.startswith('dw') else 'conv2d'}/kernel"
    stage, block, which = re.fullmatch(r"s(\d)b(\d)\.(\w+)", layer).groups()  # type: ignore[union-attr]
    part = {"one": "m1", "two": "m2", "short": "shortcut"}[which]
    return f"block{int(stage) + 1}/sub_block{block}/{part}/conv2d/kernel"


def layers_in_order(network: str, names: list[str]) -> list[str]:
    """The layers in the reference's order: a projection follows the convolutions beside it."""
    if network != "resnet":
        return names
    blocks = sorted({n.split(".")[0] for n in names if "." in n})
    inner = [f"{block}.{part}" for block in blocks for part in ("one", "two", "short")]
    return ["stem", *(n for n in inner if n in names), "classes"]


def kernels_of(network: str, model: Any) -> dict[str, Any]:
    """The reference's weights, [height, width, in, out] or [in, out], by our layers' names."""
    from paper_models import weights_of

    weights = {name.removesuffix(".w"): w for name, w in weights_of(model).items() if name.endswith(".w")}
    found = {}
    for layer in layers_in_order(network, list(weights)):
        kernel = weights[layer]
        if kernel.ndim == 2:
            kernel = kernel.T if network != "vgg16" else kernel.T[None, None]
        else:
            kernel = kernel.transpose(2, 3, 1, 0)
            kernel = kernel.transpose(0, 1, 3, 2) if layer.startswith("dw") else kernel
        found[layer] = kernel
    return found


def run(network: str, kernels: dict[str, Any], setting: tuple[Any, ...]) -> dict[str, Any]:
    """Figures of one setting: normalized features, importances at the start and half-way, order of removal."""
    rate, weights, measure, normalization = setting
    module, name = CLASSES[network]
    base = getattr(importlib.import_module(f"prune_algorithm.{module}"), name)
    trace: list[dict[str, Any]] = []
    chosen: list[str] = []

    class Traced(base):  # type: ignore[misc,valid-type]
        def _importance_hook(self, importances: Any) -> Any:
            found = super()._importance_hook(importances)
            trace.append({key: np.array(value) for key, value in found.items()})
            return found

        def _get_cut_layers_name_list(self, cut_channels: Any, cut_layer_name: str) -> Any:
            chosen.append(cut_layer_name)
            return super()._get_cut_layers_name_list(cut_channels, cut_layer_name)

    ours = {reference_name(network, layer): layer for layer in kernels}
    pruner = Traced(
        {reference_name(network, layer): kernel for layer, kernel in kernels.items()},
        image_size=[32, 32], importance_method=measure, importance_coefficient=list(weights), top_k=3,
        num_classes=10, normalize_method=normalization, conv_dense_separate=False, merge_all=False,
    )  # fmt: skip
    features = pruner._get_normalized_feature(pruner.get_pruned_cared_weights(pruner.weights_dict))
    with contextlib.redirect_stdout(io.StringIO()):
        cut = pruner.get_prune_channels(rate)
    seen: Counter[str] = Counter()
    order = []
    for key in chosen:
        order.append((ours[key], cut[key][seen[key]]))
        seen[key] += 1
    half = len(order) // 2
    return {
        "features": {ours[key]: np.asarray(value) for key, value in features.items()},
        "start": {ours[key]: value for key, value in trace[0].items()},
        "half": {ours[key]: value for key, value in trace[half].items()},
        "order": order,
    }


def main(checkout: Path, output: Path) -> None:
    """Write the figures of all networks and settings."""
    sys.modules["tensorflow"] = types.ModuleType("tensorflow")
    sys.path[:0] = [str(checkout), str(ROOT / "tests")]
    from paper_models import reference_networks

    arrays: dict[str, Any] = {}
    for network, model in reference_networks().items():
        kernels = kernels_of(network, model)
        digest = hashlib.sha256(b"".join(np.float32(k).tobytes() for k in kernels.values())).hexdigest()
        arrays[f"{network}/sha256"] = np.array(digest)
        for number, setting in enumerate(SETTINGS[network]):
            found = run(network, kernels, setting)
            head = f"{network}/{number}"
            arrays[f"{head}/setting"] = np.array([str(part) for part in (setting[2], setting[3], *setting[1])])
            arrays[f"{head}/layers"] = np.array([layer for layer, _ in found["order"]])
            arrays[f"{head}/channels"] = np.array([channel for _, channel in found["order"]], np.int16)
            for when in ("start", "half"):
                for layer, values in found[when].items():
                    arrays[f"{head}/{when}/{layer}"] = values
            for layer, values in found["features"].items():
                if len(values) <= 32 and (number == 0 or network == "vgg16"):
                    arrays[f"{head}/features/{layer}"] = values[np.triu_indices(len(values))]
    output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(output, **arrays)
    print(f"{output}: {len(arrays)} arrays, {output.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
