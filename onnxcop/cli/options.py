"""Options of the command line, in their groups."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_args

import click

from onnxcop.allocation.resources import RESOURCES, Resource
from onnxcop.cli import console
from onnxcop.cli.framework import SectionOption
from onnxcop.cli.recipe import take_recipe
from onnxcop.cli.types import (
    CriterionName,
    Fraction,
    Fractions,
    InputShape,
    LayerWish,
    Multiple,
    Numbers,
    Positive,
    PreferenceWeights,
    PresetName,
    ProviderName,
    ReportFile,
    Size,
)
from onnxcop.criteria.registry import summaries
from onnxcop.images.preprocess import Interpolation, Resize
from onnxcop.images.presets import PRESETS
from onnxcop.outputs.tasks import TASKS
from onnxcop.recovery.methods import RECOVERIES

P = ParamSpec("P")
R = TypeVar("R")
Decorator = Callable[[Callable[P, R]], Callable[P, R]]


def _options(section: str, *entries: tuple[tuple[str, ...], dict[str, Any]]) -> Decorator[P, R]:
    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        for names, settings in reversed(entries):
            function = click.option(*names, cls=SectionOption, section=section, **settings)(function)
        return function

    return decorate


def _option(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, settings


def _bound(resource: Resource, default: str = "") -> tuple[tuple[str, ...], dict[str, Any]]:
    """The option of a budget."""
    return _option(resource.flag, type=Size() if resource.absolute else Fraction(), help=resource.help + default)


_FILE = click.Path(path_type=Path)
BUDGET = "Budget (what to keep at most; all that are given hold)"

output_options: Decorator[Any, Any] = _options(
    "Result",
    _option(
        "-o",
        "--output",
        type=_FILE,
        metavar="FILE",
        help="The pruned model. [default: MODEL.pruned.onnx]",
    ),
    _option(
        "--report",
        "reports",
        type=ReportFile(),
        multiple=True,
        metavar="FILE",
        help="Write a report: .html, .md or .json; may be given again.",
    ),
    _option("--external-data", is_flag=True, help="Write weights to a file beside the model."),
    _option(
        "--no-metadata",
        "metadata",
        is_flag=True,
        flag_value=False,
        default=True,
        help="Leave out of the model where it comes from.",
    ),
)
plan_options: Decorator[Any, Any] = _options(
    "Result",
    _option(
        "--plan-out",
        type=_FILE,
        metavar="FILE",
        help="Write what was decided, for `onnxcop apply`.",
    ),
)
budget_options: Decorator[Any, Any] = _options(
    BUDGET,
    *(_bound(resource, " [default: 0.7]" if resource.name == "macs" else "") for resource in RESOURCES),
    _option(
        "--divergence", type=Positive(),
        help="Instead: cut until the outputs differ by this much (with --data).",
    ),
    _option("--max-drop", type=Positive(), help="Instead: until the --metric falls by this much."),
)  # fmt: skip
metric_option: Decorator[Any, Any] = _options(
    BUDGET, _option("--metric", metavar="SCRIPT.py:FUNCTION", help="A score of models, higher is better.")
)
sweep_options: Decorator[Any, Any] = _options(
    "Budgets",
    _option(
        "--macs", type=Fractions(), default="0.9,0.8,0.7,0.6,0.5", show_default=True,
        help="Multiply-accumulates to keep, one model each.",
    ),
    *(_bound(resource) for resource in RESOURCES if resource.name not in ("macs", "latency")),
    _option("--metric", metavar="SCRIPT.py:FUNCTION", help="A score of models, higher is better."),
)  # fmt: skip
quantize_option: Decorator[Any, Any] = _options(
    "Result",
    _option(
        "--then-quantize", type=click.Choice(["static", "dynamic"]),
        help="Write an int8 model too, OUT.int8.onnx, by ONNX Runtime's quantization; static needs --data.",
    ),
)  # fmt: skip
recipe_option: Decorator[Any, Any] = _options(
    "Result",
    _option(
        "--recipe", type=_FILE, metavar="FILE", is_eager=True, expose_value=False, callback=take_recipe,
        help="Options from a .yaml or .json file; those that are given here outrank it.",
    ),
)  # fmt: skip
gate_option: Decorator[Any, Any] = _options(
    "Result",
    _option(
        "--gate", metavar="CONDITIONS",
        help="Exit with 3 unless all hold: 'agreement>=.97, time<=.8'; also divergence, error, macs, params, size, "
        "filters.",
    ),
)  # fmt: skip
curve_options: Decorator[Any, Any] = _options(
    "Result",
    _option(
        "-o", "--output", type=_FILE, metavar="FILE",
        help="The table, written after every point. [default: MODEL.sweep.csv]",
    ),
    _option("--plot", type=_FILE, metavar="FILE", help="A picture, .svg, .png or .pdf (needs matplotlib)."),
    _option("--save-models", type=_FILE, metavar="FOLDER", help="Write every model too."),
)  # fmt: skip
criterion_options: Decorator[Any, Any] = _options(
    "Criterion (which filters go)",
    _option(
        "--criterion", type=CriterionName(),
        help=lambda: f"{', '.join(summaries())}. [default: measurement]",
    ),
    _option(
        "--prefer", type=PreferenceWeights(),
        help="faster, smaller, balanced, or beta,gamma: save MACs or parameters first.",
    ),
    _option("--alpha", type=float, metavar="NUMBER", help="Weight of correlation (cop)."),
    _option("--beta", type=float, metavar="NUMBER", help="Weight of MACs (cop)."),
    _option("--gamma", type=float, metavar="NUMBER", help="Weight of parameters (cop)."),
    _option("--top-k", type=click.IntRange(1), metavar="N", help="Correlations that count (cop)."),
    _option(
        "--normalization", type=click.Choice(["max", "l1", "l2"]),
        help="Of correlations within a layer (cop).",
    ),
)  # fmt: skip
score_options: Decorator[Any, Any] = _options(
    "Criterion (which filters go)",
    _option("--scores", is_flag=True, help="Show the importance of every filter and its terms."),
)
method_options: Decorator[Any, Any] = _options(
    "Method",
    _option(
        "--allocate", type=click.Choice(["auto", "cop", "measured"]), default="auto",
        show_default=True, help="How layers share the cut.",
    ),
    _option(
        "--recover", type=click.Choice(["auto", *(method.name for method in RECOVERIES)]), default="auto",
        show_default=True,
        help=f"How to compensate for removed filters: {'; '.join(f'{m.name}: {m.help}' for m in RECOVERIES)}.",
    ),
)  # fmt: skip
distill_options: Decorator[Any, Any] = _options(
    "Distillation (with --data; no labels are needed)",
    _option(
        "--distill", metavar="5m|'20 epochs'|auto",
        help="Train the pruned model on the original's answers for so long.",
    ),
    _option("--checkpoint", type=_FILE, metavar="FILE", help="Keep its state here, and go on from it after a kill."),
)  # fmt: skip
finetune_options: Decorator[Any, Any] = _options(
    "Training",
    _option("-o", "--output", type=_FILE, metavar="FILE", help="The trained model. [default: MODEL.finetuned.onnx]"),
    _option(
        "--labels", metavar="LABELS",
        help="File .npy or .npz, name of an array of the data, or SCRIPT.py:FUNCTION. [default: folders by class]",
    ),
    _option("--teacher", type=_FILE, metavar="FILE", help="Learn this model's answers too; the original, say."),
    _option(
        "--loss", default="auto", show_default=True, metavar="NAME|FILE.onnx",
        help="cross-entropy, mse, or a small model of outputs and labels.",
    ),
    _option("--epochs", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True, metavar="N",
            help="Passes over the samples."),
    _option("--lr", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True, metavar="RATE",
            help="Highest learning rate."),
    _option("--weight-decay", type=click.FloatRange(0), default=1e-4, show_default=True, metavar="NUMBER",
            help="Of AdamW."),
    _option("--held-out", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.1, show_default=True,
            metavar="SHARE", help="Samples that judge and are not trained on."),
    _option("--augment", is_flag=True, help="Shift and mirror images at random."),
    _option("--metric", metavar="SCRIPT.py:FUNCTION", help="Score of models, higher is better. [default: accuracy]"),
    _option("--checkpoint", type=_FILE, metavar="FILE", help="Keep the state here, and go on from it after a kill."),
    _option("--history", type=_FILE, metavar="FILE.json", help="Write losses and scores."),
    _option("--plot", type=_FILE, metavar="FILE", help="Draw them: .svg, .png or .pdf."),
)  # fmt: skip
limit_options: Decorator[Any, Any] = _options(
    "Limits (what may not go)",
    _option("--keep", multiple=True, metavar="PATTERN", help="Nodes or tensors never pruned."),
    _option("--only", multiple=True, metavar="PATTERN", help="The only ones that are."),
    _option(
        "--min-filters", type=click.IntRange(1), metavar="N", default=1, show_default=True,
        help="Every layer keeps so many.",
    ),
    _option("--max-cut", type=Fraction(zero=True), help="Largest share cut from a group."),
    _option(
        "--multiple-of", type=Multiple(), metavar="N|auto", default="auto", show_default=True,
        help="Of the kept widths; auto takes those that suit the machine, 1 any.",
    ),
    _option(
        "--layer", "layers", type=LayerWish(), multiple=True,
        help="Limits of some layers: 'PATTERN:max_cut=0.3,min_filters=16'; may be given again.",
    ),
    _option("--exact-only", is_flag=True, help="Leave groups alone that cross a statistic."),
)  # fmt: skip
input_shape_option: Decorator[Any, Any] = _options(
    "Model",
    _option(
        "--input-shape", type=InputShape(), multiple=True,
        help="Size of a dynamic input, NAME:1,3,224,224.",
    ),
)  # fmt: skip
policy_option: Decorator[Any, Any] = _options(
    "Model",
    _option(
        "--policy", type=click.Choice(["finest", "coarsest"]), default="finest", show_default=True,
        help="Prune inside heads and groups, or whole ones.",
    ),
)  # fmt: skip
engine_options: Decorator[Any, Any] = _options(
    "Machine",
    _option(
        "--provider", type=ProviderName(), default="auto", show_default=True,
        help="auto, cpu, cuda, tensorrt, or another of ONNX Runtime.",
    ),
    _option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads of ONNX Runtime."),
    _option(
        "--custom-ops", multiple=True, metavar="LIBRARY",
        help="Operators of your own, as ONNX Runtime loads them; may be given again.",
    ),
)  # fmt: skip
latency_options: Decorator[Any, Any] = _options(
    "Machine",
    _option(
        "--latency-seconds", type=click.FloatRange(0), metavar="SECONDS", default=2.0, show_default=True,
        help="How long to time both models; 0 for not at all.",
    ),
)  # fmt: skip
seed_option: Decorator[Any, Any] = _options(
    "Machine",
    _option("--seed", type=int, metavar="N", default=0, show_default=True, help="Of all that is drawn."),
)
talk_options: Decorator[Any, Any] = _options(
    "Output",
    _option("--json", "as_json", is_flag=True, help="One JSON object on standard output."),
    _option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors."),
    _option("--debug", is_flag=True, help="Log everything; errors with their traceback."),
)
verbose_option: Decorator[Any, Any] = _options(
    "Output",
    _option("-v", "--verbose", is_flag=True, help="Say more: every group, every name, the time."),
)
data_options: Decorator[Any, Any] = _options(
    "Calibration data",
    _option(
        "--data", metavar="PATH",
        help="Folder of pictures, .npz, .npy, test data, or SCRIPT.py:FUNCTION.",
    ),
    _option(
        "--samples", type=click.IntRange(1), metavar="N",
        help="How many to use; 512 by default, up to 1,024 of a quick model.",
    ),
    _option(
        "--batch-size", type=click.IntRange(1), metavar="N", default=32, show_default=True,
        help="Samples in a run.",
    ),
    _option(
        "--preprocess", type=PresetName(),
        help=f"{', '.join(PRESETS)}. [default: what the model declares, else a guess]",
    ),
    _option(
        "--resize", type=click.Choice(get_args(Resize)),
        help="How images get the input's size.",
    ),
    _option(
        "--interpolation", type=click.Choice(get_args(Interpolation)), help="Of resized images."
    ),
    _option("--mean", type=Numbers(), help="Subtracted from images after scaling."),
    _option("--std", type=Numbers(), help="Images are divided by it."),
    _option("--scale", type=float, metavar="NUMBER", help="Factor of pixel values 0 to 255."),
    _option("--layout", type=click.Choice(["nchw", "nhwc"]), help="Order of the axes."),
    _option("--channels", type=click.Choice(["rgb", "bgr", "gray"]), help="Order of the channels."),
)  # fmt: skip
task_option: Decorator[Any, Any] = _options(
    "Calibration data",
    _option(
        "--task", type=click.Choice(TASKS),
        help="What the model is for: how its outputs are judged. [default: by evidence]",
    ),
)  # fmt: skip
stats_options: Decorator[Any, Any] = _options(
    "Calibration data",
    _option("--stats", type=_FILE, metavar="FILE", help="Statistics gathered earlier."),
    _option("--stats-out", type=_FILE, metavar="FILE", help="Write what was gathered."),
)  # fmt: skip


def shape_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How a model is read."""
    return input_shape_option(policy_option(function))


def choice_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What every command that prunes takes, but for its budgets: all that the choice of filters depends on."""
    for options in (
        recipe_option, seed_option, latency_options, engine_options, method_options, stats_options, task_option,
        data_options, shape_options, limit_options, criterion_options,
    ):  # fmt: skip
        function = options(function)
    return function


def talking(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of what it says, and show the log while it runs."""

    @functools.wraps(function)
    def run(**values: Any) -> None:
        if values["quiet"] and values.get("verbose"):
            raise click.UsageError("--quiet and --verbose exclude each other")
        with console.logging_to_stderr(quiet=values["quiet"], debug=values["debug"]):
            function(**values)

    return talk_options(run)
