"""Measured figures in words: what every output is, and how far it is from the original's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxcop.reconstruction.divergence import Figures, OutputFigures


def figure_lines(found: Figures) -> Iterator[str]:
    """Two lines for every output, what it is and what was measured of it; a line on all of several."""
    for output in found.outputs:
        yield output.described
        yield f"  {measured(output)}"
    if len(found.outputs) > 1:
        yield f"all outputs: divergence {found.divergence.number()}"


def measured(output: OutputFigures) -> str:
    """The figures of one output: "divergence 0.139 (95 % interval …), top-1 agreement 94 % (…)"."""
    text = f"divergence {output.divergence.number()}"
    if output.agreement is not None:
        text += f", {output.agreement_name} {agreement(output)}"
    return text


def agreement(output: OutputFigures) -> str:
    """The agreement as a share, or as a number where it is a mean of such."""
    found = output.agreement
    if found is None:
        return ""
    return found.number() if output.kind == "vectors" else found.percent()
