"""Back to PyTorch: the state dict of an exported model, cut as a plan cut the ONNX model.

Stored tensors of the ONNX model are found in the state dict by name, by value, transposed (Linear layers), or scaled
channel by channel (a BatchNorm that the exporter folded into the convolution before it). Slicing a state dict does not
need PyTorch itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcop._base.types import Array, FloatArray, IntArray
from onnxcop.analysis.analyze import analyze
from onnxcop.errors import PlanMismatchError
from onnxcop.graph import io as models
from onnxcop.graph.constants import constant_tensors
from onnxcop.graph.subgraphs import Scopes
from onnxcop.graph.traits import Trait, traits
from onnxcop.rewrite.blocks import emptied
from onnxcop.rewrite.plan import PruningPlan, units_of
from onnxcop.rewrite.sizes import kept_by_axis, kept_positions

_CLOSE = 1e-4  # relative difference of weights that are equal up to rounding
_EPSILONS = (1e-5, 1e-3, 1e-6, 1e-4, 1e-8, 0.0)  # common values of BatchNorm


@dataclass(frozen=True, slots=True)
class TorchState:
    """A state dict after a plan.

    Attributes:
        state: All entries of the state dict, sliced if they lose channels.
        placed: The matching entry, by name of the ONNX tensor.
        unplaced: Descriptions of cut tensors without a matching entry; with any of these, the state is inconsistent.
    """

    state: dict[str, Any]
    placed: Mapping[str, str]
    unplaced: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Match:
    """The entry of the state dict that matches a stored tensor of the model.

    Attributes:
        key: The entry.
        axes: For every axis of the ONNX tensor, the axis of the entry.
        epsilon: Epsilon of the BatchNorm that was folded into the tensor; None without one.
        norm: Entries of that BatchNorm.
    """

    key: str
    axes: tuple[int, ...]
    epsilon: float | None = None
    norm: tuple[str, ...] = field(default=())


def torch_state(
    plan: PruningPlan | str | Path, state_dict: Mapping[str, Any], model: onnx.ModelProto | str | Path,
    pruned: onnx.ModelProto | str | Path | None = None,
) -> TorchState:  # fmt: skip
    """Cut a PyTorch state dict as a plan cut the ONNX model that was exported from it.

    Args:
        plan: The plan, or its file.
        state_dict: State dict of the exported module; its values are tensors or arrays, and are not changed.
        model: The original ONNX model, or its file.
        pruned: The pruned model, to use its weights (recovered, fine-tuned) instead of the sliced originals.

    Returns:
        The sliced state dict, and the tensors without an entry. :func:`resize_module` puts it into a module.

    Raises:
        PlanMismatchError: The plan was made for another model, or its channels are not those of the state dict.
    """
    plan = plan if isinstance(plan, PruningPlan) else PruningPlan.load(plan)
    if plan.settings.get("channels") == "principal" and pruned is None:
        raise PlanMismatchError(
            "the plan removes principal channels, which the state dict does not hold; give the pruned model too"
        )
    if plan.kept is not None:
        raise PlanMismatchError(
            "the plan cuts classes too, which a module's last layer is not found by; cut them in the module, export it "
            "and prune that"
        )
    analysis = analyze(model, input_shapes=plan.input_shapes, policy=plan.policy)
    units = units_of(analysis, plan)
    if emptied(analysis.structure, units):
        raise PlanMismatchError(
            "the plan removes whole blocks, and a module without them has other code; make a plan with --no-blocks"
        )
    keep = kept_positions(analysis.structure, units)
    labels = analysis.structure.coupling.labels
    slicing = _Slicing(
        model=analysis.model, given=state_dict, recovered={} if pruned is None else _with_copies(models.load(pruned)),
        cuts=lambda name: kept_by_axis(labels.get(name, ()), keep),
    )  # fmt: skip
    slicing.place_all()
    slicing.add_biases()
    return TorchState(slicing.result, slicing.placed, tuple(slicing.unplaced))


class _Slicing:
    """Slices a state dict, tensor by tensor of the ONNX model."""

    def __init__(
        self, *, model: onnx.ModelProto, given: Mapping[str, Any], recovered: Mapping[str, onnx.TensorProto],
        cuts: Callable[[str], dict[int, IntArray]],
    ) -> None:  # fmt: skip
        self.given, self.recovered, self.cuts = given, recovered, cuts
        self.stored, self.biases, self.passed_on = _with_copies(model), _biases(model), _passed_on(model)
        self.arrays = {key: _array(value) for key, value in given.items()}
        self.named = {key for key in map(self.namesake, self.stored) if key is not None}
        self.result = dict(given)
        self.weight_of = {bias: weight for weight, bias in self.biases.items()}
        self.placed: dict[str, str] = {}
        self.folded: dict[str, _Match] = {}
        self.unplaced: list[str] = []

    def namesake(self, name: str) -> str | None:
        """The entry with a tensor's own name."""
        return _dotted(name, self.arrays)

    def place_all(self) -> None:
        """Slice the entry of every stored tensor that is cut or has new values."""
        for name in sorted(self.stored, key=self._order):
            cuts = self.cuts(name)
            changes = cuts or name in self.recovered
            if changes and not (name in self.passed_on and self.namesake(name) in (None, *self.placed.values())):
                self._place(name, onnx.numpy_helper.to_array(self.stored[name]), cuts)

    def _order(self, name: str) -> tuple[bool, bool, bool]:
        """Equal names first: a match by equal values is a guess, and must not take another tensor's entry.

        Biases follow the weights of their layers, beside which they are found. What only stands for its copies comes
        last.
        """
        return name in self.passed_on, name in self.weight_of, self.namesake(name) is None

    def _place(self, name: str, array: Array, cuts: Mapping[int, IntArray]) -> None:
        match = _beside(self.placed.get(self.weight_of.get(name, "")), array, self.arrays)
        match = match or _found(name, array, self.arrays, self.named | set(self.placed.values()))
        if match is None:
            if cuts and name not in self.biases.values():
                self.unplaced.append(f"{name} {list(array.shape)}, which keeps {_words(cuts)}")
            return
        self.placed[name] = match.key
        where = {match.axes[axis]: kept for axis, kept in cuts.items()}
        self.result[match.key] = _sliced(self.result[match.key], where)
        if match.norm:
            self.folded[name] = match
            bias = _bias_of(match)
            for entry in (*match.norm, *([bias] if bias in self.result else [])):
                self.result[entry] = _sliced(self.result[entry], {0: where[0]} if 0 in where else {})
        if name in self.recovered:
            self.result[match.key] = _turned_back(self.recovered[name], match, self.given[match.key])

    def add_biases(self) -> None:
        """Add biases without an entry in the state dict: those of recovery, and of folded BatchNorms."""
        for name, bias in self.biases.items():
            if bias in self.placed:
                continue
            values = _stored(self.recovered, bias)
            if values is not None and name in self.folded:
                _neutral(self.result, self.given, self.folded[name], values)
            elif values is not None and name in self.placed:  # recovery added a bias to a layer without one
                key = self.placed[name].removesuffix("weight") + "bias"
                self.result[key] = _like(self.given[self.placed[name]], values)
        missing = {bias for name, bias in self.biases.items() if bias not in self.placed and name not in self.folded}
        lost = {bias: self.cuts(bias) for bias in sorted(missing)}
        self.unplaced += [f"{bias}, which keeps {_words(cuts)}" for bias, cuts in lost.items() if cuts]


