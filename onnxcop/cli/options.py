"""Options of the command line, by section of the help."""

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
    FileSize,
    Fraction,
    Fractions,
    InputShape,
    LayerWish,
    Numbers,
    OutputPath,
    Positive,
    PreferenceWeights,
    PresetName,
    ProviderName,
    ReportFile,
    TargetName,
    WidthMultiple,
)
from onnxcop.criteria.registry import summaries
from onnxcop.images.preprocess import Interpolation, Resize
from onnxcop.images.presets import PRESETS
from onnxcop.outputs.tasks import TASKS
from onnxcop.recovery.methods import RECOVERIES

P = ParamSpec("P")
R = TypeVar("R")
Decorator = Callable[[Callable[P, R]], Callable[P, R]]
Entry = tuple[tuple[str, ...], dict[str, Any]]


def _options(section: str, *entries: Entry) -> Decorator[P, R]:
    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        for names, settings in reversed(entries):
            function = click.option(*names, cls=SectionOption, section=section, **settings)(function)
        return function

    return decorate


def _option(*names: str, **settings: Any) -> Entry:
    return names, settings


def _number(name: str, kind: click.ParamType[Any], default: float, metavar: str, text: str) -> Entry:
    """The option of a number that has a default."""
    return _option(name, type=kind, default=default, show_default=True, metavar=metavar, help=text)


def _bound(resource: Resource, default: str = "") -> Entry:
    """The option of a budget."""
    return _option(resource.flag, type=FileSize() if resource.absolute else Fraction(), help=resource.help + default)


_FILE = click.Path(path_type=Path)
BUDGET = "Budget (what to keep at most; all that are given hold)"

_LISTED = "If weights are also listed as graph inputs, keep them in the list."
_KEEP_INPUTS = _option("--keep-initializer-inputs", is_flag=True, help=_LISTED)

