"""The cost of a model as a function of the remaining units: MACs, parameters, bytes.

Every cost is a sum of terms `scale × Π kept(axis)`, so the cost of any selection follows from how many indices each
axis keeps, without building the pruned model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxcop._base.types import FloatArray, IntArray
from onnxcop.analysis.time_model import TimeModel
from onnxcop.coupling.groups import Structure
from onnxcop.graph.serialize import file_size
from onnxcop.graph.subgraphs import Scopes

KINDS = ("macs", "params", "bytes")


@dataclass(frozen=True, slots=True)
class Term:
    """`scale[kind] × Π kept(axes)`: the arithmetic of one node or the storage of one tensor.

    Attributes:
        owner: Node index for arithmetic, tensor name for storage.
        scale: float64 [3], by `KINDS`.
        axes: Axis numbers; an axis may occur twice.
    """

    owner: int | str
    scale: FloatArray
    axes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Savings:
    """The savings from a group's units: its terms, in a layout that evaluates many counts at once.

    Attributes:
        axes: int64, all axes of the terms.
        times: int64, number of indices of each axis that a unit removes.
        factors: int64 [terms, factors], positions in `axes`; one beyond its end means 1.
        scales: float64 [terms, 3].
    """

    axes: IntArray
    times: IntArray
    factors: IntArray
    scales: FloatArray

    def of(self, kept: IntArray, counts: IntArray, block: int = 1) -> FloatArray:
        """Savings from removing so many more units, float64 [counts, 3].

        Args:
            kept: int64, how many indices every axis keeps.
            counts: int64, numbers of further units.
            block: Widths from here on count as the next multiple of it, as kernels compute them.
        """
        sizes = np.ones((1 + len(counts), len(self.axes) + 1))
        sizes[:, :-1] = kept[self.axes]
        sizes[1:, :-1] -= counts[:, None] * self.times
        sizes = np.where(sizes >= block, np.ceil(sizes / block) * block, sizes)
        products = sizes[:, self.factors].prod(axis=2)
        return np.asarray((products[0] - products[1:]) @ self.scales)

    def of_one(self, kept: IntArray) -> FloatArray:
        """Savings from removing one more unit, float64 [3], summed term by term, as :meth:`CostModel.change` does."""
        sizes = np.ones((2, len(self.axes) + 1))
        sizes[:, :-1] = kept[self.axes]
        sizes[1, :-1] -= self.times
        products = sizes[:, self.factors].prod(axis=2)
        return np.asarray(np.add.reduce(self.scales * (products[0] - products[1])[:, None], axis=0))


@dataclass(frozen=True, slots=True)
class CostModel:
    """The cost of a model under pruning.

    Attributes:
        terms: All terms.
        by_axis: For every axis the numbers of its terms.
        file_overhead: Bytes of the file outside the counted tensors.
        batch: Batch size of the inferred shapes; costs are per sample.
        times: The time of a run, if it is known.
    """

    structure: Structure
    terms: tuple[Term, ...]
    by_axis: tuple[tuple[int, ...], ...]
    file_overhead: int
    batch: float = 1.0
    times: TimeModel | None = None

    def at(self, kept: IntArray) -> FloatArray:
        """Cost, float64 [3], if axis a keeps `kept[a]` indices."""
        total = np.zeros(len(KINDS))
        for term in self.terms:
            total += term.scale * _product(term, kept)
        return total

    def by_node(self, kept: IntArray) -> dict[int, float]:
        """Multiply-accumulates of every node that has any, if axis a keeps `kept[a]` indices."""
        macs: dict[int, float] = {}
        for term in self.terms:
            if isinstance(term.owner, int):
                macs[term.owner] = macs.get(term.owner, 0.0) + float(term.scale[0]) * _product(term, kept)
        return macs

    def original(self) -> FloatArray:
        """Cost of the original, float64 [3]."""
        return self.at(self.structure.axis_sizes)

    def of_units(self, removed: IntArray) -> FloatArray:
        """Cost, float64 [3], without the given units."""
        return self.at(self.kept_counts(removed))

    def kept_counts(self, removed: IntArray) -> IntArray:
        """How many indices every axis keeps without the given units, int64 [axes]."""
        is_removed = np.zeros(self.structure.incidence.shape[0], dtype=np.int64)
        is_removed[removed] = 1
        kept: IntArray = self.structure.axis_sizes - self.structure.incidence.T @ is_removed
        return kept

    def shares(self, kept: IntArray) -> dict[int | str, FloatArray]:
        """Cost of every node's arithmetic and every stored tensor, float64 [3] by owner."""
        costs: dict[int | str, FloatArray] = {}
        for term in self.terms:
            costs[term.owner] = costs.get(term.owner, np.zeros(len(KINDS))) + term.scale * _product(term, kept)
        return costs

    def change(self, kept: IntArray, axes: IntArray, counts: IntArray) -> FloatArray:
        """Savings, float64 [3], from removing `counts[i]` more indices from `axes[i]`."""
        touched = sorted({term for axis in axes.tolist() for term in self.by_axis[axis]})
        after = kept.copy()
        after[axes] -= counts
        saved = np.zeros(len(KINDS))
        for number in touched:
            term = self.terms[number]
            saved += term.scale * (_product(term, kept) - _product(term, after))
        return saved

    def savings(self, axes: IntArray, times: IntArray) -> Savings:
        """Savings from units of which each removes `times[i]` indices from `axes[i]`."""
        touched = [self.terms[i] for i in sorted({term for axis in axes.tolist() for term in self.by_axis[axis]})]
        every = sorted({axis for term in touched for axis in term.axes} | set(axes.tolist()))
        place = {axis: number for number, axis in enumerate(every)}
        most = max((len(term.axes) for term in touched), default=0)
        factors = np.full((len(touched), most), len(every), dtype=np.int64)
        for row, term in enumerate(touched):
            factors[row, : len(term.axes)] = [place[axis] for axis in term.axes]
        leaving = dict(zip(axes.tolist(), times.tolist(), strict=True))
        return Savings(
            np.array(every, dtype=np.int64), np.array([leaving.get(axis, 0) for axis in every], dtype=np.int64),
            factors, np.array([term.scale for term in touched]).reshape(-1, len(KINDS)),
        )  # fmt: skip


