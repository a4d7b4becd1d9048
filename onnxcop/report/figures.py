"""Measured figures as text: the kind of every output, and its distance from the original's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxcop.outputs.intervals import Estimate
    from onnxcop.reconstruction.divergence import Figures, OutputFigures


def figure_lines(figures: Figures) -> Iterator[str]:
    """Two lines for every output, its kind and its figures; one more line on all outputs if there are several."""
    for output in figures.outputs:
        yield output.described
        yield f"  {figures_text(output)}"
    if len(figures.outputs) > 1:
        yield f"all outputs: divergence {figures.divergence.number()}"


def quality_of(figures: Figures | None) -> dict[str, float]:
    """The figures as plain numbers, by name; if there are several outputs, with the output's name."""
    if figures is None:
        return {}
    quality = {"divergence": figures.divergence.value}
    compared = [output for output in figures.outputs if output.agreement is not None]
    for output in compared:
        name = output.agreement_name if len(compared) == 1 else f"{output.agreement_name}, {output.outputs[0]}"
        if output.agreement is not None:
            quality[name] = output.agreement.value
    return quality


def figure_rows(figures: Figures | None) -> Iterator[tuple[str, str, bool]]:
    """The figures for a table: names, numbers with the ends of their intervals in brackets, and which the user is
    warned of."""
    if figures is None:
        return
    unnamed = any(output.warning and output.agreement is None for output in figures.outputs)
    yield "divergence", _bracketed(figures.divergence, 1.0, ""), unnamed
    compared = [output for output in figures.outputs if output.agreement is not None]
    for output in compared:
        name = output.agreement_name if len(compared) == 1 else f"{output.agreement_name}, {output.outputs[0]}"
        share = output.kind != "vectors"
        if output.agreement is not None:
            figure = _bracketed(output.agreement, 100.0 if share else 1.0, " %" if share else "")
            yield name, figure, bool(output.warning)


def _bracketed(estimate: Estimate, factor: float, unit: str) -> str:
    text = f"{factor * estimate.value:.4g}{unit}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({factor * estimate.low:.3g} to {factor * estimate.high:.3g})"


def figures_text(output: OutputFigures) -> str:
    """The figures of one output: "divergence 0.139 (95 % interval …), top-1 agreement 94 % (…)"."""
    text = f"divergence {output.divergence.number()}"
    if output.agreement is not None:
        text += f", {output.agreement_name} {agreement_text(output)}"
    return text


def agreement_text(output: OutputFigures) -> str:
    """The agreement as a share, or as a number if it is a mean."""
    agreement = output.agreement
    if agreement is None:
        return ""
    return agreement.number() if output.kind == "vectors" else agreement.percent()