output_options: Decorator[Any, Any] = _options(
    "Result",
    _option(
        "-o", "--output", type=OutputPath(), metavar="FILE|FOLDER/",
        help="Path of the pruned model. Into a folder (FOLDER/), config.json and the tokenizer beside MODEL are "
        "copied too. [default: MODEL.pruned.onnx]",
    ),
    _option(
        "--report", "reports", type=ReportFile(), multiple=True, metavar="FILE",
        help="Write a report (.html, .md or .json). May be repeated.",
    ),
    _option("--external-data", is_flag=True, help="Write the weights to a separate file beside the model."),
    _KEEP_INPUTS,
    _option(
        "--no-metadata", "metadata", is_flag=True, flag_value=False, default=True,
        help="Do not write provenance into the model's metadata.",
    ),
)  # fmt: skip
plan_options: Decorator[Any, Any] = _options(
    "Result",
    _option(
        "--plan-out",
        type=_FILE,
        metavar="FILE",
        help="Write the pruning plan (JSON), for `onnxcop apply`, `verify` and `recipe`.",
    ),
)
budget_options: Decorator[Any, Any] = _options(
    BUDGET,
    *(_bound(resource, " [default: 0.7]" if resource.name == "macs" else "") for resource in RESOURCES),
    _option(
        "--divergence", type=Positive(),
        help="Prune until the output divergence reaches this value, e.g. 0.01 (needs --data).",
    ),
    _option("--max-drop", type=Positive(), help="Prune until --metric has fallen by this much, e.g. 0.01."),
)  # fmt: skip
_METRIC = _option("--metric", metavar="SCRIPT.py:FUNCTION", help="Function that scores a model; higher is better.")
metric_option: Decorator[Any, Any] = _options(BUDGET, _METRIC)
sweep_options: Decorator[Any, Any] = _options(
    "Budgets (what to keep at most)",
    _option(
        "--macs", type=Fractions(), default="0.9,0.8,0.7,0.6,0.5", show_default=True,
        help="Multiply-accumulates to keep; one model for each value.",
    ),
    *(_bound(resource) for resource in RESOURCES if resource.name not in ("macs", "latency")),
    _METRIC,
)  # fmt: skip
quantize_option: Decorator[Any, Any] = _options(
    "Result",
    _option(
        "--then-quantize", type=click.Choice(["static", "dynamic"]),
        help="Also write an int8 model, OUT.int8.onnx, quantized by ONNX Runtime; static needs --data.",
    ),
)  # fmt: skip
recipe_file_option: Decorator[Any, Any] = _options(
    "Result",
    _option("-o", "--output", type=_FILE, metavar="FILE", help="A .yaml or .json file. [default: standard output]"),
)
verify_options: Decorator[Any, Any] = _options(
    "Check",
    _option("--plan", type=_FILE, required=True, metavar="FILE", help="The plan that produced PRUNED (--plan-out)."),
    _option("--structure-only", is_flag=True, help="Check shapes and nodes only; weights may have changed."),
)
vocabulary_options: Decorator[Any, Any] = _options(
    "Vocabulary",
    _option("--vocab-from", type=_FILE, required=True, metavar="TEXTS", help="A .txt file with one text a line."),
    _option("--tokenizer", type=_FILE, metavar="DIR", help="Folder of the tokenizer. [default: beside MODEL]"),
    _option("-o", "--output", type=OutputPath(), required=True, metavar="FOLDER/", help="Folder of the result."),
)
recipe_option: Decorator[Any, Any] = _options(
    "Result",
    _option(
        "--recipe", type=_FILE, metavar="FILE", is_eager=True, expose_value=False, callback=take_recipe,
        help="Read options from a .yaml or .json file; options on the command line take precedence.",
    ),
)  # fmt: skip
gate_option: Decorator[Any, Any] = _options(
    "Result",
    _option(
        "--gate", metavar="CONDITIONS",
        help="Exit with code 3 unless all conditions hold, e.g. 'agreement>=.97, time<=.8'. Quantities of B: "
        "agreement, divergence and error against A; time, macs, params, size and filters as shares of A's.",
    ),
)  # fmt: skip
curve_options: Decorator[Any, Any] = _options(
    "Result",
    _option(
        "-o", "--output", type=_FILE, metavar="FILE",
        help="Path of the table, updated after every point. [default: MODEL.sweep.csv]",
    ),
    _option("--plot", type=_FILE, metavar="FILE", help="Plot the trade-off as .svg, .png or .pdf (needs matplotlib)."),
    _option("--save-models", type=_FILE, metavar="FOLDER", help="Write every pruned model to this folder."),
)  # fmt: skip
criterion_options: Decorator[Any, Any] = _options(
    "Criterion (which filters to remove)",
    _option(
        "--criterion", type=CriterionName(),
        help=lambda: f"Rank filters by a formula: {', '.join(summaries())}. [default: measured sensitivity]",
    ),
    _option(
        "--prefer", type=PreferenceWeights(),
        help="What to save first: faster (MACs), smaller (parameters), balanced, or BETA,GAMMA.",
    ),
    _option("--alpha", type=float, metavar="NUMBER", help="COP: weight of the correlation term. [default: 1]"),
    _option("--beta", type=float, metavar="NUMBER", help="COP: weight of the MACs term. [default: 1]"),
    _option("--gamma", type=float, metavar="NUMBER", help="COP: weight of the parameter term. [default: 1]"),
    _option(
        "--top-k", type=click.IntRange(1), metavar="N",
        help="COP: number of largest correlations to average. [default: 3]",
    ),
    _option(
        "--normalization", type=click.Choice(["max", "l1", "l2"]),
        help="COP: how to normalize correlations within a layer. [default: max]",
    ),
)  # fmt: skip
score_options: Decorator[Any, Any] = _options(
    "Criterion (which filters to remove)",
    _option("--scores", is_flag=True, help="Show the importance of every filter and its terms."),
)
method_options: Decorator[Any, Any] = _options(
    "Method",
    _option(
        "--allocate", type=click.Choice(["auto", "cop", "measured"]), default="auto",
        show_default=True, help="How to divide the cut among layers: measured sensitivity, or a criterion (cop).",
    ),
    _option(
        "--recover", type=click.Choice(["auto", *(method.name for method in RECOVERIES)]), default="auto",
        show_default=True,
        help=f"How to compensate for removed filters: {'; '.join(f'{m.name}: {m.help}' for m in RECOVERIES)}.",
    ),
)  # fmt: skip
figures_option: Decorator[Any, Any] = _options(
    "Calibration data",
    _option(
        "--cross-fit/--no-cross-fit", default=None,
        help="Take the figures of the report from two more runs, each on half of the samples and measured on the other "
        "half; else samples are set aside for them. [default: with fewer than 256 samples]",
    ),
)  # fmt: skip
distill_options: Decorator[Any, Any] = _options(
    "Distillation (with --data; no labels are needed)",
    _option(
        "--distill", metavar="5m|'20 epochs'|auto|none",
        help="Distill: train the pruned model on the original's outputs for this time or number of epochs. "
        "[default: from 1,500 samples on, at most as long as the run took before]",
    ),
    _option("--checkpoint", type=_FILE, metavar="FILE", help="Save the training state here, and resume from it."),
)  # fmt: skip
finetune_options: Decorator[Any, Any] = _options(
    "Training",
    _option(
        "-o", "--output", type=_FILE, metavar="FILE",
        help="Path of the trained model. [default: MODEL.finetuned.onnx]",
    ),
    _option(
        "--labels", metavar="LABELS",
        help="A .npy or .npz file, the name of an array in --data, or SCRIPT.py:FUNCTION. [default: an array named "
        "labels, or subfolders as classes]",
    ),
    _option("--teacher", type=_FILE, metavar="FILE", help="Also distill from this model, e.g. the original."),
    _option(
        "--loss", default="auto", show_default=True, metavar="NAME|FILE.onnx",
        help="cross-entropy, mse, or an ONNX model that computes the loss from outputs and labels. auto: by the "
        "labels.",
    ),
    _number("--epochs", click.FloatRange(0, min_open=True), 10.0, "N", "Passes over the samples."),
    _number("--lr", click.FloatRange(0, min_open=True), 1e-3, "RATE", "Peak learning rate."),
    _number("--weight-decay", click.FloatRange(0), 1e-4, "NUMBER", "Weight decay of AdamW."),
    _number(
        "--held-out", click.FloatRange(0, 1, min_open=True, max_open=True), 0.1, "SHARE",
        "Share of the samples to hold out, which selects the best weights.",
    ),
    _option("--augment", is_flag=True, help="Shift and flip the images at random."),
    _option(
        "--batch-norm", type=click.Choice(["frozen", "batch"]), default="frozen", show_default=True,
        help="Statistics of BatchNormalization: keep them, or train with those of the batch and re-estimate them.",
    ),
    _option(
        "--metric", metavar="SCRIPT.py:FUNCTION",
        help="Function that scores a model; higher is better. [default: accuracy]",
    ),
    _option("--checkpoint", type=_FILE, metavar="FILE", help="Save the training state here, and resume from it."),
    _option("--history", type=_FILE, metavar="FILE.json", help="Write losses and scores as JSON."),
    _option("--plot", type=_FILE, metavar="FILE", help="Plot losses and scores as .svg, .png or .pdf."),
)  # fmt: skip
limit_options: Decorator[Any, Any] = _options(
    "Limits (what to keep; PATTERN is a name with wildcards, e.g. '/stem/*')",
    _option("--keep", multiple=True, metavar="PATTERN", help="Never prune matching nodes or tensors. May be repeated."),
    _option("--only", multiple=True, metavar="PATTERN", help="Prune only matching nodes or tensors. May be repeated."),
    _number("--min-filters", click.IntRange(1), 1, "N", "Smallest number of filters that every layer keeps."),
    _option("--max-cut", type=Fraction(zero=True), help="Largest share of a group to remove. [default: 1]"),
    _option(
        "--multiple-of", type=WidthMultiple(), metavar="N|auto", default="auto", show_default=True,
        help="Round kept widths to multiples of N. auto: widths that this machine computes well; 1: any width.",
    ),
    _option(
        "--layer", "layers", type=LayerWish(), multiple=True,
        help="Limits of matching layers, e.g. '*layer4*:max_cut=0.3,min_filters=16'. May be repeated.",
    ),
    _option(
        "--exact-only", is_flag=True,
        help="Skip groups that the statistics of a normalization (e.g. LayerNorm) depend on.",
    ),
    _option(
        "--blocks/--no-blocks", default=None,
        help="Let terms of sums, operands of Concat and gates go as a whole too. By default they may in budgets of "
        "time, if the network is small enough to try.",
    ),
)  # fmt: skip
input_shape_option: Decorator[Any, Any] = _options(
    "Model",
    _option(
        "--input-shape", type=InputShape(), multiple=True,
        help="Shape to assume for a dynamic input, e.g. input:1,3,224,224. May be repeated.",
    ),
)  # fmt: skip
classes_option: Decorator[Any, Any] = _options(
    "Model",
    _option(
        "--classes", metavar="0,2,5",
        help="First reduce the output to these classes, by number or by the names in the model's metadata. If there "
        "are several outputs: OUTPUT:0,2,5.",
    ),
)  # fmt: skip
policy_option: Decorator[Any, Any] = _options(
    "Model",
    _option(
        "--policy", type=click.Choice(["finest", "coarsest"]), default="finest", show_default=True,
        help="finest: prune inside attention heads and groups of convolutions; coarsest: only whole heads and groups.",
    ),
)  # fmt: skip
engine_options: Decorator[Any, Any] = _options(
    "Machine",
    _option(
        "--provider", type=ProviderName(), default="auto", show_default=True,
        help="Execution provider: auto, cpu, cuda, tensorrt, or another of ONNX Runtime.",
    ),
    _option(
        "--threads", type=click.IntRange(1), metavar="N",
        help="CPU threads for ONNX Runtime. [default: all cores]",
    ),
    _option(
        "--custom-ops", multiple=True, metavar="LIBRARY",
        help="Shared library with custom operators for ONNX Runtime. May be repeated.",
    ),
)  # fmt: skip
latency_options: Decorator[Any, Any] = _options(
    "Machine",
    _option(
        "--latency-seconds", type=click.FloatRange(0), metavar="SECONDS", default=2.0, show_default=True,
        help="How long to measure the latency of both models, in seconds; 0 skips it.",
    ),
)  # fmt: skip
device_options: Decorator[Any, Any] = _options(
    "Machine",
    _option(
        "--target", type=TargetName(), metavar="NAME",
        help="Choose widths for another device without timing: x86-avx512, arm64, cuda-fp16, tensorrt-int8 …",
    ),
    _option(
        "--latency-table", type=_FILE, metavar="TABLE.json",
        help="Prune for the device that `onnxcop profile` measured in this table; --latency is then a share of the "
        "time on that device.",
    ),
)  # fmt: skip
profile_options: Decorator[Any, Any] = _options(
    "Result",
    _option("-o", "--output", type=_FILE, metavar="TABLE.json", help="Path of the table. [default: MODEL.times.json]"),
    _option(
        "--script", type=_FILE, metavar="FILE.py",
        help="Instead of timing here, write a script that times on a device; it needs ONNX Runtime and NumPy only.",
    ),
    _number(
        "--seconds", click.FloatRange(0, min_open=True), 10.0, "SECONDS",
        "Longest time to spend on one width of the whole model, in seconds.",
    ),
    _option(
        "--target", type=TargetName(), metavar="NAME",
        help="Time widths that suit this kind of device, e.g. cuda-fp16. [default: widths that suit CPUs]",
    ),
    _KEEP_INPUTS,
)  # fmt: skip
seed_option: Decorator[Any, Any] = _options(
    "Machine",
    _number("--seed", click.INT, 0, "N", "Random seed of sampling and of synthetic inputs."),
)
talk_options: Decorator[Any, Any] = _options(
    "Output",
    _option("--json", "as_json", is_flag=True, help="Print the result as one JSON object."),
    _option("-q", "--quiet", is_flag=True, help="Print only warnings and errors."),
    _option("--debug", is_flag=True, help="Log everything, and show tracebacks of errors."),
)
verbose_option: Decorator[Any, Any] = _options(
    "Output",
    _option("-v", "--verbose", is_flag=True, help="Print every group, every name and the time of each phase."),
)


