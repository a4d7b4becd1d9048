"""Stored tensors that are listed as inputs of the graph as well, taken off that list.

Old exporters listed every weight among the inputs. A caller may then put another value in its place, so
ONNX Runtime takes none of them for constant, and neither folds nor fuses: such a model can take several
times as long as the same one without the list.
"""

from __future__ import annotations

import onnx

_OPTIONAL_SINCE = 4  # the IR version from which stored tensors need not be inputs


def unlist_initializers(model: onnx.ModelProto) -> int:
    """Take stored tensors off the inputs, in place.

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
