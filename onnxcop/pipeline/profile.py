"""Times of a model on another device: what to time, the script that times it there, and the table in a time model."""

from __future__ import annotations

import ast
import inspect
import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from onnxcop._base.files import write_atomically
from onnxcop._base.progress import Progress, shown
from onnxcop._version import __version__
from onnxcop.allocation.budget import Budget
from onnxcop.allocation.limits import Limits
from onnxcop.allocation.rough import rough_choice, without
from onnxcop.analysis.analyze import Analysis
from onnxcop.analysis.kept_classes import ClassWish
from onnxcop.analysis.operators import reference
from onnxcop.analysis.time_model import TimeModel
from onnxcop.analysis.timing import modelled, points_of, timing_plans
from onnxcop.coupling.choices import Policy
from onnxcop.data.input_files import InputFiles
from onnxcop.errors import BudgetError, EngineError, ModelError, PlanMismatchError
from onnxcop.graph.check import tensors
from onnxcop.graph.io import weight_bytes
from onnxcop.parallel.crew import Crew, WorkerError
from onnxcop.parallel.workers import crew_for
from onnxcop.runtime import kernel_times, on_device, turns
from onnxcop.runtime.device_table import DeviceTable
from onnxcop.runtime.inputs import model_inputs
from onnxcop.runtime.session import LARGEST_IN_MEMORY, EngineOptions, providers_of
from onnxcop.runtime.staircase import Staircase, stair_models, target_named
from onnxcop.verification.kept_classes import analyze_kept

