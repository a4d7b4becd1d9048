"""Choices between couplings: which options are tried, and which stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxcop.coupling.atoms import AtomPool, Reason
from onnxcop.coupling.choices import best_of
from onnxcop.coupling.ops.facts import Choice, Findings
from onnxcop.coupling.result import Coupling

WIDTH = 4  # atoms at every choice
FREE, TIED, FROZEN, STATISTIC, HALF = "free", "tied", "frozen", "statistic", "half"


@dataclass
class Graph:
    """A graph with choices, and how the atoms at each of them end, by the options taken.

    Attributes:
        ends: For the options of all choices, how each of them ends.
        options: The number of options of each choice.
        besides: Atoms elsewhere that only these options leave free.
    """

    ends: dict[tuple[int, ...], Sequence[str]]
    options: tuple[int, ...] = (2,)
    besides: tuple[int, ...] = ()
    walked: list[tuple[int, ...]] = field(default_factory=list)

    def walk(self, preferred: dict[int, int]) -> Coupling:
        taken = tuple(preferred.get(place, 0) for place in range(len(self.options)))
        self.walked.append(taken)
        pool, findings = AtomPool(), Findings()
        for place, end in enumerate(self.ends[taken]):
            atoms = pool.allocate(WIDTH)
            if end == TIED:
                pool.tie(atoms[:-1], atoms[1:])
            elif end in (FROZEN, HALF):
                pool.freeze(atoms[2 if end == HALF else 0 :], Reason("of this option"))
            elif end == STATISTIC:
                pool.mark_inexact(atoms, Reason("of this option"))
            findings.choices.append(Choice(place, taken[place], self.options[place], atoms))
        elsewhere = pool.allocate(100)
        if self.besides and taken != self.besides:
            pool.freeze(elsewhere, Reason("of another option"))
        return Coupling({}, frozenset(), frozenset(), pool.solve(), findings, (), {})

    def best(self) -> tuple[int, ...]:
        """The options that stay."""
        return tuple(choice.taken for choice in best_of(self.walk).findings.choices)


def test_a_graph_whose_choices_all_end_free_is_walked_once() -> None:
    graph = Graph({(0, 0): (FREE, FREE)}, options=(2, 3))
    assert graph.best() == (0, 0)
    assert graph.walked == [(0, 0)]


def test_a_single_option_is_not_tried_again() -> None:
    graph = Graph({(0,): (FROZEN,)}, options=(1,))
    assert graph.best() == (0,)
    assert len(graph.walked) == 1


def test_an_option_gives_way_to_one_that_frees_more() -> None:
    for worse in (FROZEN, STATISTIC, TIED, HALF):
        assert Graph({(0,): (worse,), (1,): (FREE,)}).best() == (1,)
    for other in (FROZEN, STATISTIC, TIED, HALF):
        assert Graph({(0,): (HALF,), (1,): (other,)}).best() == (0,)


def test_options_follow_each_other() -> None:
    graph = Graph({(0,): (FROZEN,), (1,): (HALF,), (2,): (FREE,)}, options=(3,))
    assert graph.best() == (2,)


def test_indices_that_all_go_together_are_no_gain() -> None:
    """One class cannot be removed, because nothing would be left; two can."""
    graph = Graph({(0,): (FROZEN,), (1,): (TIED,)})
    assert graph.best() == (0,)


def test_of_several_choices_only_those_change_that_gain() -> None:
    ends = {(0, 0): (FROZEN, HALF), (1, 1): (FREE, FROZEN), (1, 0): (FREE, HALF)}
    graph = Graph(ends, options=(2, 2))
    assert graph.best() == (1, 0)
    assert (0, 1) not in graph.walked


def test_a_gain_at_a_choice_that_costs_more_elsewhere_is_refused() -> None:
    assert Graph({(0,): (FROZEN,), (1,): (FREE,)}, besides=(0,)).best() == (0,)
    assert Graph({(0,): (FROZEN,), (1,): (FREE,)}, besides=(1,)).best() == (1,)


def test_a_choice_that_freed_nothing_changes_alone_if_both_fail() -> None:
    """The first has to change and the second, which frees half, must not."""
    ends = {(0, 0): (FROZEN, HALF), (1, 1): (FROZEN, FROZEN), (1, 0): (FREE, HALF)}
    assert Graph(ends, options=(2, 2)).best() == (1, 0)


def test_what_stays_is_what_was_walked_with_it() -> None:
    graph = Graph({(0, 0): (FROZEN, HALF), (1, 1): (FREE, FROZEN), (1, 0): (FREE, HALF)}, options=(2, 2))
    found = best_of(graph.walk)
    assert np.count_nonzero(~found.classes.frozen) == WIDTH + WIDTH // 2 + 100