def _product(term: Term, kept: IntArray) -> float:
    result = 1.0
    for axis in term.axes:
        result *= float(kept[axis])
    return result


def cost_model(model: onnx.ModelProto, structure: Structure) -> CostModel:
    """Derive the cost terms from a traced model."""
    coupling = structure.coupling
    batch = _batch(model, structure)
    terms = []
    for mac in coupling.findings.macs:
        axes = tuple(structure.axis_id(atoms) for atoms in mac.axes)
        terms.append(Term(mac.node, np.array([mac.scale / batch, 0.0, 0.0]), axes))
    stored = 0
    for name, dims, elem_type, is_weight in stored_tensors(model):
        label = coupling.labels.get(name) if name in coupling.constants else None
        axes_list: list[int] = []
        size = float(np.prod(dims, dtype=np.float64))
        for axis, atoms in enumerate(label or ()):
            if atoms is not None:
                axes_list.append(structure.axis_id(atoms))
                size /= dims[axis]
        width = _itemsize(elem_type)
        stored += int(np.prod(dims, dtype=np.int64) * width)
        terms.append(Term(name, np.array([0.0, size if is_weight else 0.0, size * width]), tuple(axes_list)))
    by_axis: list[list[int]] = [[] for _ in structure.axes]
    for number, term in enumerate(terms):
        for axis in set(term.axes):
            by_axis[axis].append(number)
    return CostModel(
        structure=structure,
        terms=tuple(terms),
        by_axis=tuple(map(tuple, by_axis)),
        file_overhead=max(0, file_size(model) - stored),
        batch=batch,
    )


def stored_tensors(model: onnx.ModelProto) -> Iterator[tuple[str, tuple[int, ...], int, bool]]:
    """Name, dims, element type of every stored tensor, and whether it holds weights (not sizes)."""
    scopes = Scopes.of(model)
    for scope in scopes.all:
        for tensor in scope.graph.initializer:
            yield tensor.name, tuple(tensor.dims), tensor.data_type, _is_weight(tensor)
    for node in scopes.nodes:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield node.output[0], tuple(attribute.t.dims), attribute.t.data_type, _is_weight(attribute.t)


def _is_weight(tensor: onnx.TensorProto) -> bool:
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
    small = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    return tensor.data_type in floats or (tensor.data_type in small and len(tensor.dims) > 1)


def _itemsize(elem_type: int) -> float:
    try:
        dtype: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(elem_type)
    except KeyError:
        return 1.0
    return float(dtype.itemsize) if dtype.kind != "O" else 1.0


def _batch(model: onnx.ModelProto, structure: Structure) -> float:
    """The batch size of the inferred shapes, so that MACs are per sample."""
    inner = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name not in inner:
            dims = value.type.tensor_type.shape.dim
            shape = structure.coupling.shapes[value.name].shape
            if shape and len(shape) > 1 and not dims[0].HasField("dim_value"):
                return float(max(shape[0], 1))
            return 1.0
    return 1.0