_GRID = Staircase(4, 16)  # widths at steps of every processor
_CUTS = (0.85, 0.65, 0.45, 0.25)  # shares of the multiply-accumulates of whole models to time
_LARGE = 64  # elements; smaller tensors may be sizes and thresholds, and keep their values
_FILLED = frozenset(
    (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
)
_BYTES = frozenset((onnx.TensorProto.INT8, onnx.TensorProto.UINT8))


def profile(
    model: onnx.ModelProto | str | Path, output: str | Path | None = None, *, options: EngineOptions | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None, policy: Policy = "finest",
    classes: str | Sequence[int | str] | None = None, keep_initializer_inputs: bool = False, target: str | None = None,
    seconds: float = on_device.USUAL_SECONDS, progress: Progress | bool | None = None,
    executor: Executor | None = None,
) -> DeviceTable:  # fmt: skip
    """Time a model's operators at many widths on this machine, to prune for it on another one.

    Args:
        model: A path or a model in memory (never changed).
        output: File for the table, None to write none.
        options: How to run models; the table is valid for their provider and threads.
        input_shapes: Concrete shapes for dynamic inputs.
        policy: "finest" coupling or "coarsest".
        classes: The classes that pruning will keep; see :class:`onnxcop.PruneOptions`.
        keep_initializer_inputs: Whether pruning will keep weights that are also inputs in the list of inputs.
        target: Device with the widths to time; None for widths of CPUs.
        seconds: Longest time for one cut of the whole model beside the original.
        progress: True for bars, or a function called with (stage, done, total).
        executor: An executor of :mod:`concurrent.futures` whose workers time, each with one thread unless `options` ask
            for more. They must be quiet machines of one kind, and one task at a time must run on each.

    Raises:
        WorkerError: Workers are of different kinds.
        OnnxcopError: The model cannot be read, has nothing to prune, or does not run, or the table cannot be written.
    """
    crew = crew_for(executor)
    engine = crew.engine(options or EngineOptions())
    if output is not None:  # before the time is spent
        InputFiles([model], others=engine.custom_ops).check(Path(output))
    providers = providers_of(engine)
    analysis = _timed_analysis(model, engine, input_shapes, policy, classes, keep_initializer_inputs)
    models = on_device.TimedSet(
        entries_of(analysis, policy, target), providers, engine.threads, libraries=engine.custom_ops, seconds=seconds
    )
    try:
        with shown(progress) as report:
            document = on_device.table_of(models, report, partial(_by_workers, crew))
    except WorkerError:
        raise
    except Exception as error:
        raise EngineError(f"the model could not be timed: {' '.join(str(error).split())[:300]}") from error
    if output is not None:
        write_atomically(Path(output), json.dumps(document, indent=1).encode())
    return DeviceTable.of(document, "the table" if output is None else str(output))


def _by_workers(crew: Crew, parts: Sequence[Any], models: on_device.TimedSet) -> Iterator[Any]:
    """What workers find for the parts of a table.

    Raises:
        WorkerError: They are machines of different kinds, with times that cannot be in one table.
    """
    first: tuple[str, dict[str, Any]] | None = None
    for host, (facts, found) in crew.run(_timed_at, parts, crew.share(models)):
        first = first or (host, facts)
        if facts != first[1]:
            differs = next(name for name in facts if facts[name] != first[1][name])
            raise WorkerError(
                f"the workers at {first[0]} and {host} are of different kinds ({differs}: {first[1][differs]}, "
                f"{facts[differs]}), and a table holds times of one; give --workers machines of one kind"
            )
        yield facts, found


def _timed_at(part: Any, models: on_device.TimedSet) -> tuple[str, Any]:
    """The name of this machine, and what it finds for a part of a table."""
    return platform.node(), on_device.timed_part(part, models)


def profile_script(
    model: onnx.ModelProto | str | Path, *, options: EngineOptions | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None, policy: Policy = "finest",
    classes: str | Sequence[int | str] | None = None, keep_initializer_inputs: bool = False, target: str | None = None,
) -> str:  # fmt: skip
    """A Python script that times a model on a device with ONNX Runtime and NumPy, and writes a table.

    Its arguments are those of :func:`profile`; `options` say how to run the model here if shapes cannot be inferred.

    Raises:
        OnnxcopError: The model cannot be read, or has nothing to prune.
    """
    engine = options or EngineOptions()
    analysis = _timed_analysis(model, engine, input_shapes, policy, classes, keep_initializer_inputs)
    text = entries_of(analysis, policy, target)
    name = "a model" if isinstance(model, onnx.ModelProto) else Path(model).name
    head = (
        f'"""Times {name} on this device; written by onnxcop {__version__}.\n\n'
        "    python FILE -o TABLE.json\n\n"
        "It needs NumPy and ONNX Runtime. Then, on the machine that has onnxcop:\n\n"
        '    onnxcop MODEL -o OUT --latency 0.7 --latency-table TABLE.json\n"""\n\n'
        "from __future__ import annotations\n"
    )
    parts = [_body(module) for module in (kernel_times, turns, on_device)]
    end = f'PACKED = """\n{text}\n"""\n\nif __name__ == "__main__":\n    sys.exit(run_script(PACKED))\n'
    return "\n\n".join([head.replace(name, name.replace("\\", "/").replace('"', "'")), *parts, end])


def _timed_analysis(
    model: onnx.ModelProto | str | Path, options: EngineOptions, input_shapes: Mapping[str, Sequence[int]] | None,
    policy: Policy, classes: str | Sequence[int | str] | None, keep_initializer_inputs: bool,
) -> Analysis:  # fmt: skip
    """The analysis of a model to time, as pruning makes it."""
    analysis = analyze_kept(
        model, None if classes is None else ClassWish.of(classes), input_shapes=input_shapes, policy=policy,
        options=options, biases=True, keep_initializer_inputs=keep_initializer_inputs,
    )  # fmt: skip
    if not len(analysis.structure.unit_class):
        raise BudgetError(f"{analysis.source} has nothing to prune, so there is nothing to time; see `onnxcop inspect`")
    return analysis


def entries_of(analysis: Analysis, policy: Policy, target: str | None) -> str:
    """Everything to time of a model, as text; see :func:`onnxcop.runtime.on_device.packed`."""
    grid = _GRID if target is None else target_named(target).staircase
    if weight_bytes(analysis.model) > LARGEST_IN_MEMORY:
        raise ModelError(f"{analysis.source} is too large to be timed on another device: its weights take 2 GB or more")
    blobs: list[bytes] = []

    def place(content: bytes) -> int:
        blobs.append(content)
        return len(blobs) - 1

    points = points_of(timing_plans(analysis, grid))
    first = next(iter(points.values()))[0]
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in first.opset]
    header = {
        "onnxcop": __version__, "grid": {"fine": grid.fine, "block": grid.block},
        "model": {
            "name": Path(analysis.source).name, "sha256": analysis.sha256, "policy": policy,
            "input_shapes": {name: list(sizes) for name, sizes in analysis.input_shapes.items()},
        },
        "axes": analysis.structure.axis_sizes.tolist(),
        "inputs": [
            (one.name, str(onnx.helper.tensor_dtype_to_np_dtype(one.type.tensor_type.elem_type)),
             list(analysis.input_shapes[one.name]))
            for one in model_inputs(analysis.model)
        ],
        "imports": place(onnx.ModelProto(ir_version=8, opset_import=imports).SerializeToString()),
        "reference": place(onnx.ModelProto(graph=reference()).SerializeToString()),
        "stairs": {kind: [place(one.SerializeToString()) for one in every] for kind, every in stair_models().items()},
        "operators": {
            key: place(onnx.ModelProto(graph=operator.small_model(point, len(blobs))).SerializeToString())
            for key, (operator, point) in sorted(points.items())
        },
        "original": place(plain(analysis.model)),
        "cuts": [
            {"kept": kept, "model": place(model)} for kept, model in _cuts(analysis, Limits(staircase=grid))
        ],
    }  # fmt: skip
    return on_device.packed(header, blobs)


