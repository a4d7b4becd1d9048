"""Equal shares: which classes of indices must be removed together so that every group loses equally many.

A grouped convolution needs equally many filters in each of its groups, but not the same ones. Existing ties already
define classes of filters that are removed together. Here classes are combined further until each bundle has an equal
share of every group.
"""

from __future__ import annotations

import numpy as np

from onnxcop._base.types import BoolArray, IntArray

_MOST_TRIALS = 1 << 20  # about half a second; above it, all uneven classes are removed together


def bundles(rows: IntArray, frozen: BoolArray) -> tuple[list[IntArray], IntArray]:
    """Bundle the classes of some groups into equal shares.

    Args:
        rows: int64 [groups, size], the class of every member of every group.
        frozen: bool [classes], classes that are never removed and need no bundle.

    Returns:
        The bundles of more than one class, each as classes; and the classes without a bundle.
    """
    groups, size = rows.shape
    classes, places, inverse = np.unique(rows.T.reshape(-1), return_index=True, return_inverse=True)
    shares = np.zeros((len(classes), groups), dtype=np.int64)
    np.add.at(shares, (inverse.reshape(size, groups).T, np.arange(groups)[:, None]), 1)
    uneven = (shares != shares[:, :1]).any(axis=1) & ~frozen[classes]
    lonely = uneven & (shares.sum(axis=1) == 1)
    columns = lonely[inverse.reshape(size, groups)].all(axis=1)
    found = list(rows.T[columns])
    uneven[inverse.reshape(size, groups)[columns].reshape(-1)] = False
    open_classes = np.flatnonzero(uneven)
    open_classes = open_classes[np.argsort(places[open_classes], kind="stable")]
    joined, left = _greedy(shares[open_classes])
    found += [classes[open_classes[members]] for members in joined]
    return found, classes[open_classes[left]]


def _greedy(shares: IntArray) -> tuple[list[list[int]], list[int]]:
    """Combine rows until their sum is equal in every column; the best-fitting row is added next."""
    kinds, kind_of = np.unique(shares, axis=0, return_inverse=True)
    if len(kinds) * len(shares) > _MOST_TRIALS:
        total = shares.sum(axis=0)
        everything = list(range(len(shares)))
        return ([everything], []) if (total == total[0]).all() else ([], everything)
    waiting = [np.flatnonzero(kind_of.reshape(-1) == kind)[::-1].tolist() for kind in range(len(kinds))]
    bundled: list[list[int]] = []
    while any(waiting):
        first = min((queue[-1], kind) for kind, queue in enumerate(waiting) if queue)[1]
        members, total = [waiting[first].pop()], kinds[first].copy()
        while (total != total[0]).any():
            sums = total + kinds
            lacking = (sums.max(axis=1, keepdims=True) - sums).sum(axis=1)
            order = sorted((int(lacking[k]), queue[-1], k) for k, queue in enumerate(waiting) if queue)
            if not order:
                return bundled, members
            kind = order[0][2]
            members.append(waiting[kind].pop())
            total = total + kinds[kind]
        bundled.append(members)
    return bundled, []
