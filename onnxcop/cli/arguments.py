"""From options of the command line to arguments of the package's functions.

Nothing heavy is imported before a value is converted, so that `onnxcop --help` stays quick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcop.allocation.resources import RESOURCES

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from contextlib import AbstractContextManager

    from onnxcop._base.progress import ProgressBars
    from onnxcop.allocation.limits import Limits
    from onnxcop.cli.types import Output
    from onnxcop.criteria.base import Criterion
    from onnxcop.data.input_files import InputFiles
    from onnxcop.images.preprocess import Preprocess
    from onnxcop.pipeline.options import ApplyOptions, PruneOptions
    from onnxcop.runtime.session import EngineOptions

COP_PARAMETERS = ("alpha", "beta", "gamma", "top_k", "normalization")


def default_output(model: Path) -> Path:
    """Path of the result without `-o`: `net.onnx` → `net.pruned.onnx`."""
    stem = model.name.removesuffix(".onnx")
    return model.with_name(f"{stem}.pruned.onnx")


def target_of(output: Output | None, model: Path) -> Path:
    """Path of the pruned model."""
    if output is None:
        return default_output(model)
    if not output.whole:
        return output.path
    from onnxcop.integrations.huggingface import home_of

    return output.path / model.relative_to(home_of(model))


def int8_of(target: Path) -> Path:
    """Where the int8 model goes: `small.onnx` → `small.int8.onnx`."""
    return target.with_name(f"{target.name.removesuffix('.onnx')}.int8.onnx")


def check_outputs(inputs: InputFiles, output: Output | None, target: Path, *others: Path | None) -> None:
    """Refuse results that cannot be written at their paths; a missing folder is created at the end."""
    if output is not None and output.whole and not output.path.exists():
        inputs.check(output.path, *(one for one in others if one is None or one.parent != target.parent))
    else:
        inputs.check(target, *others)


def inputs_from(values: Mapping[str, Any], model: Path | None, *others: Path) -> InputFiles:
    """The files that a command reads."""
    from onnxcop.cli.recipe import FILE
    from onnxcop.data.input_files import InputFiles

    context = click.get_current_context(silent=True)
    recipe = None if context is None else context.meta.get(FILE)
    given = [values.get(name) for name in ("stats", "latency_table", "tokenizer", "loss", "labels")]
    given += [recipe, *values.get("custom_ops", ()), *others]
    return InputFiles([model], values.get("data"), values.get("metric"), given)


def default_table(model: Path) -> Path:
    """Path of a sweep's table without `-o`: `net.onnx` → `net.sweep.csv`."""
    return model.with_name(f"{model.name.removesuffix('.onnx')}.sweep.csv")


def prune_options(values: Mapping[str, Any], progress: ProgressBars) -> PruneOptions:
    """Options of a command that prunes."""
    from onnxcop.pipeline.options import PruneOptions

    made = {
        "preprocess": preprocess_from(values),
        "criterion": criterion_from(values),
        "limits": limits_from(values),
        "options": engine_from(values),
        "input_shapes": dict(values["input_shape"]) or None,
        "progress": progress,
    }
    known = {entry.name for entry in fields(PruneOptions)}
    made["budgets"] = {
        entry.name: values[entry.name] for entry in RESOURCES if entry.name not in known and values[entry.name]
    }
    plain = {entry.name: values[entry.name] for entry in fields(PruneOptions) if entry.name in values}
    return PruneOptions(**(plain | made))


def apply_options(values: Mapping[str, Any], progress: ProgressBars) -> ApplyOptions:
    """Options of the command that replays a plan."""
    from onnxcop.pipeline.options import ApplyOptions

    return ApplyOptions(
        options=engine_from(values), task=values["task"], latency_seconds=values["latency_seconds"], progress=progress,
        metadata=values["metadata"], keep_initializer_inputs=values["keep_initializer_inputs"],
        **data_arguments(values),
    )  # fmt: skip


def limits_from(values: Mapping[str, Any]) -> Limits:
    """Limits on what may be cut."""
    from onnxcop.allocation.limits import LayerLimit, Limits

    given = {name: values[name] for name in ("min_filters", "max_cut", "multiple_of", "exact_only", "blocks")}
    return Limits(
        keep=tuple(values["keep"]),
        only=tuple(values["only"]),
        layers=tuple(LayerLimit(**layer) for layer in values["layers"]),
        **{name: value for name, value in given.items() if value is not None},
    )


