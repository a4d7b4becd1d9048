"""The command `onnxcop trim-vocab`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxcop._base.formatting import percent, sized
from onnxcop.cli import console
from onnxcop.cli.arguments import check_outputs, engine_from, inputs_from, target_of
from onnxcop.cli.framework import SectionCommand
from onnxcop.cli.options import engine_options, talking, vocabulary_options
from onnxcop.cli.types import Output

_FILE = click.Path(path_type=Path)


@click.command(
    "trim-vocab",
    cls=SectionCommand,
    examples=[
        ("onnxcop trim-vocab encoder/model.onnx --vocab-from texts.txt -o trimmed/", "Keep the tokens of your texts:"),
    ],
)
@click.argument("model", type=_FILE)
@vocabulary_options
@engine_options
@talking
def trim_vocab_command(model: Path, vocab_from: Path, tokenizer: Path | None, output: Output, **values: Any) -> None:
    """Remove the embeddings of tokens that no text uses.

    Writes a folder with the model, config.json, and a tokenizer of the remaining tokens, which get new numbers.
    Outputs for texts of these tokens stay the same.
    """
    from onnxcop._base.files import Writing
    from onnxcop.data.text import TextData
    from onnxcop.graph.io import stage
    from onnxcop.integrations.embeddings import trim_vocabulary
    from onnxcop.integrations.huggingface import UNREWRITTEN, files_beside, home_of

    if not output.whole:
        raise click.UsageError(f"-o {output.path} must be a folder, since the tokenizer changes too: -o {output.path}/")
    target, home = target_of(output, model), tokenizer or home_of(model)
    check_outputs(inputs_from(values, model, vocab_from), output, target)
    trimmed = trim_vocabulary(model, TextData(vocab_from, home), engine_from(values))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = {name: content for name, content in files_beside(model) if name not in UNREWRITTEN}
    with Writing() as files:
        for name, content in (beside | dict(trimmed.vocabulary.files)).items():
            (output.path / name).parent.mkdir(parents=True, exist_ok=True)
            files.add(output.path / name, content)
        stage(files, trimmed.model, target)
    kept, before = len(trimmed.vocabulary.kept), trimmed.before
    sizes = model.stat().st_size, target.stat().st_size
    if values["as_json"]:
        record = {"output": target, "tokens": kept, "tokens_before": before, "tables": trimmed.tables}
        console.show_json("vocabulary", record)
    elif not values["quiet"]:
        click.echo(f"kept {kept} of {before} tokens ({percent(kept, before)}) in {', '.join(trimmed.tables)}")
        click.echo("verified: the same outputs for the same tokens")
        click.echo(f"wrote {target}, {sized(sizes[1])} of {sized(sizes[0])}")
