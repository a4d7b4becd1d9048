"""Atoms: integer names for prunable indices, and the ties between them.

Every index along a prunable axis of a tensor (a filter, a channel, an attention head) is an integer *atom*. Operators
relate atoms: two atoms that must be removed together are *tied*, and an atom that may never be removed is *frozen*. All
ties are solved at once as connected components, in time linear in their number, without recursion or a fixpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onnxcop._base.types import BoolArray, IntArray
from onnxcop.coupling.balance import bundles


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an index may not be removed (or not exactly).

    Attributes:
        text: The reason in words.
        node: Name of the node that forbids it, or the tensor's name for graph inputs and outputs.
        given: Whether the purpose of the model forbids it: the index is part of an output, or a softmax weighs it.
    """

    text: str
    node: str = ""
    given: bool = False

    def __str__(self) -> str:
        return f"{self.text} ({self.node})" if self.node else self.text


@dataclass(frozen=True, slots=True)
class Classes:
    """The solved atoms: which are removed together, and which may not be removed.

    Attributes:
        of: int64 [atoms], the class of every atom; classes are numbered by their first atom.
        frozen: bool [classes], whether removing the class is forbidden.
        inexact: bool [classes], whether removing the class changes a statistic over other channels.
        reasons: For every frozen or inexact class the reasons, most direct first.
    """

    of: IntArray
    frozen: BoolArray
    inexact: BoolArray
    reasons: dict[int, tuple[Reason, ...]]

    def __len__(self) -> int:
        return len(self.frozen)


@dataclass(slots=True)
class AtomPool:
    """Allocates atoms and records what operators say about them."""

    count: int = 0
    _left: list[IntArray] = field(default_factory=list)
    _right: list[IntArray] = field(default_factory=list)
    _frozen: list[tuple[IntArray, Reason]] = field(default_factory=list)
    _inexact: list[tuple[IntArray, Reason]] = field(default_factory=list)
    _balanced: list[tuple[IntArray, Reason]] = field(default_factory=list)

    def allocate(self, size: int) -> IntArray:
        """Return `size` new atoms (int64 [size])."""
        first = self.count
        self.count += size
        return np.arange(first, self.count, dtype=np.int64)

    def tie(self, left: IntArray, right: IntArray) -> None:
        """State that `left[i]` and `right[i]` are removed together, for every i."""
        if left.shape != right.shape:
            raise ValueError(f"cannot tie {left.shape} atoms to {right.shape}")
        if left is right:
            return
        different = left != right
        if different.any():
            self._left.append(left[different])
            self._right.append(right[different])

    def balance(self, groups: IntArray, reason: Reason) -> None:
        """State that equally many of every row of `groups` (int64 [groups, size]) are removed together."""
        if len(groups) > 1:
            self._balanced.append((groups, reason))

    def freeze(self, atoms: IntArray, reason: Reason) -> None:
        """State that none of `atoms` may be removed."""
        if atoms.size:
            self._frozen.append((np.unique(atoms), reason))

    def mark_inexact(self, atoms: IntArray, reason: Reason) -> None:
        """State that removing any of `atoms` changes what remains, if only statistically."""
        if atoms.size:
            self._inexact.append((np.unique(atoms), reason))

    def solve(self) -> Classes:
        """Connect the ties into classes and spread freezes and inexactness over them."""
        self._bundle()
        of, count = self._components()
        frozen = np.zeros(count, dtype=np.bool_)
        inexact = np.zeros(count, dtype=np.bool_)
        reasons: dict[int, list[Reason]] = {}
        for marks, flags in ((self._frozen, frozen), (self._inexact, inexact)):
            for atoms, reason in marks:
                classes = np.unique(of[atoms])
                flags[classes] = True
                for index in classes.tolist():
                    known = reasons.setdefault(index, [])
                    if reason not in known and (len(known) < _MOST_REASONS or reason.given):
                        known.append(reason)
        return Classes(of, frozen, inexact, {index: tuple(listed) for index, listed in reasons.items()})

    def _bundle(self) -> None:
        """Tie classes into equal shares of groups; shares of earlier groups stay equal when later ones are tied."""
        if not self._balanced:
            return
        of, count = self._components()
        first = np.zeros(count, dtype=np.int64)
        first[of[::-1]] = np.arange(self.count)[::-1]  # one atom of every class
        frozen = np.zeros(count, dtype=np.bool_)
        for atoms, _ in self._frozen:
            frozen[of[atoms]] = True
        for groups, reason in self._balanced:
            bundled, lone = bundles(of[groups], frozen)
            home = np.arange(count)
            for classes in bundled:
                home[classes] = classes[0]
                self.tie(first[classes[:-1]], first[classes[1:]])
            of = home[of]
            frozen[lone] = True
            self.freeze(first[lone], reason)

    def _components(self) -> tuple[IntArray, int]:
        if not self._left:
            return np.arange(self.count, dtype=np.int64), self.count
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        left, right = np.concatenate(self._left), np.concatenate(self._right)
        ones = np.ones(len(left), dtype=np.int8)
        ties = coo_array((ones, (left, right)), shape=(self.count, self.count))
        count, labels = connected_components(ties, directed=False)
        _, first = np.unique(labels, return_index=True)
        rank = np.empty(count, dtype=np.int64)
        rank[np.argsort(first)] = np.arange(count)
        return rank[labels], int(count)


_MOST_REASONS = 4  # per class: enough to explain, few enough to keep a large frozen graph cheap
