"""Running a model in pieces, so that everything before a change is computed only once.

The graph is cut between nodes. The tensors that cross a cut (the live tensors) are kept batch by batch. The rest of the
network then runs from there, once for every variant to try. On a graphics processor they stay in its memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import onnx

from onnxcop._base.types import Array, Feed
from onnxcop.graph.edit import copied, replace_all
from onnxcop.graph.io import WeightFile, weight_bytes
from onnxcop.graph.serialize import serialized
from onnxcop.graph.shapes import ShapeMap
from onnxcop.graph.subgraphs import captured, graphs_of, initializers_are_inputs
from onnxcop.runtime.bound import DeviceTensor, ResidentPieces, RunPiece, device_of, on_host
from onnxcop.runtime.session import EngineOptions, Session
from onnxcop.runtime.states import LiveTensors

_STRING = onnx.TensorProto.STRING
_KEPT = 1 << 30  # bytes in files
_EACH = 8  # a cut may use at most this share of the remaining bytes: late cuts are narrow and save the most
LARGEST_COPIED = 256 * 2**20  # bytes of weights; pieces of a larger model map them from a file


@dataclass(frozen=True, slots=True)
class Replacement:
    """Nodes that replace one node: they make the same tensors from the same inputs and from tensors of their own."""

    nodes: tuple[onnx.NodeProto, ...]
    tensors: tuple[onnx.TensorProto, ...]


Replaced = Callable[[Sequence[int]], Mapping[int, Replacement]]


def _as_they_are(_: Sequence[int]) -> Mapping[int, Replacement]:
    return {}


class GraphPartition:
    """The live tensors at every cut of a graph, and models of the pieces between cuts.

    Args:
        model: The model whose graph is cut. Weights are read when a piece is made, so a change in place affects later
            pieces.
        shapes: Element types and ranks of its tensors.
        constants: Names of tensors that are computed from weights alone; every piece computes its own.
        replaced: Called when a piece is made; returns replacements of nodes by position. Tensors of the same name are
            the same. Other nodes stay.
    """

    def __init__(
        self, model: onnx.ModelProto, shapes: ShapeMap, constants: Iterable[str],
        replaced: Replaced = _as_they_are,
    ) -> None:  # fmt: skip
        self.model = model
        self.replaced = replaced
        self.resident: dict[EngineOptions, ResidentPieces] = {}
        self.shapes = shapes
        graph = model.graph
        self.count = len(graph.node)
        self._weights = WeightFile.of(model) or (WeightFile() if weight_bytes(model) > LARGEST_COPIED else None)
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.stored |= _inner_tensors(graph)
        self.constants = set(constants) | set(self.stored)
        self.reads = [[n for n in node.input if n] + sorted(captured(node)) for node in graph.node]
        self.maker = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
        self.outputs = [value.name for value in graph.output]
        self.inputs = [value.name for value in graph.input if value.name not in self.stored]
        self._last_use: dict[str, int] = {name: self.count for name in self.outputs}
        for index, names in enumerate(self.reads):
            for name in names:
                self._last_use[name] = max(self._last_use.get(name, -1), index)

    def crossing(self, cut: int) -> list[str]:
        """Tensors made before node `cut` (or fed) and read at or after it."""
        names = [
            name
            for name, index in self.maker.items()
            if index < cut <= self._last_use.get(name, -1) and name not in self.constants
        ]
        return [n for n in self.inputs if self._last_use.get(n, -1) >= cut] + names

    def piece(
        self, start: int, stop: int, outputs: Sequence[str], sizes: Mapping[str, Sequence[int | None]] | None = None
    ) -> onnx.ModelProto | None:
        """The nodes `start` to `stop` that `outputs` need, as a model; None if it has no node.

        Args:
            start: The first node.
            stop: The node after the last.
            outputs: Outputs of the model.
            sizes: Known sizes of its inputs, by name.
        """
        open_tensors, chosen = set(outputs), []
        for index in reversed(range(start, stop)):
            node = self.model.graph.node[index]
            if any(name in open_tensors for name in node.output):
                chosen.append(index)
                open_tensors.update(self.reads[index])
        if not chosen:
            return None
        chosen = sorted(set(chosen) | self._constant_makers(open_tensors, start))
        piece = onnx.ModelProto(ir_version=self.model.ir_version)
        piece.opset_import.extend(self.model.opset_import)
        graph = piece.graph
        graph.name = "piece"
        replacements = self.replaced(chosen)
        for index in chosen:
            graph.node.extend(replacements[index].nodes if index in replacements else [self.model.graph.node[index]])
        graph.initializer.extend(self.held(tensor) for tensor in _tensors(replacements))
        made = {name for node in graph.node for name in node.output} | {t.name for t in graph.initializer}
        needed = {name for node in graph.node for name in (*node.input, *captured(node)) if name}
        graph.initializer.extend(self.held(self.stored[name]) for name in sorted(needed) if name in self.stored)
        for name in sorted(needed - made - self.stored.keys()):
            graph.input.append(self._value_info(name, None if sizes is None else sizes.get(name)))
        for name in outputs:
            if name in made:
                graph.output.append(self._value_info(name))
        return piece

    def whole(self, base: onnx.ModelProto | None = None) -> onnx.ModelProto:
        """The whole model with its nodes replaced.

        Args:
            base: A copy of the model with more nodes after its own; by default the model itself.
        """
        result = copied(base or self.model)
        replacements = self.replaced(range(self.count))
        if not replacements:
            return result
        nodes: list[onnx.NodeProto] = []
        for index, node in enumerate(result.graph.node):
            own = (copied(node),)
            nodes += replacements[index].nodes if index in replacements else own
        replace_all(result.graph.node, nodes)
        for tensor in _tensors(replacements):
            result.graph.initializer.append(self.held(tensor))
            if initializers_are_inputs(result):
                value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                result.graph.input.append(value)
        return result

    def held(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """A tensor as pieces store it: if the model is large, in a file that all pieces share."""
        return tensor if self._weights is None else self._weights.detach(tensor)

    def light(self) -> onnx.ModelProto:
        """The current model; if its weights are large, a copy that stores them in the file of the pieces."""
        return self.model if self._weights is None else self._weights.light(self.model, inner=False)

    @property
    def shares_weights(self) -> bool:
        """Whether pieces read their weights from a file, because the model is large."""
        return self._weights is not None

    def _constant_makers(self, needed: set[str], start: int) -> set[int]:
        """Nodes before `start` that compute constants which a piece needs."""
        makers: set[int] = set()
        pending = [name for name in needed if name in self.constants and self.maker.get(name, start) < start]
        while pending:
            index = self.maker.get(pending.pop(), -1)
            if index >= 0 and index not in makers:
                makers.add(index)
                pending += [n for n in self.reads[index] if n not in self.stored]
        return makers

    def _value_info(self, name: str, sizes: Sequence[int | None] | None = None) -> onnx.ValueInfoProto:
        info = self.shapes[name]
        if sizes is None and info.shape is not None:
            sizes = [None] * len(info.shape)
        return onnx.helper.make_tensor_value_info(name, info.elem_type, sizes)


def _tensors(replacements: Mapping[int, Replacement]) -> list[onnx.TensorProto]:
    """Tensors of replacement nodes, each once."""
    return list(
        {tensor.name: tensor for replacement in replacements.values() for tensor in replacement.tensors}.values()
    )


def _in_plain_tensors(piece: onnx.ModelProto) -> bool:
    """Whether a piece takes and returns nothing but numbers, which can be on a device."""
    values = (*piece.graph.input, *piece.graph.output)
    return all(v.type.HasField("tensor_type") and v.type.tensor_type.elem_type != _STRING for v in values)


def _inner_tensors(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Tensors stored in bodies of control flow, by name; pieces keep them there."""
    tensors: dict[str, onnx.TensorProto] = {}
    for body in (body for node in graph.node for body in graphs_of(node)):
        tensors |= {tensor.name: tensor for tensor in body.initializer}
        for node in body.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                tensors[node.output[0]] = node.attribute[0].t
        tensors |= _inner_tensors(body)
    return tensors


