"""The command `onnxcop finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxcop.cli import console
from onnxcop.cli.arguments import engine_from, inputs_from, preprocess_from, progress_from
from onnxcop.cli.framework import SectionCommand
from onnxcop.cli.options import engine_options, finetune_options, seed_option, talking, training_data_options

_FILE = click.Path(path_type=Path)


@click.command(
    "finetune",
    cls=SectionCommand,
    examples=[
        ("onnxcop finetune small.onnx --data images/", "Train on a folder with one subfolder of images per class:"),
        (
            "onnxcop finetune small.onnx --data x.npz --labels labels --teacher model.onnx",
            "Train on arrays and labels, and distill from the original:",
        ),
    ],
)
@click.argument("model", type=_FILE)
@finetune_options
@training_data_options
@engine_options
@seed_option
@talking
def finetune_command(model: Path, output: Path | None, history: Path | None, plot: Path | None, **values: Any) -> None:
    """Train a model on labelled samples.

    Works for any classifier or regressor, pruned or not, without a training framework. A share of the samples is
    held out; the weights that score best on it are written.
    """
    from onnxcop.graph.io import load, save
    from onnxcop.recovery.metric import Metric
    from onnxcop.training.finetune import finetune

    target = output or model.with_name(f"{model.name.removesuffix('.onnx')}.finetuned.onnx")
    teachers = [path for path in (values["teacher"],) if path is not None]
    inputs_from(values, model, *teachers).check(target, history, plot, values["checkpoint"])
    if values["data"] is None:
        raise click.UsageError("finetune learns from labelled samples; give --data")
    if plot is not None:
        from onnxcop.report.plot import check_plot

        check_plot(plot)
    network = load(model)
    metric = None if values["metric"] is None else Metric.of(values["metric"], network)
    with progress_from(values) as progress:
        trained = finetune(
            network, values["data"], progress=progress,
            labels=values["labels"], tokenizer=values["tokenizer"],
            teacher=values["teacher"], loss=values["loss"], epochs=values["epochs"],
            rate=values["lr"], batch_size=values["batch_size"], decay=values["weight_decay"],
            held_out=values["held_out"], augment=values["augment"], batch_norm=values["batch_norm"],
            metric=metric, preprocess=preprocess_from(values),
            samples=values["samples"], checkpoint=values["checkpoint"], seed=values["seed"], engine=engine_from(values),
        )  # fmt: skip
    save(trained.model, target)
    if history is not None:
        from onnxcop._base.files import write_atomically

        write_atomically(history, trained.to_json().encode())
    if plot is not None:
        from onnxcop.report.plot import write_history

        write_history(plot, trained.history)
    if values["as_json"]:
        names = ("before", "after", "last", "steps", "seconds")
        record = {"output": target} | {name: getattr(trained, name) for name in names}
        console.show_json("finetuning", record)
    elif not values["quiet"]:
        click.echo(f"wrote {target}: {trained}")