def _cuts(analysis: Analysis, limits: Limits) -> list[tuple[list[int], bytes]]:
    """A few cuts of the whole model: how many indices each axis keeps, and the model."""
    cuts: list[tuple[list[int], bytes]] = []
    for macs in _CUTS:
        try:
            removed = rough_choice(analysis, Budget(macs=macs), limits)
        except BudgetError:  # so much cannot be removed
            break
        kept = analysis.cost.kept_counts(removed).tolist()
        if not any(kept == other for other, _ in cuts):
            cuts.append((kept, plain(without(analysis, removed))))
    return cuts


def plain(model: onnx.ModelProto) -> bytes:
    """A serialized model with constant weights: it takes the same time and compresses well.

    Activations stay of the size of the inputs: weights are averages, other tensors are near 1.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for place, tensor in enumerate(tensors(copy.graph)):
        size, rank = int(np.prod(tensor.dims, dtype=np.int64)), len(tensor.dims)
        if size <= _LARGE or not (tensor.data_type in _FILLED or (tensor.data_type in _BYTES and rank > 1)):
            continue
        value = 1.0 if tensor.data_type in _BYTES else (1.0 + 1e-3 * place) / float(np.prod(tensor.dims[1:]))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        filled = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        filled.raw_data = np.full(size, value, dtype).tobytes()
        tensor.CopyFrom(filled)
    return bytes(copy.SerializeToString())


def _body(module: ModuleType) -> str:
    """The source of a module for the script, without package imports and parts that the script already has."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and re.match(r"(onnxcop|__future__)\b", node.module or ""):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip()


def times_from(table: DeviceTable, analysis: Analysis, policy: str) -> TimeModel:
    """The time model of an analysed model from the table of a device.

    Raises:
        PlanMismatchError: The table is of another model, or of another version of the package.
    """
    again = f"run `onnxcop profile {analysis.source}{_flags(analysis)}` on the device"
    table.check(analysis.sha256, analysis.input_shapes, policy, analysis.structure.axis_sizes.tolist(), again)
    plans = timing_plans(analysis, table.grid)
    lacking = sum(key not in table.operators for plan in plans for key in plan.keys)
    if lacking:
        other = table.onnxcop != __version__
        why = f": it was made by onnxcop {table.onnxcop}, this is {__version__}" if other else ""
        raise PlanMismatchError(f"{table.source} lacks the times of {lacking} operators{why}; {again}")
    times = modelled(analysis, plans, table.operators, (table.staircase or table.grid).block)
    times.fit([np.array(cut.kept, np.int64) for cut in table.cuts], [cut.ratio for cut in table.cuts])
    return times


def _flags(analysis: Analysis) -> str:
    """Options of `profile` without which a table does not fit an analysis."""
    kept = analysis.kept
    classes = "" if kept is None else f" --classes {kept.output}:{','.join(map(str, kept.kept))}"
    weights = {tensor.name for tensor in analysis.model.graph.initializer}
    listed = any(one.name in weights for one in analysis.model.graph.input)
    return classes + (" --keep-initializer-inputs" if listed else "")
