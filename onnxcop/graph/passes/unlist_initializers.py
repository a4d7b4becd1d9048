"""Stored tensors that are also listed as inputs of the graph, removed from that list.

Old exporters listed every weight among the inputs. A caller may then replace it, so ONNX Runtime treats none of them as
constant and neither folds nor fuses. Such a model can take several times as long as the same one without the list.
"""

from __future__ import annotations

import onnx

_OPTIONAL_SINCE = 4  # since this IR version, stored tensors need not be inputs


def unlist_initializers(model: onnx.ModelProto) -> int:
    """Remove stored tensors from the inputs, in place.

    Returns:
        How many were inputs.
    """
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer} | {one.values.name for one in graph.sparse_initializer}
    listed = [place for place, value in enumerate(graph.input) if value.name in stored]
    for place in reversed(listed):
        del graph.input[place]
    if listed:
        model.ir_version = max(model.ir_version, _OPTIONAL_SINCE)
    return len(listed)
