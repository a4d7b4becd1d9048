"""Recipes: the options of a run in a YAML or JSON file, and plans turned into recipes.

A recipe is a table of options by their names, without dashes before them and in any sections the user likes:

    budget: {macs: 0.6}
    data: {data: images/, preprocess: timm, samples: 512}
    limits: {keep: ["*head*"], multiple-of: 8}
    layers:
      - {match: "*layer4*", max_cut: 0.3, min_filters: 64}
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

SECTIONS = ("budget", "budgets", "data", "method", "criterion", "limits", "machine", "result", "recovery", "output")


FILE = "onnxcop.recipe"  # name of the path of the recipe in the context of a command


def take_recipe(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    """Make the options of a recipe the defaults of a command."""
    if value is not None:
        ctx.default_map = defaults(ctx.command, read_recipe(value), value)
        ctx.meta[FILE] = value


def read_recipe(path: Path) -> Mapping[str, Any]:
    """Read the table in a file.

    Raises:
        click.UsageError: The file does not exist, or contains no table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"the recipe {path} cannot be read: {error}") from None
    try:
        document = json.loads(text) if path.suffix.lower() == ".json" else _yaml(text)
    except ValueError as error:
        raise click.UsageError(f"the recipe {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(document, Mapping):
        raise click.UsageError(f"the recipe {path} holds no table of options, such as 'macs: 0.6'")
    return document


def defaults(command: click.Command, recipe: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Convert a recipe to defaults of a command's parameters.

    Raises:
        click.UsageError: The recipe names an option that the command does not have.
    """
    params = {option.lstrip("-").replace("-", "_"): one for one in command.params for option in one.opts}
    values: dict[str, Any] = {}
    for name, value in _flat(recipe):
        key = name.replace("-", "_")
        if key == "layers":
            values["layers"] = [_layer(entry, path) for entry in value]
            continue
        if key not in params or not isinstance(params[key], click.Option):
            near = difflib.get_close_matches(key, params, n=1)
            raise click.UsageError(
                f"the recipe {path} names an unknown option: {name}"
                + (f"; did you mean {near[0].replace('_', '-')}?" if near else "")
            )
        values[params[key].name or key] = _written(value, multiple=params[key].multiple)
    return values


def recipe_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a plan: its budget, its method, its limits.

    Args:
        plan: The document of a plan (`--plan-out`).
    """
    settings = dict(plan.get("settings", {}))
    limits = {
        name: value
        for name, value in dict(settings.get("limits", {})).items()
        if name not in ("staircase", "layers") and value not in ([], (), None, False) and (name, value) not in _USUAL
    }
    layers = [{"match": one["pattern"], **{k: one[k] for k in ("max_cut", "min_filters")}}
              for one in settings.get("limits", {}).get("layers", ())]  # fmt: skip
    method: dict[str, Any] = {name: settings[name] for name in ("allocate", "recover") if name in settings}
    criterion = dict(plan.get("criterion", {}))
    if settings.get("allocate") == "cop" and criterion.get("name"):
        method["criterion"] = criterion["name"]
    recipe: dict[str, Any] = {"budget": dict(plan.get("budget", {})), "method": method}
    recipe |= {"limits": limits} if limits else {}
    recipe |= {"layers": layers} if layers else {}
    if plan.get("policy", "finest") != "finest":
        recipe["policy"] = plan["policy"]
    classes = settings.get("classes")
    if classes:
        recipe["classes"] = f"{classes['output']}:{','.join(map(str, classes['kept']))}"
    if settings.get("seed"):
        recipe["seed"] = settings["seed"]
    return recipe


def written_recipe(recipe: Mapping[str, Any], path: Path) -> str:
    """A recipe as text, in the format of its file's suffix."""
    if path.suffix.lower() == ".json":
        return json.dumps(recipe, indent=1) + "\n"
    import yaml

    text: str = yaml.safe_dump(recipe, sort_keys=False)
    return text


_USUAL = (("min_filters", 1), ("max_cut", 1.0), ("multiple_of", 0))


def _flat(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in recipe.items():
        if isinstance(value, Mapping) and name in SECTIONS:
            yield from _flat(value)
        else:
            yield str(name), value


def _layer(entry: Any, path: Path) -> dict[str, Any]:
    known = {"match", "max_cut", "min_filters", "keep"}
    if not isinstance(entry, Mapping) or "match" not in entry or not set(entry) <= known:
        raise click.UsageError(
            f"the recipe {path}: an entry of 'layers' has 'match' and any of 'keep', 'max_cut' and 'min_filters', "
            f"not {json.dumps(entry)}"
        )
    limits = {name: entry[name] for name in ("max_cut", "min_filters") if name in entry}
    if entry.get("keep"):
        limits["max_cut"] = 0.0
    return {"pattern": str(entry["match"]), **limits}


def _written(value: Any, *, multiple: bool) -> Any:
    """A value in the form of the command line."""
    if multiple:
        return [str(entry) for entry in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, bool) else str(value)


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
