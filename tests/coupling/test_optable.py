"""The operator tables in the documentation are those of the code."""

from __future__ import annotations

from pathlib import Path

import operator_tables as optable
import pytest

from onnxcop.coupling.ops import DEFAULT_RULES, Op

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["README.md", "docs/operators.md"])
def test_tables_are_current(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == optable.refreshed(text), f"run: python tools/operator_tables.py {name}"


def test_documents_hold_the_tables() -> None:
    assert optable.full_table() in (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    assert optable.short_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_operator_is_listed_once() -> None:
    listed = [name for entry in optable.entries() for name in entry.operators]
    assert len(listed) == len(set(listed)) == len(DEFAULT_RULES)
    for domain, operator in DEFAULT_RULES:
        assert (f"{domain}.{operator}" if domain else operator) in listed


@pytest.mark.parametrize("key", sorted(DEFAULT_RULES), ids=lambda key: ".".join(filter(None, key)))
def test_every_rule_says_what_is_pruned(key: tuple[str, str]) -> None:
    says = optable.verdicts(DEFAULT_RULES[key])
    assert "Exact" in says or "Frozen" in says
    assert all(text and not text.endswith(".") for text in says.values())


def test_verdicts_are_read_from_the_docstring() -> None:
    def rule(op: Op) -> None:
        """A rule.

        Exact: one,
            two.
        Frozen: three.

        Not part of it.
        """

    assert optable.verdicts(rule) == {"Exact": "one, two", "Frozen": "three"}
    table = optable.full_table({("my.domain", "Mine"): rule})
    assert "| `my.domain.Mine` | one, two |  | three |" in table


def test_text_outside_the_markers_stays() -> None:
    text = "a\n<!-- families:begin (note) -->\nstale\n<!-- families:end -->\nb\n"
    new = optable.refreshed(text)
    assert new.startswith("a\n<!-- families:begin (note) -->\n")
    assert new.endswith("<!-- families:end -->\nb\n")
    assert "stale" not in new
    assert optable.short_table() in new
