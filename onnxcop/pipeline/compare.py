"""Comparison of two models: cost, latency, and agreement of their outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcop._base.keywords import by_keywords
from onnxcop._base.progress import Progress, shown
from onnxcop.analysis.analyze import Analysis, analyze
from onnxcop.analysis.census import census
from onnxcop.analysis.summary import Totals, totals
from onnxcop.data.open import input_specs, open_data
from onnxcop.data.options import DataOptions
from onnxcop.data.synthetic import synthetic_data
from onnxcop.errors import EngineError, ModelError
from onnxcop.graph import io as models
from onnxcop.outputs.tasks import Task
from onnxcop.parallel.workers import crew_for
from onnxcop.runtime.inputs import model_inputs
from onnxcop.runtime.latency import DEFAULT_SECONDS, Latency, measure_times
from onnxcop.runtime.session import EngineOptions
from onnxcop.verification.agreement import Agreement, agreement, paired

_SYNTHETIC = 32  # samples if no data are given
_REAL = {np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)}  # types that may replace one another


@dataclass(frozen=True, slots=True)
class OperatorCost:
    """Total cost of all nodes of one operator.

    Attributes:
        nodes: Number of nodes at the top level of the graph.
        macs: Their multiply-accumulates per sample.
    """

    nodes: int
    macs: float


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two models.

    Attributes:
        model: Path or description.
        cost: Its cost.
        filters: Number of filters in all layers.
        operators: Cost by operator.
    """

    model: str
    cost: Totals
    filters: int
    operators: Mapping[str, OperatorCost]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of a comparison.

    Attributes:
        a: The first one.
        b: The second one.
        latency: Latency of both, if both run.
        agreement: Agreement of the outputs of `b` with those of `a`, if both take the same inputs.
        data: The data on which outputs were compared.
        notes: What could not be compared, and why.
    """

    a: Side
    b: Side
    latency: Latency | None
    agreement: Agreement | None
    data: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions(DataOptions):
    """Options of a comparison.

    Attributes:
        input_shapes: Concrete shapes for dynamic inputs.
        options: How to run models; None for the best provider of this machine.
        latency_seconds: How long to measure latency; 0 to skip it.
        task: Task of the models, one of :data:`onnxcop.outputs.tasks.TASKS`; None to decide by evidence.
        progress: True for bars (on a terminal or in a notebook), or a function called with (stage, done, total).
        executor: An executor of :mod:`concurrent.futures` for the batches; results are the same whatever it is, and as
            without one. Latency is measured in this process.
    """

    input_shapes: Mapping[str, Sequence[int]] | None = None
    options: EngineOptions | None = None
    latency_seconds: float = DEFAULT_SECONDS
    task: Task | None = None
    progress: Progress | bool | None = None
    executor: Executor | None = None


@by_keywords(CompareOptions)
def compare(a: onnx.ModelProto | str | Path, b: onnx.ModelProto | str | Path, options: CompareOptions) -> Comparison:
    """Compare two models.

    Args:
        a: The reference: a path, or a model in memory.
        b: The other model.
        options: The fields of :class:`CompareOptions`, as keyword arguments; outputs are compared on the data.

    Raises:
        OnnxcopError: A model or the data cannot be read.
    """
    engine = options.options or EngineOptions()
    first = analyze(a, input_shapes=options.input_shapes, options=engine)
    other = models.load(b)
    pairs = paired(*([value.name for value in model_inputs(model)] for model in (first.original, other)))
    shapes = {theirs: first.input_shapes[ours] for ours, theirs in pairs.items()}
    try:
        second = analyze(other, input_shapes=shapes, options=engine)
    except ModelError:  # the data do not fit the model
        second = analyze(other, options=engine)
    notes = _differences(first, second, pairs)
    found, where = None, ""
    if not notes:
        outputs = paired(*([value.name for value in side.original.graph.output] for side in (first, second)))
        notes = [*_casts(first, second, pairs), *_unpaired(first, second, outputs)]
        source = open_data(first, options, options.input_shapes)
        where = (
            "synthetic inputs, which say little about real data: give --data" if source is None else source.description
        )
        source = source or synthetic_data(first, _SYNTHETIC, options.batch_size, options.seed)
        with shown(options.progress) as progress:
            found = agreement(
                first.original, second.original, source, pairs, outputs, engine, progress=progress, task=options.task,
                crew=crew_for(options.executor),
            )  # fmt: skip
    latency = None
    if options.latency_seconds > 0:
        try:
            latency = _timed(first, second, engine, options.latency_seconds)
        except (EngineError, ModelError) as error:
            notes.append(f"latency could not be measured: {error}")
    names = [
        str(side) if not isinstance(side, onnx.ModelProto) else f"model {letter}"
        for side, letter in ((a, "A"), (b, "B"))
    ]
    return Comparison(
        a=_side(first, names[0]),
        b=_side(second, names[1]),
        latency=latency,
        agreement=found,
        data=where,
        notes=tuple(notes),
    )


def _differences(a: Analysis, b: Analysis, pairs: Mapping[str, str]) -> list[str]:
    """Explain why one model cannot be fed with the inputs of the other."""
    one, two = ({spec.name: spec for spec in input_specs(side)} for side in (a, b))
    same = len(pairs) == len(one) == len(two) and all(
        (one[name].dtype == two[other].dtype or {one[name].dtype, two[other].dtype} <= _REAL)
        and a.input_shapes[name] == b.input_shapes[other]
        for name, other in pairs.items()
    )
    if same:
        return []
    listed = ("; ".join(map(str, specs.values())) for specs in (one, two))
    return ["outputs are not compared, since the inputs differ: " + " beside ".join(listed)]


def _casts(a: Analysis, b: Analysis, pairs: Mapping[str, str]) -> Iterator[str]:
    """Inputs that the two models take in different precisions."""
    one, two = ({spec.name: spec.dtype for spec in input_specs(side)} for side in (a, b))
    for name, other in pairs.items():
        if one[name] != two[other]:
            yield f"input {name!r} is {one[name]} in A and {two[other]} in B: both are given the same numbers, rounded"


def _unpaired(a: Analysis, b: Analysis, outputs: Mapping[str, str]) -> list[str]:
    notes = [
        f"output {name!r} of A is compared with {other!r} of B" for name, other in outputs.items() if name != other
    ]
    for side, names in (("A", list(outputs)), ("B", list(outputs.values()))):
        model = (a if side == "A" else b).original
        notes += [
            f"output {value.name!r} is in {side} alone" for value in model.graph.output if value.name not in names
        ]
    return notes


def _timed(a: Analysis, b: Analysis, options: EngineOptions, seconds: float) -> Latency:
    feeds = [side.timing_feed() for side in (a, b)]
    return measure_times([a.original, b.original], feeds, options, seconds=seconds).latency(1)


def _side(analysis: Analysis, name: str) -> Side:
    macs: dict[str, float] = {}
    sizes = analysis.structure.axis_sizes
    for owner, cost in analysis.cost.by_node(sizes).items():
        operator = analysis.nodes[owner].op_type
        macs[operator] = macs.get(operator, 0.0) + cost
    nodes = Counter(node.op_type for node in analysis.original.graph.node)
    operators = {name: OperatorCost(count, macs.get(name, 0.0)) for name, count in nodes.items()}
    ordered = sorted(operators.items(), key=lambda item: (-item[1].macs, -item[1].nodes, item[0]))
    return Side(
        name,
        totals(analysis.original, float(analysis.cost.original()[0])),
        sum(layer.filters for layer in census(analysis)),
        dict(ordered),
    )