def common_sizes(shapes: Sequence[Mapping[str, tuple[int, ...] | None]]) -> dict[str, list[int | None]]:
    """Sizes of tensors that are the same in all batches, by name.

    Declared sizes save ONNX Runtime from inferring shapes of unknown sizes, which it does not always do correctly.
    """
    fixed: dict[str, list[int | None]] = {}
    for name in shapes[0] if shapes else ():
        known = [batch[name] for batch in shapes]
        same = [shape for shape in known if shape is not None]
        if len(same) == len(known) and all(len(shape) == len(same[0]) for shape in same):
            fixed[name] = [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*same, strict=True)]
    return fixed


class PartialExecutor:
    """The live tensors of one network at cuts that move forward.

    Every batch has its own cut. A batch that is not needed stays at its cut, and later moves forward in one step.

    Args:
        partition: The network.
        feeds: Batches of tensors that cross the first cut: of inputs if it is 0.
        options: How to run pieces.
        cut: The first cut.
    """

    def __init__(
        self, partition: GraphPartition, feeds: Sequence[Mapping[str, Array]], options: EngineOptions, cut: int = 0
    ) -> None:
        self.partition, self.options = partition, options
        self.device = device_of(options)
        self.states = LiveTensors(feeds)
        self.cuts = [cut] * len(self.states)
        self._last: tuple[bytes, Session] | None = None  # the piece that was streamed last

    @property
    def cut(self) -> int:
        """The cut of the most advanced batch."""
        return max(self.cuts, default=0)

    def stream(self, stop: int, names: Sequence[str], places: Sequence[int] | None = None) -> Iterator[Feed]:
        """Values of tensors made before node `stop`, batch by batch, without moving a cut.

        Args:
            stop: The node.
            names: Names of the tensors.
            places: Indices of batches, in this order; by default all.
        """
        every = range(len(self.states)) if places is None else places
        for live in self._streamed(self.partition, stop, names, every, keep=True):
            yield {name: on_host(value) for name, value in live.items()}

    def _streamed(
        self, partition: GraphPartition, stop: int, names: Sequence[str], places: Sequence[int],
        stay: Collection[str] = (), alike: Sequence[int] | None = None, *, keep: bool = False,
    ) -> Generator[dict[str, Array | DeviceTensor]]:  # fmt: skip
        for cut, group in groupby(places, lambda place: self.cuts[place]):
            together = list(group)
            yield from self._run(partition, (cut, stop), names, together, stay, alike=alike or together, keep=keep)

    def _run(
        self, partition: GraphPartition, nodes: tuple[int, int], names: Sequence[str], places: Sequence[int],
        stay: Collection[str], *, alike: Sequence[int], keep: bool,
    ) -> Iterator[dict[str, Array | DeviceTensor]]:  # fmt: skip
        """Run nodes, from the first to after the last, on the live tensors of batches whose cut is at the first.

        What is already on a device, and the outputs `stay`, are not copied from it. Sizes that the batches `alike` have
        in common are declared.
        """
        piece = partition.piece(*nodes, names, common_sizes([self.states.shape_of(place) for place in alike]))
        if piece is None:
            for place in places:
                state = self.states.live(place)
                yield {name: state[name] for name in names}
            return
        inputs = [value.name for value in piece.graph.input]
        made = [value.name for value in piece.graph.output]
        with self._loaded(partition, piece, keep) as run:
            del piece
            for place in places:
                state = self.states.live(place)
                outputs = run({name: state[name] for name in inputs}, made, stay)
                yield {name: outputs[name] if name in outputs else state[name] for name in names}

    @contextmanager
    def _loaded(self, partition: GraphPartition, piece: onnx.ModelProto, keep: bool) -> Iterator[RunPiece]:
        """A function that runs a piece: feeds, names of outputs, and those that stay on the device."""
        if self.device is not None and _in_plain_tensors(piece):
            pieces = partition.resident.get(self.options)
            if pieces is None:
                pieces = partition.resident[self.options] = ResidentPieces(self.options, self.device)
            yield pieces.loaded(piece)
            return
        if keep and not partition.shares_weights:
            yield _of_arrays(self._same_or_new(serialized(piece)))
            return
        with Session(piece, self.options, passing=True) as session:
            yield _of_arrays(session)

    def _same_or_new(self, piece: bytes) -> Session:
        """A session of a piece: the last one, if the piece is the same."""
        if self._last is None or self._last[0] != piece:
            if self._last is not None:
                self._last[1].close()
            self._last = piece, Session(piece, self.options, passing=True)
        return self._last[1]

    def advance(self, cut: int, extra: Sequence[str] = (), places: Sequence[int] | None = None) -> list[Feed]:
        """Move the cut to just before node `cut`; return the `extra` tensors computed on the way.

        Args:
            cut: The node.
            extra: Names of tensors.
            places: Indices of batches; by default all.
        """
        chosen = range(len(self.states)) if places is None else places
        for place in chosen:
            if cut < self.cuts[place]:
                raise ValueError(f"cannot roll back from {self.cuts[place]} to {cut}")
        if not extra:
            chosen = [place for place in chosen if self.cuts[place] < cut]
        crossing = self.partition.crossing(cut)
        names = list(dict.fromkeys([*crossing, *extra]))
        extras = []
        for place, result in zip(chosen, self._streamed(self.partition, cut, names, chosen, crossing), strict=True):
            self.states.replace(place, {name: result[name] for name in crossing})
            extras.append({name: on_host(result[name]) for name in extra})
        for place in chosen:
            self.cuts[place] = cut
        return extras

    def finishing(
        self, partition: GraphPartition | None = None, places: Sequence[int] | None = None,
        alike: Sequence[int] | None = None,
    ) -> Generator[Feed]:  # fmt: skip
        """Run from the cut to the end, one batch at a time.

        Args:
            partition: A variant of the network, equal up to the cut.
            places: Indices of batches, in this order; by default all.
            alike: Indices of batches at the same cut, whose common sizes are declared. By default `places`.
        """
        chosen = partition or self.partition
        every = range(len(self.states)) if places is None else places
        for live in self._streamed(chosen, chosen.count, chosen.outputs, every, alike=alike):
            yield {name: on_host(value) for name, value in live.items()}

    def rest(self, places: Sequence[int]) -> onnx.ModelProto | None:
        """The piece from the cut of some batches to the end; None if there is none, or cuts differ, or it is large."""
        cuts = {self.cuts[place] for place in places}
        if len(cuts) != 1 or self.partition.shares_weights:
            return None
        sizes = common_sizes([self.states.shape_of(place) for place in places])
        return self.partition.piece(cuts.pop(), self.partition.count, self.partition.outputs, sizes)

    def finish(self, partition: GraphPartition | None = None) -> list[Feed]:
        """The same for all batches at once."""
        return list(self.finishing(partition))


