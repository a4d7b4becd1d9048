"""A basis for every attention head: the best low-rank approximation of every product, in closed form.

Let queries q and keys k have second moments S and T. The best approximation of q·k by a product of rank r follows from
the singular value decomposition of T^½ S^½. For values v of covariance S that a layer reads by weights W, it follows
from that of (W Wᵀ)^½ S^½. In both cases the first r channels in the basis of the decomposition are the approximation
(see :func:`onnxcop.reconstruction.principal.nested_basis`). The weights before take M, the weights behind take M⁻ᵀ, and
nothing changes until channels are removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxcop._base.types import FloatArray
from onnxcop.analysis.layers import Layer
from onnxcop.calibration.patches import PatchStatistics
from onnxcop.reconstruction.block_streams import Block, BlockStream, Site, tap
from onnxcop.reconstruction.network import MaskedNetwork
from onnxcop.reconstruction.principal import Basis, nested_basis
from onnxcop.reconstruction.propagation import propagate_importance

_FEWEST = 2  # channels of a block that a basis needs at least


def watched(streams: Sequence[BlockStream], working: MaskedNetwork) -> list[Layer]:
    """The taps that observe the blocks in moments."""
    sites = {(s.tensor, s.axis): s for stream in streams for block in stream.blocks for s in block.seen}
    return [tap(working, site) for _, site in sorted(sites.items())]


def in_block_bases(
    network: MaskedNetwork, streams: Sequence[BlockStream], seen: PatchStatistics
) -> tuple[MaskedNetwork, tuple[BlockStream, ...]]:
    """Return an equivalent copy of a network with blocks written in nested bases.

    Args:
        network: The network, with no unit of these groups removed.
        streams: Groups of blocks.
        seen: Second moments of the taps from :func:`watched` and of the layers' inputs.

    Returns:
        The copy, and the streams with enough statistics for a basis.
    """
    importance = propagate_importance(network, seen)
    changed, done = network.copy(), []
    for stream in streams:
        bases = [basis_of(network, block, seen, importance) for block in stream.blocks]
        if stream.group.width < _FEWEST or any(basis is None for basis in bases):
            continue
        for block, basis in zip(stream.blocks, bases, strict=True):
            if basis is not None:
                change_block(changed, block, basis)
        done.append(stream)
    return changed, tuple(done)


def basis_of(
    network: MaskedNetwork, block: Block, seen: PatchStatistics, importance: Mapping[int, FloatArray]
) -> Basis | None:
    """Return the basis of a block, or None if statistics are missing."""
    sides: dict[bool, list[FloatArray]] = {False: [], True: []}
    for site in block.seen:
        moments = seen.moments(tap(network, site))
        if moments is None:
            return None
        sides[site.dual].append(site.moments(moments))
    for site in block.stored:
        if site.layer is not None:
            sides[site.dual].append(_read_by(network, site, site.layer, importance))
    if not sides[False] or not sides[True]:
        return None
    one, other = (_averaged(sides[side]) for side in (False, True))
    return None if one is None or other is None else nested_basis(other, one)


def _read_by(network: MaskedNetwork, site: Site, node: int, importance: Mapping[int, FloatArray]) -> FloatArray:
    """Σ W diag(m) Wᵀ of the weights that read a block."""
    layer = next(one for one in network.layers if one.node == node)
    rows = layer.kernel.read(network.read(site.tensor))[0, site.positions]
    matter = importance.get(node, np.ones(rows.shape[1]))
    return np.asarray(np.einsum("iot,o,jot->ij", rows, matter, rows))


def _averaged(matrices: Sequence[FloatArray]) -> FloatArray | None:
    """The mean of matrices normalized to trace 1; None if all are zero."""
    scaled = [matrix / trace for matrix in matrices if (trace := float(np.trace(matrix))) > 0]
    return np.asarray(np.mean(scaled, axis=0)) if scaled else None


def change_block(working: MaskedNetwork, block: Block, basis: Basis) -> None:
    """Write a block in another basis; the network's outputs stay as they are."""
    for site in block.stored:
        mix = basis.back.T if site.dual else basis.into
        values = np.moveaxis(working.read(site.tensor).astype(np.float64), site.axis, 0).copy()
        values[site.positions] = np.tensordot(mix, values[site.positions], axes=1)
        working.write(site.tensor, np.moveaxis(values, 0, site.axis))