def analysis_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of :func:`onnxcop.analyze` for reading a model."""
    return {"input_shapes": dict(values["input_shape"]) or None, "policy": values["policy"]}


def engine_from(values: Mapping[str, Any]) -> EngineOptions:
    """How to run models."""
    from onnxcop.runtime.session import EngineOptions

    return EngineOptions(values["provider"], values["threads"], custom_ops=tuple(values["custom_ops"]))


def progress_from(values: Mapping[str, Any]) -> ProgressBars:
    """The progress display of a run."""
    from onnxcop._base.progress import ProgressBars

    return ProgressBars(enabled=not values["quiet"], lines=not values["as_json"])


def workers_from(values: Mapping[str, Any]) -> AbstractContextManager[Executor | None]:
    """The workers of a run, for the time of a block."""
    from onnxcop.parallel.workers import opened

    return opened(values["workers"])


def criterion_from(values: Mapping[str, Any]) -> str | Criterion:
    """The criterion with its parameters; separate numbers take precedence over `--prefer`.

    Parameters without a criterion apply to COP. Without either the choice stays open, and so does `--prefer`.
    """
    from onnxcop.criteria.registry import criterion_named, parameters_of

    parameters = {name: values[name] for name in COP_PARAMETERS if values[name] is not None}
    if values["criterion"] is None and not parameters:
        return "auto"
    name = values["criterion"] or "cop"
    known = parameters_of(criterion_named(name))
    if {"beta", "gamma"} <= {*known}:
        parameters = _preferred(values) | parameters
    elif values["prefer"] is not None and values.get("allocate") != "measured":
        parameters["prefer"] = values["prefer"]
    wrong = [parameter for parameter in parameters if parameter not in known]
    if wrong:
        raise click.UsageError(f"{_flags(wrong)} apply to the cop criteria, not to {name}")
    return criterion_named(name, **parameters)


def _preferred(values: Mapping[str, Any]) -> dict[str, float]:
    """COP's weights for a preference."""
    return {} if values["prefer"] is None else dict(zip(("beta", "gamma"), values["prefer"], strict=True))


def criterion_to_show(values: Mapping[str, Any]) -> Criterion | None:
    """The criterion whose scores `inspect` shows, None without `--scores`.

    Raises:
        click.UsageError: Options have no effect without `--scores`, or data are not used.
    """
    from onnxcop.criteria.registry import CRITERIA, criterion_named

    names = ("criterion", "prefer", *COP_PARAMETERS, "data", "stats", "stats_out")
    given = [name for name in names if values[name] is not None]
    if not values["scores"]:
        if given:
            raise click.UsageError(f"{_flags(given)}: only with --scores")
        return None
    if values["stats_out"] is not None and values["data"] is None:
        raise click.UsageError("--stats-out writes statistics of calibration data; give --data")
    if values["stats"] is not None and values["data"] is not None:
        raise click.UsageError("--stats and --data exclude each other")
    shown = criterion_from(values)
    criterion = criterion_named("cop", **_preferred(values)) if isinstance(shown, str) else shown
    if not criterion.needs_stats and values["stats_out"] is None and {"data", "stats"} & {*given}:
        raise click.UsageError(
            f"criterion {criterion.name} uses only the weights; with {_flags({'data', 'stats'} & {*given})} "
            f"choose --criterion {' or '.join(name for name, entry in CRITERIA.items() if entry.needs_stats)}"
        )
    return criterion


def statistics_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of :func:`onnxcop.criteria.scores.statistics`."""
    given = {name: values[name] for name in ("stats", "stats_out")}
    return {**given, **data_arguments(values), "options": engine_from(values)}


def data_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`onnxcop.data.options.DataOptions`."""
    names = ("data", "tokenizer", "samples", "batch_size", "seed")
    return {"preprocess": preprocess_from(values), **{name: values[name] for name in names}}


def preprocess_from(values: Mapping[str, Any]) -> Preprocess | None:
    """Preprocessing of images: a preset with some fields changed; None leaves it to the model."""
    names = ("mean", "std", "scale", "layout", "channels", "resize", "interpolation")
    changes = {name: values[name] for name in names if values[name] is not None}
    if values["preprocess"] is None and not changes:
        return None
    from dataclasses import replace

    from onnxcop.images.preprocess import Preprocess

    named = values["preprocess"]
    return replace(Preprocess.named(named) if named else Preprocess(), **changes)


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
