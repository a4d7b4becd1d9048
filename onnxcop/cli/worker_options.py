"""The options of commands that can work on several processes or machines."""

from __future__ import annotations

import click

from onnxcop.cli.framework import SectionOption
from onnxcop.cli.types import Workers

workers_option = click.option(
    "--workers", cls=SectionOption, section="Machine", type=Workers(), metavar="N|ADDRESS",
    help="Work on N processes with one thread each, or on a cluster: dask://HOST:PORT, ray://HOST:PORT or ray. "
    "Results stay the same.",
)  # fmt: skip
independent_option = click.option(
    "--independent", cls=SectionOption, section="Machine", is_flag=True,
    help="Reach each budget from the original, as jobs for --workers that a stopped run continues; with several "
    "models always.",
)  # fmt: skip
