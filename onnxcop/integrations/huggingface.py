"""Folders of Hugging Face: files beside a model are copied with the pruned one, and their sizes are updated."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcop._base.files import Writing
    from onnxcop.report.result import PruneResult

_CONFIG = "config.json"
_BESIDE = (
    _CONFIG, "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "chat_template.jinja", "modules.json",
    "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json", "LICENSE",
)  # fmt: skip
UNREWRITTEN = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
"""Tokenizer files that cannot be rewritten; `tokenizer.json` has the same contents."""
_ONNX = "onnx"  # folder of the models in a repository that has other formats too
_PRUNED = "onnxcop"  # entry of config.json for widths that its own fields cannot express


def home_of(model: Path) -> Path:
    """The folder with a model's configuration: its own, or the parent of a folder called `onnx`."""
    return model.parent.parent if model.parent.name == _ONNX else model.parent


def companions(model: Path, result: PruneResult) -> Iterator[tuple[Path, bytes]]:
    """Files to write with a pruned model, by path in the folder of the result.

    Args:
        model: The original's file.
        result: The finished run.
    """
    for name, content in files_beside(model):
        yield Path(name), updated(content, result) if name == _CONFIG else content


def files_beside(model: Path) -> Iterator[tuple[str, bytes]]:
    """Files beside a model that belong to it, by path in the folder."""
    home = home_of(model)
    for name in _BESIDE:
        if (home / name).is_file():
            yield name, (home / name).read_bytes()


def stage_companions(files: Writing, model: Path, target: Path, result: PruneResult) -> None:
    """Create the folder of a result, and write the files beside the original into it."""
    home = home_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, content in companions(model, result):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        files.add(home / name, content)


def updated(content: bytes, result: PruneResult) -> bytes:
    """A `config.json` with the sizes of a pruned model, if it has fields for them.

    A width is updated if all layers of the old width have one new width. If they differ, the field stays, and the entry
    `onnxcop` lists the widths of the layers in order. Labels follow the kept classes.
    """
    try:
        config = json.loads(content)
    except ValueError:
        return content
    if not isinstance(config, dict):
        return content
    widths: dict[int, list[int]] = {}
    for group in result.report.groups:
        widths.setdefault(group.width, []).append(group.kept)
    config, uneven = _resized(config, widths)
    kept = result.plan.kept
    if kept is not None:
        config |= _labels(config, kept.kept)
    if uneven:
        config[_PRUNED] = uneven
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _resized(config: Mapping[str, Any], widths: Mapping[int, list[int]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The updated width fields, and those that one number cannot express."""
    result, uneven = dict(config), {}
    for name, value in config.items():
        if not _names_widths(name):
            continue
        if isinstance(value, list) and value and all(_whole(entry) for entry in value):
            result[name] = [_common(widths.get(entry, [entry])) or entry for entry in value]
        elif _whole(value) and value in widths:
            common = _common(widths[value])
            if common is None:
                uneven[name] = widths[value]
            else:
                result[name] = common
    return result, uneven


def _names_widths(name: str) -> bool:
    """Whether a field holds widths of layers: `hidden_sizes`, `intermediate_size`, `d_ff`, but not an image size."""
    return name in ("d_ff", "d_model", "ffn_dim", "dim", "hidden_dim") or (
        name.endswith(("hidden_size", "hidden_sizes", "intermediate_size", "embedding_size", "ffn_dim", "_channels"))
        and name != "num_channels"
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _common(widths: list[int]) -> int | None:
    return widths[0] if len(set(widths)) == 1 else None


def _labels(config: Mapping[str, Any], kept: tuple[int, ...]) -> dict[str, Any]:
    """Names of the kept classes, renumbered."""
    names = config.get("id2label")
    fields: dict[str, Any] = {"num_labels": len(kept)} if "num_labels" in config else {}
    if isinstance(names, Mapping) and all(str(number) in names for number in kept):
        new = {str(place): names[str(number)] for place, number in enumerate(kept)}
        fields |= {"id2label": new, "label2id": {name: int(place) for place, name in new.items()}}
    return fields