def resize_module(module: Any, found: TorchState) -> None:
    """Resize a PyTorch module to a sliced state dict, in place, and load it.

    Parameters and buffers get the new shapes; `in_channels`, `out_channels`, `groups`, `in_features`, `out_features`
    and `num_features` follow. Sizes that are constants in the module's code must be changed there.

    Raises:
        PlanMismatchError: A cut tensor has no entry in the state dict, so the result would be inconsistent.
    """
    if found.unplaced:
        raise PlanMismatchError(f"the state dict lacks what the plan cuts: {'; '.join(found.unplaced)}")
    modules = dict(module.named_modules())
    for key, value in found.state.items():
        path, _, leaf = key.rpartition(".")
        owner = modules.get(path)
        if owner is None:
            continue
        if leaf in owner._parameters:
            old = owner._parameters[leaf]
            kind = type(old if old is not None else owner._parameters["weight"])
            owner._parameters[leaf] = kind(value.detach().clone(), requires_grad=old is None or old.requires_grad)
        elif leaf in owner._buffers:
            owner._buffers[leaf] = value.detach().clone()
        if leaf == "weight":
            _resize(owner, tuple(value.shape))


def _resize(owner: Any, shape: tuple[int, ...]) -> None:
    if hasattr(owner, "normalized_shape"):
        owner.normalized_shape = shape
    elif hasattr(owner, "num_features"):
        owner.num_features = shape[0]
    elif hasattr(owner, "in_features"):
        owner.out_features, owner.in_features = shape
    elif hasattr(owner, "out_channels") and not getattr(owner, "transposed", False):
        each = owner.out_channels // owner.groups
        if owner.groups > 1 and shape[1] == owner.in_channels // owner.groups:  # whole groups were removed
            owner.groups = shape[0] // each
        owner.out_channels, owner.in_channels = shape[0], shape[1] * owner.groups
    elif hasattr(owner, "out_channels"):
        owner.in_channels, owner.out_channels = shape[0], shape[1] * owner.groups


