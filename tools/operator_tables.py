"""The operator tables of the documentation, generated from the rules.

    python tools/operator_tables.py README.md docs/operators.md

rewrites what stands between the markers of each file. What a table says of an operator comes from
the docstring of its rule: the first paragraph, and the lines that begin with `Exact:`, `Inexact:`
and `Frozen:`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pages import with_table

from onnxcop.coupling.ops import DEFAULT_RULES, Rule, RuleTable

VERDICTS = ("Exact", "Inexact", "Frozen")
_EXAMPLES = 5  # of a family, in the short table


@dataclass(frozen=True, slots=True)
class Entry:
    """Operators that share a rule.

    Attributes:
        operators: Their names, with the domain where it is not ONNX's own.
        family: What the module that holds the rule says of its operators.
        says: What can be pruned through them, by verdict; a verdict that does not occur is absent.
    """

    operators: tuple[str, ...]
    family: str
    says: Mapping[str, str]


def entries(rules: RuleTable = DEFAULT_RULES) -> list[Entry]:
    """The table's operators by rule, in the order of families and names."""
    names: dict[Rule, list[str]] = {}
    for (domain, operator), rule in rules.items():
        names.setdefault(rule, []).append(f"{domain}.{operator}" if domain else operator)
    found = [Entry(tuple(sorted(names[rule])), _family(rule), verdicts(rule)) for rule in names]
    return sorted(found, key=lambda entry: (entry.family, entry.operators))


def verdicts(rule: Rule) -> dict[str, str]:
    """What a rule's docstring says under `Exact:`, `Inexact:` and `Frozen:`."""
    found: dict[str, str] = {}
    current = ""
    for line in (inspect.getdoc(rule) or "").splitlines():
        start = re.match(rf"({'|'.join(VERDICTS)}): (.*)", line)
        if start is not None:
            current = start[1]
            found[current] = start[2]
        elif current and line.strip():
            found[current] += f" {line.strip()}"
        else:
            current = ""
    return {verdict: text.rstrip(".") for verdict, text in found.items()}


def _family(rule: Rule) -> str:
    text = (inspect.getdoc(inspect.getmodule(rule)) or "").partition("\n\n")[0].replace("\n", " ")
    words = re.split(r"[.:](?: |$)", text)[0].removeprefix("Operators that ")
    return words[:1].upper() + words[1:]


def full_table(rules: RuleTable = DEFAULT_RULES) -> str:
    """Every operator with what can be pruned through it, as Markdown, by family."""
    lines: list[str] = []
    family = None
    for entry in entries(rules):
        if entry.family != family:
            family = entry.family
            lines += ["", f"### {family}", ""]
            lines += ["| operator | exact | inexact | frozen |", "|---|---|---|---|"]
        cells = [_code(entry.operators), *(entry.says.get(verdict, "") for verdict in VERDICTS)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).strip()


def short_table(rules: RuleTable = DEFAULT_RULES) -> str:
    """How many operators each family has, with some names, as Markdown."""
    families: dict[str, list[str]] = {}
    for entry in entries(rules):
        families.setdefault(entry.family, []).extend(entry.operators)
    lines = [f"{len(rules)} operators have a rule:", "", "| operators that … | | such as |", "|---|---|---|"]
    for family, names in families.items():
        bare = dict.fromkeys(name.rpartition(".")[2] for name in sorted(names, key=lambda name: ("." in name, name)))
        some = list(bare)[:_EXAMPLES]
        lines.append(f"| {family} | {len(names)} | {_code(some)}{', …' if len(names) > len(some) else ''} |")
    return "\n".join(lines)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


TABLES = {"operators": full_table, "families": short_table}


def refreshed(text: str) -> str:
    """A document with current tables between its `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    for name, table in TABLES.items():
        text = with_table(text, name, table())
    return text


def main(paths: Iterable[str]) -> None:
    """Rewrite the tables of the given files."""
    for name in paths:
        path = Path(name)
        path.write_text(refreshed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
