"""Layer by layer in the order of the graph: least squares on what the pruned network really sees.

A merge answers for one layer alone; errors of the layers before it remain and add up. Here each layer's
weights are fitted so that, on the inputs that the pruned network gives it, its output comes as near as
possible to the original's; where the output is added to a shortcut, the error that has come down the
shortcut is part of what it has to make up for. The solution is drawn towards the weights as they are
(not towards zero: that would shrink every output, and the shrinking compounds), and is kept only if it
brings the network's own output nearer to the original's on samples it was not fitted on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxcop._base.progress import Progress, silent
from onnxcop._base.types import Array, FloatArray
from onnxcop.reconstruction.divergence import Reference
from onnxcop.reconstruction.linear_layers import LinearNode, linear_node, rows_of
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.runtime.segments import PartialExecutor
from onnxcop.runtime.session import EngineOptions

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_ROWS_PER_FEATURE = 40
_MOST_ROWS = 40_000
_LARGEST = 4096  # features; a wider layer is left as it is


@dataclass(frozen=True)
class RefineSet:
    """Samples for refinement: the first batches fit, the others judge."""

    fit: Sequence[Mapping[str, Array]]
    judge: Sequence[Mapping[str, Array]]
    reference: Reference


@dataclass
class Refiner:
    """One pass over the network.

    Args:
        original: The network as it was.
        working: The pruned one; its weights change.
        samples: Samples to fit and judge on.
        options: How pieces are run.
        seed: Of the positions drawn from large maps.
    """

    original: MaskedNetwork
    working: MaskedNetwork
    samples: RefineSet
    options: EngineOptions
    seed: int = 0

    def run(self, progress: Progress = silent) -> tuple[int, int]:
        """Refine every layer that can be; returns how many were tried and how many were kept."""
        batches = [*self.samples.fit, *self.samples.judge]
        target = PartialExecutor(self.original.partition, batches, self.options)
        pruned = PartialExecutor(self.working.partition, batches, self.options)
        self._judge = PartialExecutor(self.working.partition, self.samples.judge, self.options)
        self._best = self.samples.reference.compare(self._judge.finish()).value
        nodes = [n for n in range(self.working.partition.count) if self._linear(n) is not None]
        kept = tried = 0
        for done, index in enumerate(nodes):
            node = self._linear(index)
            if node is None:
                continue
            target.advance(index)
            pruned.advance(index)
            self._judge.advance(index)
            if self._differs(target, pruned, node):
                tried += 1
                kept += self._refine(index, node, target, pruned)
            progress("refinement", done + 1, len(nodes))
        return tried, kept

    def _linear(self, index: int) -> LinearNode | None:
        found = linear_node(self.working, index)
        return found if found is not None and found.features <= _LARGEST else None

    def _differs(self, target: PartialExecutor, pruned: PartialExecutor, node: LinearNode) -> bool:
        """Whether anything that reaches this layer, or its own weights, is not as it was."""
        if not np.array_equal(self.original.read(node.weight), self.working.read(node.weight)):
            return True
        return any(
            not np.array_equal(one[node.data], two[node.data])
            for one, two in zip(target.states[:1], pruned.states[:1], strict=True)
        )

    def _refine(self, index: int, node: LinearNode, target: PartialExecutor, pruned: PartialExecutor) -> bool:
        """Fit one layer; returns whether the fit was kept."""
        rng = np.random.default_rng(self.seed + index)
        total = sum((shapes[node.data] or (1,))[0] for shapes in pruned.states.shapes())
        rows = min(_MOST_ROWS, _ROWS_PER_FEATURE * node.features + 2000)
        count = max(1, rows // max(total, 1))
        inputs, outputs = [], []
        for state, want in zip(pruned.states, self._targets(index, node, target, pruned), strict=True):
            a, b = rows_of(node, state[node.data], want, count, rng)
            inputs.append(a)
            outputs.append(b)
        split = len(self.samples.fit)
        fit_a, fit_b = np.concatenate(inputs[:split]), np.concatenate(outputs[:split])
        hold_a, hold_b = np.concatenate(inputs[split:]), np.concatenate(outputs[split:])
        saved = self._save(node)
        for weights, bias in candidates(node, self.working, (fit_a, fit_b), (hold_a, hold_b)):
            node.write(self.working, weights, bias)
            value = self.samples.reference.compare(self._judge.finish()).value
            if value < self._best:
                self._best = value
                return True
        for name, tensor in saved.items():
            self.working.partition.stored[name].CopyFrom(tensor)
        return False

    def _save(self, node: LinearNode) -> dict[str, onnx.TensorProto]:
        names = [node.weight, *([node.bias] if node.bias else [])]
        stored = self.working.partition.stored
        return {name: onnx.TensorProto.FromString(stored[name].SerializeToString()) for name in names}

    def _targets(
        self, index: int, node: LinearNode, target: PartialExecutor, pruned: PartialExecutor
    ) -> Iterator[Array]:
        """The original's output of each batch, plus what has gone wrong on the shortcut it is added to."""
        wanted = (found[node.output] for found in target.stream(node.stop, [node.output]))
        shortcut = shortcut_of(self.working, node, index)
        if shortcut is None:
            yield from wanted
            return
        mine, theirs = pruned.stream(index, [shortcut]), target.stream(index, [shortcut])
        for want, good, bad in zip(wanted, theirs, mine, strict=True):
            yield want + (good[shortcut] - bad[shortcut]) if good[shortcut].shape == want.shape else want


