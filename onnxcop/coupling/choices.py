"""Choices where an operator can couple in several ways (e.g. which factor of a Reshape stays live).

The finest coupling is tried first. If it ends frozen, the next one is tried, and kept if it frees more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from onnxcop.coupling.result import Coupling

Policy = Literal["finest", "coarsest"]
"""The preferred coupling if several exist: inside heads and groups, or whole ones."""

_ROUNDS = 3

Walk = Callable[[dict[int, int]], Coupling]


def best_of(walk: Walk) -> Coupling:
    """Trace with the preferred options, then with others where the preferred ones end frozen.

    Args:
        walk: Traces the graph with the given options, by node.
    """
    preferred: dict[int, int] = {}
    best = walk(preferred)
    for _ in range(_ROUNDS):
        flips = _flips(best)
        for trials in (flips, _upstream(best, flips), _lost(best, flips)):
            kept, candidate = _improved(walk, preferred, trials, best)
            if candidate is not best:
                break
        if candidate is best:
            break
        preferred, best = preferred | kept, candidate
    return best


def _improved(
    walk: Walk, preferred: dict[int, int], flips: dict[int, int], best: Coupling
) -> tuple[dict[int, int], Coupling]:
    """Try other options at some choice points; return those that free more, with their coupling."""
    if not flips:
        return {}, best
    trial = walk(preferred | flips)
    before, after = _freed(best), _freed(trial)
    kept = {node: option for node, option in flips.items() if after.get(node, 0) > before.get(node, 0)}
    if not kept:
        return {}, best
    candidate = trial
    if kept != flips:
        candidate = walk(preferred | kept)
    return (kept, candidate) if _prunable(candidate) >= _prunable(best) else ({}, best)


def _upstream(coupling: Coupling, flips: dict[int, int]) -> dict[int, int]:
    """Keep only the flips whose atoms do not come from another flip; {} if that keeps all.

    If a Reshape to groups takes the wrong option, both it and the Reshape back end frozen. The option of the second
    must then stay.
    """
    result: dict[int, int] = {}
    origin: dict[int, int] = {}  # by atom: number of atoms of the first flipped choice that has it
    for choice in coupling.findings.choices:
        atoms = np.unique(choice.atoms).tolist() if choice.node in flips else []
        if any(origin.get(atom, 0) > len(atoms) for atom in atoms):
            continue
        for atom in atoms:
            origin.setdefault(atom, len(atoms))
        if atoms:
            result[choice.node] = flips[choice.node]
    return result if result != flips else {}


def _lost(coupling: Coupling, flips: dict[int, int]) -> dict[int, int]:
    """Keep only the flips at choices that freed nothing; {} if that keeps all.

    If queries chose heads while keys, which share a Reshape with the values, chose dimensions, the queries must change
    and the keys must not.
    """
    freed = _freed(coupling)
    result = {node: option for node, option in flips.items() if not freed[node]}
    return result if result != flips else {}


def _flips(coupling: Coupling) -> dict[int, int]:
    """Choice points that ended frozen or inexact, with their next option."""
    freed = _freed(coupling)
    return {
        choice.node: (choice.taken + 1) % choice.options
        for choice in coupling.findings.choices
        if choice.options > 1 and freed[choice.node] < len(np.unique(choice.atoms))
    }


def _freed(coupling: Coupling) -> dict[int, int]:
    """Count the atoms at every choice point that ended exactly prunable, by node."""
    classes = coupling.classes
    freed: dict[int, int] = {}
    for choice in coupling.findings.choices:
        reached = classes.of[np.unique(choice.atoms)]
        lonely = len(np.unique(reached)) < 2
        freed[choice.node] = 0 if lonely else int((~classes.frozen[reached] & ~classes.inexact[reached]).sum())
    return freed


def _prunable(coupling: Coupling) -> int:
    classes = coupling.classes
    return int((~classes.frozen[classes.of]).sum())