def _beside(weights: str | None, array: Array, arrays: Mapping[str, Array]) -> _Match | None:
    """The bias of the layer whose weights were found, if it has these values: exporters write equal biases once."""
    key = "" if weights is None else f"{weights.removesuffix('weight')}bias"
    if key in arrays and arrays[key].shape == array.shape and _same(arrays[key], array):
        return _Match(key, (0,))
    return None


def _found(name: str, array: Array, arrays: Mapping[str, Array], taken: set[str]) -> _Match | None:
    """The entry that matches a stored tensor."""
    straight = tuple(range(array.ndim))
    key = _dotted(name, arrays)
    if key is not None and arrays[key].shape == array.shape:
        return _Match(key, straight)
    free = {key: value for key, value in arrays.items() if key not in taken and value.size == array.size}
    for key, value in free.items():
        if value.shape == array.shape and _same(value, array):
            return _Match(key, straight)
        if array.ndim == 2 and value.shape == array.shape[::-1] and _same(value.T, array):
            return _Match(key, (1, 0))
        if value.ndim == 1 < array.ndim and array.squeeze().shape == value.shape and _same(value, array.reshape(-1)):
            return _Match(key, (0,) * array.ndim)  # a vector that the export stores with axes of size 1
    for key, value in free.items():
        if array.ndim > 2 and value.shape == array.shape:
            norm = _folded(key, value, array, arrays)
            if norm is not None:
                return _Match(key, straight, *norm)
    return None


def _dotted(name: str, arrays: Mapping[str, Array]) -> str | None:
    """The entry with a tensor's own name."""
    return next((key for key in (name, name.replace("/", ".").strip(".")) if key in arrays), None)


def _folded(key: str, value: Array, array: Array, arrays: Mapping[str, Array]) -> tuple[float, tuple[str, ...]] | None:
    """The epsilon and the entries of the BatchNorm that turns the weights `value` into `array`."""
    raw, scaled = (part.reshape(len(part), -1).astype(np.float64) for part in (value, array))
    scale = (raw * scaled).sum(1) / np.maximum((raw * raw).sum(1), 1e-30)
    if not _same(scale[:, None] * raw, scaled):
        return None
    for norm in _norms(key, arrays, len(array)):
        gamma, variance = (arrays[norm[part]].astype(np.float64) for part in ("weight", "running_var"))
        for epsilon in _EPSILONS:
            if _same(gamma / np.sqrt(variance + epsilon), scale):
                return epsilon, tuple(norm.values())
    return None