def shortcut_of(working: MaskedNetwork, node: LinearNode, index: int) -> str | None:
    """The other operand of the addition that alone reads a layer's output, if it is already known."""
    readers = [n for n in working.model.graph.node if node.output in n.input]
    if len(readers) != 1 or readers[0].op_type not in ("Add", "Sum") or len(readers[0].input) != 2:
        return None
    other = next((name for name in readers[0].input if name != node.output), None)
    if other is None or other in working.partition.constants:
        return None
    made = working.partition.maker.get(other, -1)
    return other if made < index and other in working.partition.crossing(index) else None


Rows = tuple[FloatArray, FloatArray]
Fit = tuple[FloatArray, FloatArray | None]


def candidates(node: LinearNode, working: MaskedNetwork, fit: Rows, hold: Rows) -> Iterator[Fit]:
    """Better weights for a layer, the boldest first: least squares, half of its step, matched moments."""
    weights, bias = node.read(working)
    found = solve(node, working, fit, hold)
    if found is not None:
        change, shift = found
        for share in (1.0, 0.5):
            yield weights + share * change, None if bias is None else bias + share * shift
    if bias is not None:
        yield matched_moments(weights, bias, fit)


def matched_moments(weights: FloatArray, bias: FloatArray, fit: Rows) -> tuple[FloatArray, FloatArray]:
    """Scale and shift every output so that its mean and deviation are the wanted ones.

    The re-estimation of normalization statistics, folded into the weights; as REPAIR (Jordan et al. 2023).
    """
    inputs, wanted = _by_group(fit[0]), _by_group(fit[1])
    found = inputs @ weights + bias[:, None, :]
    deviation = found.std(axis=1)
    scale = np.where(deviation > 1e-9, wanted.std(axis=1) / np.maximum(deviation, 1e-9), 1.0)
    scale = np.clip(scale, 0.5, 2.0)
    return weights * scale[:, None, :], wanted.mean(axis=1) - scale * (found - bias[:, None, :]).mean(axis=1)


def solve(node: LinearNode, working: MaskedNetwork, fit: Rows, hold: Rows) -> tuple[FloatArray, FloatArray] | None:
    """Ridge regression of the change of weights, per group, with λ chosen on held-out rows.

    Args:
        node: The layer.
        working: Its network.
        fit: Inputs [rows, groups, features] and wanted outputs [rows, groups, outputs].
        hold: The same of other samples, to choose λ on.

    Returns:
        The change of the weights [groups, features, outputs] and of the bias [groups, outputs], or None
        if none of them comes nearer on the held-out rows.
    """
    weights, bias = node.read(working)
    alive = node.alive_features(working)
    live_out = node.alive_outputs(working)
    fit_a, hold_a = _by_group(fit[0]), _by_group(hold[0])
    residual, hold_residual = _by_group(fit[1]) - fit_a @ weights, _by_group(hold[1]) - hold_a @ weights
    if bias is not None:
        residual -= bias[:, None, :]
        hold_residual -= bias[:, None, :]
    rows = fit_a.shape[1]
    mean_a, mean_b = fit_a.mean(axis=1), residual.mean(axis=1)
    if bias is None:
        mean_a, mean_b = np.zeros_like(mean_a), np.zeros_like(mean_b)
    centred = (fit_a - mean_a[:, None, :]) * alive
    gram = centred.transpose(0, 2, 1) @ centred / rows
    cross = centred.transpose(0, 2, 1) @ (residual - mean_b[:, None, :]) / rows
    trace = np.maximum(np.trace(gram, axis1=1, axis2=2) / max(int(alive.sum()), 1), 1e-12)
    wanted = live_out[:, None, :]
    before = float((hold_residual**2 * wanted).sum())
    eye = np.eye(gram.shape[1])
    best: tuple[float, FloatArray, FloatArray] | None = None
    for ridge in RIDGES:
        change = _positive_solve(gram + (ridge * trace)[:, None, None] * eye, cross) * alive[None, :, None]
        shift = mean_b - (mean_a[:, None, :] @ change)[:, 0]
        left = hold_residual - hold_a @ change - shift[:, None, :]
        error = float((left**2 * wanted).sum())
        if best is not None and error > best[0]:
            break  # past the minimum: more regularization only moves on towards no change
        best = (error, change, shift)
    if best is None or best[0] >= before:
        return None
    return best[1], best[2]


def _positive_solve(matrices: FloatArray, right: FloatArray) -> FloatArray:
    """Solve systems [groups, n, n] that are symmetric and positive definite."""
    from scipy.linalg import cho_factor, cho_solve

    if len(matrices) > 1:
        return np.asarray(np.linalg.solve(matrices, right))
    return np.asarray(cho_solve(cho_factor(matrices[0], lower=True, check_finite=False), right[0]))[None]


def _by_group(rows: FloatArray) -> FloatArray:
    """[rows, groups, n] as [groups, rows, n], so that every group is one matrix product."""
    return np.ascontiguousarray(rows.transpose(1, 0, 2))
