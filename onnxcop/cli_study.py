"""Commands that measure models: `onnxcop compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxcop import console
from onnxcop.cli_arguments import data_arguments, engine_from
from onnxcop.cli_form import SectionCommand
from onnxcop.cli_options import (
    data_options,
    engine_options,
    input_shape_option,
    latency_options,
    seed_option,
    talking,
    verbose_option,
)
from onnxcop.progress import Progress

_FILE = click.Path(path_type=Path)


@click.command("compare", cls=SectionCommand)
@click.argument("a", type=_FILE)
@click.argument("b", type=_FILE)
@data_options
@input_shape_option
@engine_options
@latency_options
@seed_option
@verbose_option
@talking
def compare_command(a: Path, b: Path, **values: Any) -> None:
    """Show two models side by side.

    What each costs, how long it takes, and how far B's outputs agree with A's.
    """
    from onnxcop.console_study import show_comparison
    from onnxcop.versus import compare

    with Progress(enabled=not values["quiet"]) as progress:
        found = compare(
            a, b, input_shapes=dict(values["input_shape"]) or None, options=engine_from(values),
            latency_seconds=values["latency_seconds"], seed=values["seed"], progress=progress,
            **data_arguments(values),
        )  # fmt: skip
    if values["as_json"]:
        console.show_json(found.to_dict())
    elif not values["quiet"]:
        show_comparison(found, verbose=values["verbose"])
