"""The pool of atoms: ties, freezes and equal shares, without a graph."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcop.coupling.atoms import AtomPool, Reason

ENDS, SUM = Reason("reaches an output", "y", given=True), Reason("is summed over", "mean")


def test_ties_make_classes_numbered_by_their_first_atom() -> None:
    pool = AtomPool()
    first, second, third = pool.allocate(3), pool.allocate(3), pool.allocate(2)
    assert pool.count == 8
    np.testing.assert_array_equal(third, [6, 7])
    pool.tie(second, first)
    pool.tie(first[1:], third)
    pool.tie(first, first)
    found = pool.solve()
    np.testing.assert_array_equal(found.of, [0, 1, 2, 0, 1, 2, 1, 2])
    assert len(found) == 3
    assert not found.frozen.any()
    assert not found.inexact.any()
    assert found.reasons == {}
    with pytest.raises(ValueError, match="cannot tie"):
        pool.tie(first, third)


def test_without_ties_every_atom_is_its_own_class() -> None:
    pool = AtomPool()
    pool.allocate(3)
    np.testing.assert_array_equal(pool.solve().of, [0, 1, 2])


def test_freezes_and_inexactness_spread_over_ties_with_their_reasons() -> None:
    pool = AtomPool()
    first, second = pool.allocate(4), pool.allocate(4)
    pool.tie(first, second)
    pool.freeze(second[1:2], ENDS)
    pool.freeze(first[:0], SUM)
    pool.mark_inexact(first[1:3], SUM)
    pool.mark_inexact(second[2:3], SUM)
    pool.mark_inexact(first[:0], ENDS)
    found = pool.solve()
    np.testing.assert_array_equal(found.frozen, [False, True, False, False])
    np.testing.assert_array_equal(found.inexact, [False, True, True, False])
    assert found.reasons == {1: (ENDS, SUM), 2: (SUM,)}


def test_a_class_keeps_four_reasons_and_all_that_are_given() -> None:
    pool = AtomPool()
    (atoms,) = (pool.allocate(1),)
    others = [Reason(f"reason {number}") for number in range(6)]
    for reason in others:
        pool.freeze(atoms, reason)
    pool.freeze(atoms, ENDS)
    assert pool.solve().reasons == {0: (*others[:4], ENDS)}


def test_equal_shares_of_groups_are_removed_together() -> None:
    pool = AtomPool()
    atoms = pool.allocate(6)
    pool.balance(atoms.reshape(2, 3), SUM)
    found = pool.solve()
    classes, sizes = np.unique(found.of, return_counts=True)
    assert len(classes) == 3
    assert set(sizes.tolist()) == {2}
    for number in classes.tolist():
        rows = np.flatnonzero(found.of == number) // 3
        assert sorted(rows.tolist()) == [0, 1]  # one of each group


def test_one_group_alone_has_no_shares() -> None:
    pool = AtomPool()
    pool.balance(pool.allocate(3).reshape(1, 3), SUM)
    found = pool.solve()
    np.testing.assert_array_equal(found.of, [0, 1, 2])
    assert not found.frozen.any()


def test_what_has_no_share_in_another_group_is_frozen() -> None:
    pool = AtomPool()
    atoms = pool.allocate(4)
    pool.balance(atoms.reshape(2, 2), SUM)
    pool.freeze(atoms[:1], ENDS)
    found = pool.solve()
    assert found.frozen[found.of[0]]
    free = [number for number in range(len(found)) if not found.frozen[number]]
    assert len(free) == 1
    members = np.flatnonzero(found.of == free[0])
    assert sorted((members // 2).tolist()) == [0, 1]


def test_what_is_frozen_takes_no_share_from_what_is_free() -> None:
    pool = AtomPool()
    atoms = pool.allocate(9).reshape(3, 3)
    pool.balance(atoms, SUM)
    pool.freeze(atoms[[0, 1, 2], [0, 2, 1]], ENDS)
    found = pool.solve()
    free = [number for number in range(len(found)) if not found.frozen[number]]
    assert len(free) == 2
    for number in free:
        assert sorted((np.flatnonzero(found.of == number) // 3).tolist()) == [0, 1, 2]