def _data_options(section: str, samples: str, source: str, count: str) -> Decorator[Any, Any]:
    """The options of data: what the samples are, with the default of their source and of their number."""
    return _options(
        section,
        _option(
            "--data", metavar="PATH",
            help=f"{samples}: folder of images, .tar, .parquet, .npz, .npy, .txt (one text a line), folder of ONNX "
            f"test data, URL, or SCRIPT.py:FUNCTION. {source}",
        ),
        _option("--tokenizer", type=_FILE, metavar="DIR", help="Folder of the tokenizer; .txt data need it."),
        _option("--samples", type=click.IntRange(1), metavar="N", help=f"How many samples to use. [default: {count}]"),
        _number("--batch-size", click.IntRange(1), 32, "N", "How many samples to run at once."),
        _option(
            "--preprocess", type=PresetName(),
            help=f"Preprocessing of images: {', '.join(PRESETS)}. [default: as the model declares, else a guess]",
        ),
        _option("--resize", type=click.Choice(get_args(Resize)), help="How to resize images. [default: by preset]"),
        _option(
            "--interpolation", type=click.Choice(get_args(Interpolation)),
            help="Interpolation for resizing. [default: by preset]",
        ),
        _option("--scale", type=float, metavar="NUMBER", help="Factor for pixel values (0 to 255), e.g. 0.00392157."),
        _option("--mean", type=Numbers(), help="Mean of each channel, subtracted after scaling, e.g. 0.49,0.46,0.41."),
        _option("--std", type=Numbers(), help="Deviation of each channel, divided by after that, e.g. 0.23,0.22,0.23."),
        _option("--layout", type=click.Choice(["nchw", "nhwc"]), help="Order of the axes. [default: from the input]"),
        _option("--channels", type=click.Choice(["rgb", "bgr", "gray"]), help="Color channels. [default: by preset]"),
    )  # fmt: skip


