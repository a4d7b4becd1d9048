"""Text models with a smaller vocabulary: rows of unused tokens are removed from the embedding tables.

Token numbers may only index embedding tables of the graph. Rows of tokens that no text uses are removed, the others
move up, and the tokenizer renumbers them, so that every text gets the same embeddings as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcop.data.text import TextData
from onnxcop.data.tokenizer import Vocabulary, trimmed_vocabulary
from onnxcop.errors import ModelError, VerificationError
from onnxcop.graph import io as models
from onnxcop.graph.subgraphs import captured
from onnxcop.graph.traits import MICROSOFT
from onnxcop.runtime.input_shapes import settle_shapes
from onnxcop.runtime.inputs import random_feeds
from onnxcop.runtime.session import EngineOptions, Session

IDS = "input_ids"
_TOLERANCE = 1e-5  # relative: the same numbers are summed in the same order


@dataclass(frozen=True, slots=True)
class TrimmedModel:
    """A model with fewer tokens.

    Attributes:
        model: The model.
        vocabulary: The tokens that stay, and the tokenizer's files.
        tables: Names of the tables of embeddings that lost rows.
        before: Number of rows of these tables before.
    """

    model: onnx.ModelProto
    vocabulary: Vocabulary
    tables: tuple[str, ...]
    before: int


def trim_vocabulary(
    model: onnx.ModelProto | str | Path, texts: TextData, options: EngineOptions = EngineOptions()
) -> TrimmedModel:
    """Remove the embeddings of tokens that no text uses.

    Args:
        model: A text model whose token numbers come in as `input_ids`; it is not changed.
        texts: The texts, and the model's tokenizer.
        options: How to run both models for the proof.

    Raises:
        ModelError: Token numbers reach more than embedding tables, or the tables have other uses.
        CalibrationError: The texts or the tokenizer cannot be read.
        VerificationError: The outputs are not those of the original.
    """
    original = models.load(model)
    vocabulary = trimmed_vocabulary(texts)
    tables = _tables(original, vocabulary)
    stored = {tensor.name: tensor for tensor in original.graph.initializer}
    before = stored[tables[0]].dims[0]
    if vocabulary.kept[-1] >= before:
        raise ModelError(
            f"the tokenizer knows token {vocabulary.kept[-1]}, but {tables[0]!r} has {before} rows; give the tokenizer "
            "of this model"
        )
    result = models.load(original)
    for tensor in result.graph.initializer:
        if tensor.name in tables:
            rows = numpy_helper.to_array(tensor)[vocabulary.kept]
            tensor.CopyFrom(numpy_helper.from_array(rows, tensor.name))
    for value in (*result.graph.input, *result.graph.value_info):
        if value.name in tables:
            value.type.tensor_type.shape.dim[0].dim_value = len(vocabulary.kept)
    _prove(original, result, vocabulary, options)
    return TrimmedModel(result, vocabulary, tables, before)


def _tables(model: onnx.ModelProto, vocabulary: Vocabulary) -> tuple[str, ...]:
    """Names of the stored tables that token numbers index."""
    graph = model.graph
    if IDS not in {value.name for value in graph.input}:
        raise ModelError(f"the model has no input {IDS!r}, so its vocabulary cannot be trimmed")
    stored = {tensor.name: tensor for tensor in graph.initializer}
    tables: list[str] = []
    names = {IDS}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name not in names:
                continue
            table = _table_of(node, place)
            if table is not None and table in stored:
                tables += [table] if table not in tables else []
            elif node.op_type in ("Cast", "Identity"):
                names.add(node.output[0])
            elif node.op_type != "Shape" and not _compares(node, place, stored, vocabulary):
                raise ModelError(
                    f"token numbers reach {node.op_type} {node.name or node.output[0]}, which is no table of "
                    "embeddings; its vocabulary cannot be trimmed"
                )
    if not tables:
        raise ModelError(f"{IDS!r} indexes no stored table of embeddings; its vocabulary cannot be trimmed")
    for node, name in _other_readers(graph, set(tables), names):
        raise ModelError(
            f"the table {name!r} is read by {node.op_type} {node.name or node.output[0]} too, so that its rows are "
            "outputs; its vocabulary cannot be trimmed"
        )
    return tuple(tables)


def _table_of(node: onnx.NodeProto, place: int) -> str | None:
    """The table from which a node picks rows by the token numbers at one of its inputs."""
    if node.op_type == "Gather" and place == 1 and all(a.name != "axis" or a.i == 0 for a in node.attribute):
        return str(node.input[0])
    if (node.domain, node.op_type, place) == (MICROSOFT, "EmbedLayerNormalization", 0):
        return str(node.input[2])
    return None


def _compares(node: onnx.NodeProto, place: int, stored: dict[str, onnx.TensorProto], vocabulary: Vocabulary) -> bool:
    """Whether a node compares token numbers with one that stays the same, e.g. that of padding."""
    if node.op_type != "Equal" or place > 1 or node.input[1 - place] not in stored:
        return False
    value = numpy_helper.to_array(stored[node.input[1 - place]]).reshape(-1)
    return len(value) == 1 and vocabulary.renumbered(int(value[0])) == int(value[0])


def _other_readers(graph: onnx.GraphProto, tables: set[str], names: set[str]) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Nodes that use a table other than by its rows, or that use it in a body of control flow."""
    for node in graph.node:
        for name in captured(node) & (tables | names):
            yield node, name
        for place, name in enumerate(node.input):
            rows = {_table_of(node, other) for other, one in enumerate(node.input) if one in names}
            if name in tables and not (name in rows and place == (0 if node.op_type == "Gather" else 2)):
                yield node, name


def _prove(original: onnx.ModelProto, result: onnx.ModelProto, vocabulary: Vocabulary, options: EngineOptions) -> None:
    """Check that both models give the same outputs, each for its own numbers of the same tokens."""
    shapes = settle_shapes(original, None, options)
    rng = np.random.default_rng(0)
    with Session(original, options) as before, Session(result, options) as after:
        feeds = random_feeds(original, shapes, 0)
        for name, values in feeds.items():
            if name != IDS and values.dtype.kind in "iub":
                feeds[name] = np.ones_like(values) if "mask" in name else np.zeros_like(values)
        places = rng.integers(len(vocabulary.kept), size=feeds[IDS].shape)
        dtype = feeds[IDS].dtype
        old = before.run({**feeds, IDS: vocabulary.kept[places].astype(dtype)})
        new = after.run({**feeds, IDS: places.astype(dtype)})
    for name, values in old.items():
        scale = max(float(np.abs(values).max(initial=0.0)), 1e-12)
        if values.shape != new[name].shape or not np.abs(values - new[name]).max(initial=0.0) <= _TOLERANCE * scale:
            raise VerificationError(f"output {name!r} is not the original's with fewer tokens; nothing was written")
