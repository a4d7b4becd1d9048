"""Pruning as a pass of Olive (`olive-ai`).

Olive finds passes through a package configuration, a JSON file that lists where each of them lives:

    python -m onnxcop.integrations.olive olive_packages.json
    olive run --config run.json --package-config olive_packages.json

writes one with Olive's own passes and `OnnxCop`, and runs a workflow whose passes may be of the type
`OnnxCop`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from olive.common.config_utils import validate_config
from olive.data.config import DataConfig
from olive.hardware import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.onnx.common import get_external_data_config, model_proto_to_olive_model
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.search.search_parameter import Categorical

from onnxcop.allocation.limits import Limits
from onnxcop.allocation.resources import RESOURCES
from onnxcop.pipeline.prune import prune
from onnxcop.recovery.methods import RECOVERIES
from onnxcop.runtime.session import EngineOptions

_METHODS = ", ".join(method.name for method in RECOVERIES)
_DIRECT = (
    "divergence", "metric", "max_drop", "samples", "batch_size", "criterion", "allocate", "recover", "input_shapes",
    "task", "seed",
)  # fmt: skip

PACKAGE_ENTRY: dict[str, Any] = {
    "module_path": "onnxcop.integrations.olive.OnnxCop",
    "supported_providers": ["*"],
    "supported_accelerators": ["*"],
    "supported_precisions": ["*"],
    "supported_algorithms": [],
    "supported_quantization_encodings": [],
    "dataset": "dataset_optional",
}


class OnnxCop(Pass):
    """Removes filters from an ONNX model within a budget, and lets the others compensate for them."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        def option(text: str, kind: Any = float, default: Any = None) -> PassConfigParam:
            return PassConfigParam(type_=kind, default_value=default, description=text)

        return {
            "macs": PassConfigParam(
                type_=float, default_value=None, search_defaults=Categorical([0.9, 0.8, 0.7, 0.6, 0.5]),
                description="Fraction of multiply-accumulates to keep at most; 0.7 where no budget is given.",
            ),
            **{
                resource.name: option(f"What to keep at most: {resource.help}", float | str)
                for resource in RESOURCES if resource.name != "macs"
            },
            "divergence": option("Instead of a size: the largest output divergence on held-out samples."),
            "metric": option("Function that scores a model, script.py:function; higher is better.", str),
            "max_drop": option("Instead of a size: the largest loss of the metric."),
            "data": option("Calibration data: a path, or script.py:function.", str),
            "data_config": PassConfigParam(
                type_=DataConfig | dict[str, Any], default_value=None, description="Olive's own form of data.",
            ),
            "samples": option("Number of samples to use.", int, 512),
            "batch_size": option("Number of samples in one inference.", int, 32),
            "criterion": option("Which filters to remove: auto, cop, l1 …", str, "auto"),
            "allocate": option("How to divide the cut among layers: auto, cop or measured.", str, "auto"),
            "recover": option(f"How to compensate for removed filters: auto, {_METHODS}.", str, "auto"),
            "keep": option("Patterns of nodes or tensors that are never pruned.", list[str], []),
            "only": option("Patterns of the only nodes or tensors that are pruned.", list[str], []),
            "multiple_of": option("Multiple of kept widths; auto: what suits the machine.", int | str, "auto"),
            "max_cut": option("Largest share of a group that may be removed.", float, 1.0),
            "input_shapes": option("Sizes of dynamic inputs, by name.", dict[str, list[int]]),
            "task": option("classify, detect, embed, regress or sequence; by default detected.", str),
            "provider": option("auto, cpu, cuda, or another of ONNX Runtime.", str, "auto"),
            "seed": option("Random seed.", int, 0),
            **get_external_data_config(),
        }  # fmt: skip

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        data = config.data
        if config.data_config is not None:
            container = validate_config(config.data_config, DataConfig).to_data_container()
            data = container.create_calibration_dataloader(model_path=model.model_path, io_config=model.io_config)
        limits = Limits(
            keep=tuple(config.keep),
            only=tuple(config.only),
            multiple_of=config.multiple_of,
            max_cut=config.max_cut,
        )
        bounds = {resource.name: getattr(config, resource.name) for resource in RESOURCES}
        result = prune(
            model.model_path, data=data, limits=limits, options=EngineOptions(provider=config.provider),
            budgets={name: bound for name, bound in bounds.items() if bound is not None},
            **{name: getattr(config, name) for name in _DIRECT},
        )  # fmt: skip
        target = resolve_onnx_path(output_model_path, Path(model.model_path).name)
        return model_proto_to_olive_model(result.model, target, config)


def package_config() -> dict[str, Any]:
    """Olive's package configuration with the pass `OnnxCop` added to it."""
    from olive.package_config import OlivePackageConfig

    document: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text())
    document["passes"]["OnnxCop"] = PACKAGE_ENTRY
    return document


def write_package_config(arguments: list[str]) -> None:
    """Write the package configuration to a file, or to standard output where none is named."""
    text = json.dumps(package_config(), indent=4) + "\n"
    if arguments:
        Path(arguments[0]).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    write_package_config(sys.argv[1:])