data_options = _data_options(
    "Calibration data", "Unlabelled samples", "[default: synthetic inputs]", "512, or up to 1,024 for a fast model"
)
training_data_options = _data_options("Data", "Samples", "[required]", "all")
task_option: Decorator[Any, Any] = _options(
    "Calibration data",
    _option(
        "--task", type=click.Choice(TASKS),
        help="Task of the model, which decides how its outputs are compared. [default: detected]",
    ),
)  # fmt: skip
stats_options: Decorator[Any, Any] = _options(
    "Calibration data",
    _option(
        "--stats", type=_FILE, metavar="FILE",
        help="Read calibration statistics from this file instead of --data.",
    ),
    _option(
        "--stats-out", type=_FILE, metavar="FILE",
        help="Write the calibration statistics, for --stats and merge-stats.",
    ),
)  # fmt: skip


def shape_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options for reading a model: shapes of its inputs, and the policy."""
    return input_shape_option(policy_option(function))


def choice_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that prunes, except its budgets."""
    for options in (
        recipe_option, seed_option, latency_options, device_options, engine_options, method_options, stats_options,
        task_option, data_options, classes_option, shape_options, limit_options, criterion_options,
    ):  # fmt: skip
        function = options(function)
    return function


def talking(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options for output to a command, and show the log while it runs."""

    @functools.wraps(function)
    def run(**values: Any) -> None:
        if values["quiet"] and values.get("verbose"):
            raise click.UsageError("--quiet and --verbose exclude each other")
        with console.logging_to_stderr(quiet=values["quiet"], debug=values["debug"]):
            function(**values)

    return talk_options(run)
