"""Which option to take where an operator can couple in several ways (which factor of a Reshape stays live).

The finest coupling is tried first; where that ends frozen the next is tried, and kept if it frees more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from onnxcop.coupling.result import Coupling

Policy = Literal["finest", "coarsest"]
"""Which coupling is preferred if several exist: inside of heads and groups, or whole ones."""

_ROUNDS = 3

Walk = Callable[[dict[int, int]], Coupling]


def best_of(walk: Walk) -> Coupling:
    """Trace with the preferred options, then with others where those end frozen.

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
    """Try other options at some choice points; those that free more, and the coupling with them."""
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
    """Only the flips whose atoms do not come from another flip; {} where those are all.

    A Reshape to groups and the one back from them are both frozen when the first takes the wrong
    option; the second one's must then be kept.
    """
    result: dict[int, int] = {}
    origin: dict[int, int] = {}  # by atom: how many atoms the first flipped choice that has it has
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
    """Only the flips at choices that freed nothing; {} where those are all.

    Where queries took their heads and keys, which share a Reshape with the values, their dimensions, the
    queries must give way and the keys must not.
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
    """How many of the atoms at every choice point ended exactly prunable, by node."""
    classes = coupling.classes
    freed: dict[int, int] = {}
    for choice in coupling.findings.choices:
        found = classes.of[np.unique(choice.atoms)]
        lonely = len(np.unique(found)) < 2
        freed[choice.node] = 0 if lonely else int((~classes.frozen[found] & ~classes.inexact[found]).sum())
    return freed


def _prunable(coupling: Coupling) -> int:
    classes = coupling.classes
    return int((~classes.frozen[classes.of]).sum())