def _norms(key: str, arrays: Mapping[str, Array], channels: int) -> Iterator[dict[str, str]]:
    """BatchNorms of a number of channels, as entries by their last names; those right after the weights first."""
    keys = list(arrays)
    place = keys.index(key)
    for other in keys[place:] + keys[:place]:
        path, _, leaf = other.rpartition(".")
        if leaf == "running_var" and arrays[other].shape == (channels,) and f"{path}.weight" in arrays:
            parts = ("weight", "bias", "running_mean", "running_var")
            yield {part: f"{path}.{part}" for part in parts if f"{path}.{part}" in arrays}


def _neutral(result: dict[str, Any], state_dict: Mapping[str, Any], match: _Match, bias: Array) -> None:
    """Set a folded BatchNorm so that it only adds the bias of the folded layer."""
    parts = {entry.rpartition(".")[2]: entry for entry in match.norm}
    ones = np.ones_like(bias)
    values = {
        "weight": np.sqrt(ones + (match.epsilon or 0.0)), "bias": bias, "running_mean": 0 * ones, "running_var": ones,
    }  # fmt: skip
    for part, entry in parts.items():
        result[entry] = _like(state_dict[entry], values[part])
    if _bias_of(match) in result:
        result[_bias_of(match)] = _like(state_dict[_bias_of(match)], 0 * ones)


def _bias_of(match: _Match) -> str:
    """The entry of the bias beside the weights, to which the folded BatchNorm adds."""
    return match.key.removesuffix("weight") + "bias"


def _biases(model: onnx.ModelProto) -> dict[str, str]:
    """Names of the biases of layers, by the names of their weights."""
    return {
        node.input[1]: node.input[2]
        for node in Scopes.of(model).nodes
        if traits(node) & Trait.BIASED and len(node.input) > 2 and node.input[2]
    }


def _turned_back(tensor: onnx.TensorProto, match: _Match, entry: Any) -> Any:
    """New values of a tensor, in the shape of the state dict."""
    values = onnx.numpy_helper.to_array(tensor)
    flat = len(match.axes) > entry.ndim
    return _like(entry, values.reshape(-1) if flat else np.transpose(values, np.argsort(match.axes)))


def _with_copies(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Stored tensors, and their unchanged copies made by nodes: an exporter writes equal tensors once."""
    tensors = constant_tensors(model)
    return tensors | {copy: tensors[name] for name, copies in _passed_on(model).items() for copy in copies}


def _passed_on(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Names of unchanged copies of a stored tensor."""
    stored, copies = constant_tensors(model), dict[str, list[str]]()
    for node in Scopes.of(model).nodes:
        if node.op_type == "Identity" and node.input[0] in stored:
            copies.setdefault(node.input[0], []).append(node.output[0])
    return copies


def _stored(tensors: Mapping[str, onnx.TensorProto], name: str) -> Array | None:
    return onnx.numpy_helper.to_array(tensors[name]) if name in tensors else None


def _words(cuts: Mapping[int, IntArray]) -> str:
    return " and ".join(f"{len(kept)} indices of axis {axis}" for axis, kept in cuts.items())


def _sliced(value: Any, cuts: Mapping[int, IntArray]) -> Any:
    for axis, kept in cuts.items():
        value = value[(slice(None),) * axis + (kept.tolist(),)]
    return value


def _array(value: Any) -> Array:
    return np.asarray(value.detach().cpu()) if hasattr(value, "detach") else np.asarray(value)


def _like(value: Any, array: Array) -> Any:
    """An array converted to the kind of tensor that `value` is."""
    array = np.ascontiguousarray(array)
    return value.new_tensor(array) if hasattr(value, "new_tensor") else array.astype(value.dtype)


def _same(one: FloatArray | Array, other: FloatArray | Array) -> bool:
    if one.dtype.kind != "f" or other.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    gap = np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0.0)
    return bool(gap <= _CLOSE * np.abs(other).max(initial=0.0))