def _of_arrays(session: Session) -> RunPiece:
    """A session as a function that takes and returns arrays."""
    return lambda feeds, outputs, _: session.run({name: on_host(value) for name, value in feeds.items()}, outputs)


class Prefixes:
    """The live tensors of one network at any cut, kept in files between passes over it.

    A pass that tries variants at one cut after another computes everything before each cut. The next pass starts from
    the last kept cut before the one that it needs, instead of computing the same again.

    Args:
        partition: The network; kept tensors are valid while neither its weights nor its units change.
        feeds: Batches of inputs.
        options: How to run pieces.
        limit: Bytes that may be kept in files.
        cuts: Cuts on the way at which pieces end. Then the tensors at a cut do not depend, by rounding, on which cuts
            were asked for before.
    """

    def __init__(
        self, partition: GraphPartition, feeds: Sequence[Mapping[str, Array]], options: EngineOptions,
        limit: int = _KEPT, cuts: Iterable[int] = (),
    ) -> None:  # fmt: skip
        self._stops = sorted(set(cuts))
        self._partition, self._options = partition, options
        self._left = limit
        self._kept: dict[int, Sequence[Mapping[str, Array]]] = {0: feeds}
        self._executor = PartialExecutor(partition, feeds, options)

    def at(self, cut: int) -> PartialExecutor:
        """An executor at a cut, to run variants from; the caller owns it until the next call."""
        cuts = sorted(self._kept)
        nearest = cuts[bisect_right(cuts, cut) - 1]
        if not self._executor.cut <= cut or self._executor.cut < nearest:
            self._executor = PartialExecutor(self._partition, self._kept[nearest], self._options, nearest)
        for stop in (stop for stop in self._stops if self._executor.cut < stop < cut):
            self._executor.advance(stop)
        self._executor.advance(cut)
        if cut not in self._kept:
            self._keep(cut)
        return self._executor

    def _keep(self, cut: int) -> None:
        size = self._executor.states.nbytes
        if 0 < size <= self._left // _EACH:
            self._kept[cut] = LiveTensors.holding(self._executor.states, limit=0)
            self._left -= size
