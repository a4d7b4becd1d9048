"""Loss of sums over channels that have no layer weights: products of two activations, and recurrent sums.

Let q and k be independent with second moments S and T. If the channels R are left out of q·k, the expected loss is the
sum of S ∘ T over R × R. A softmax over the keys cancels a term common to all keys, so their covariance is used. If one
side is stored (the recurrent weights of an RNN), T is its Gram matrix. If nothing is known of it (an operator that
holds a whole attention), T is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxcop._base.types import BoolArray, FloatArray, IntArray
from onnxcop.analysis.layers import UNREAD, Layer
from onnxcop.calibration.patches import PatchStatistics
from onnxcop.coupling.groups import DependencyGroup
from onnxcop.coupling.ops.facts import Contraction, Operand
from onnxcop.reconstruction.block_streams import BlockStream, softmax_cancels, tap
from onnxcop.reconstruction.network import MaskedNetwork


@dataclass(frozen=True, slots=True)
class Product:
    """A sum over channels without weights of a layer.

    Attributes:
        node: Number of its node.
        watched: Taps that observe its factors, one or two.
        weights: Name and axis of the stored weights that multiply the first factor; None if there are none.
        centred: Whether the mean of a factor cancels.
    """

    node: int
    watched: tuple[Layer, ...]
    weights: tuple[str, int] | None
    centred: tuple[bool, ...]


def products(working: MaskedNetwork) -> Iterator[Product]:
    """Find all such sums over prunable channels in the top-level graph."""
    structure = working.analysis.structure
    for contraction in structure.coupling.findings.contractions:
        if contraction.kernel is not None or contraction.node >= working.partition.count:
            continue
        node = working.nodes[contraction.node]
        stored = [o for o in contraction.operands if node.input[o.input] in working.partition.constants]
        fed = [o for o in contraction.operands if o not in stored]
        if not (structure.units_on(contraction.operands[0].atoms) >= 0).any():
            continue
        if fed:
            watched = tuple(_watched(working, contraction, operand) for operand in fed[:2])
            centred = tuple(softmax_cancels(working, contraction.node, operand.input) for operand in fed[:2])
            yield Product(contraction.node, watched, None, centred)
        elif (state := _state(working, contraction, stored[0])) is not None:
            yield Product(contraction.node, (state,), (node.input[stored[0].input], stored[0].axis), (False,))


def _watched(working: MaskedNetwork, contraction: Contraction, operand: Operand) -> Layer:
    name = working.nodes[contraction.node].input[operand.input]
    units = working.analysis.structure.units_on(operand.atoms)
    return Layer(node=contraction.node, kernel=UNREAD, tensor=name, axis=operand.axis, units=units)


def _state(working: MaskedNetwork, contraction: Contraction, operand: Operand) -> Layer | None:
    """Return the first output of a node that carries the channels that its own weights sum over."""
    units = working.analysis.structure.units_on(operand.atoms)
    node = working.nodes[contraction.node]
    if node.input[operand.input] not in working.partition.stored:
        return None
    for name in node.output:
        for axis, atoms in enumerate(working.analysis.structure.coupling.labels.get(name) or ()):
            if atoms is not None and np.array_equal(working.analysis.structure.units_on(atoms), units):
                return Layer(node=contraction.node, kernel=UNREAD, tensor=name, axis=axis, units=units)
    return None


@dataclass
class ProductLoss:
    """Loss of a product as channels are removed.

    Attributes:
        units: int64 [channels], the unit of every channel.
        shares: float64 [channels, channels], S ∘ T.
        alive: bool [channels], the channels that remain.
    """

    units: IntArray
    shares: FloatArray
    alive: BoolArray
    _lost: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self._lost = 2 * self.shares[:, ~self.alive].sum(axis=1)
        self._energy = max(float(self.shares[np.ix_(self.alive, self.alive)].sum()), 1e-30)

    def costs(self) -> FloatArray:
        """Cost of removing each channel in addition to those already removed, relative to the whole product."""
        cost = np.maximum(np.diagonal(self.shares) + self._lost, 0.0) / self._energy
        return np.where(self.alive, cost, np.inf)

    def remove(self, channels: IntArray) -> None:
        """Remove channels."""
        channels = np.unique(channels[self.alive[channels]])
        self.alive[channels] = False
        self._lost += 2 * self.shares[:, channels].sum(axis=1)


def losses_for(
    working: MaskedNetwork, seen: PatchStatistics, group: DependencyGroup, heads: Sequence[BlockStream] = ()
) -> list[ProductLoss]:
    """Losses of the products that sum over a group; one for each head if heads are known."""
    own = next((stream for stream in heads if stream.group.index == group.index), None)
    if own is not None and any(block.product for block in own.blocks):
        losses = _of_heads(working, seen, own)
        if losses is not None:
            return [losses]
    return _of_all(working, seen, group)


def _of_heads(working: MaskedNetwork, seen: PatchStatistics, heads: BlockStream) -> ProductLoss | None:
    """Losses of all products of heads, summed; None if moments are missing."""
    shares = np.zeros((heads.group.width, heads.group.width))
    for block in heads.blocks:
        sides = {False: np.zeros_like(shares), True: np.zeros_like(shares)}
        for site in block.seen if block.product else ():
            moments = seen.moments(tap(working, site))
            if moments is None:
                return None
            sides[site.dual] += site.moments(moments)
        shares += sides[False] * sides[True]
    alive = working.alive[heads.group.units]
    return ProductLoss(heads.group.units, shares * np.outer(alive, alive), alive)


def _of_all(working: MaskedNetwork, seen: PatchStatistics, group: DependencyGroup) -> list[ProductLoss]:
    losses = []
    for product in products(working):
        units = product.watched[0].units
        moments = [seen.moments(layer) for layer in product.watched]
        if not np.isin(units, group.units).any() or any(one is None for one in moments):
            continue
        factors = [
            one.covariance if centred else one.second
            for one, centred in zip(moments, product.centred, strict=True) if one is not None
        ]  # fmt: skip
        if product.weights is not None:
            name, axis = product.weights
            flat = np.moveaxis(working.read(name).astype(np.float64), axis, 0).reshape(len(units), -1)
            factors.append(flat @ flat.T)
        shares = factors[0] * (factors[1] if len(factors) > 1 else np.eye(len(units)))
        alive = np.append(working.alive, True)[units]
        shares = shares * np.outer(alive, alive)
        losses.append(ProductLoss(units, shares, np.asarray(alive)))
    return losses
