"""Small models with If, Loop and Scan, written as ONNX text."""

from __future__ import annotations

import onnx
from onnx import parser
from small_models import weights

BRANCHES = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3,8,8] x, bool choice) => (float[N,5] y)
{
  c1 = Conv <pads=[1,1,1,1]> (x, w1)
  r1 = Relu (c1)
  b = If (choice) <
    then_branch = left () => (float[N,12,8,8] l4) {
      l1 = Conv <pads=[1,1,1,1]> (r1, wl)
      l2 = Relu (l1)
      l4 = Conv (l2, wl2)
    },
    else_branch = right () => (float[N,12,8,8] r4) {
      r2 = Conv <pads=[1,1,1,1]> (r1, wr)
      r4 = Relu (r2)
    }
  >
  p = GlobalAveragePool (b)
  f = Flatten (p)
  y = Gemm (f, w3)
}
"""

LOOP = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N,6] x) => (float[N,4] y, float[3,N,4] steps)
{
  h0 = MatMul (x, w0)
  going = Constant <value = bool {1}> ()
  count = Constant <value = int64 {3}> ()
  h, steps = Loop (count, going, h0) <
    body = step (int64 i, bool more, float[N,16] state) => (bool again, float[N,16] next, float[N,4] out) {
      a = MatMul (state, wa)
      b = Tanh (a)
      c = MatMul (b, wb)
      next = Add (c, h0)
      out = MatMul (b, wo)
      again = Identity (more)
    }
  >
  y = MatMul (h, w1)
}
"""

SCAN = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[5,N,6] x) => (float[N,4] y, float[5,N,4] ys)
{
  d = MatMul (x, w0)
  h, hs = Scan <num_scan_inputs = 1, body = step (float[N,16] state, float[N,10] now)
      => (float[N,16] next, float[N,16] out) {
      a = MatMul (now, wa)
      b = MatMul (state, wb)
      c = Add (a, b)
      next = Tanh (c)
      out = Identity (next)
    }> (zero, d)
  y = MatMul (h, w1)
  ys = MatMul (hs, w2)
}
"""

NESTED = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N,3,8,8] x, bool choice, bool deep) => (float[N,5] y)
{
  c1 = Conv <pads=[1,1,1,1]> (x, w1)
  b = If (choice) <
    then_branch = left () => (float[N,12,8,8] l4) {
      l1 = Relu (c1)
      l4 = If (deep) <
        then_branch = inner () => (float[N,12,8,8] i2) {
          i1 = Conv (c1, wi)
          i2 = Add (i1, l3)
        },
        else_branch = other () => (float[N,12,8,8] l3) { l3 = Conv (l1, wo) }
      >
    },
    else_branch = right () => (float[N,12,8,8] l4) { l4 = Conv <pads=[1,1,1,1]> (c1, wr) }
  >
  p = GlobalAveragePool (b)
  f = Flatten (p)
  y = Gemm (f, w3)
}
""".replace("i2 = Add (i1, l3)", "i2 = Relu (i1)")

_STORED = {
    "branches": (BRANCHES, {"w1": (8, 3, 3, 3), "wl": (10, 8, 3, 3), "wl2": (12, 10, 1, 1), "wr": (12, 8, 3, 3),
                            "w3": (12, 5)}),
    "loop": (LOOP, {"w0": (6, 16), "wa": (16, 9), "wb": (9, 16), "wo": (9, 4), "w1": (16, 4)}),
    "scan": (SCAN, {"w0": (6, 10), "wa": (10, 16), "wb": (16, 16), "w1": (16, 4), "w2": (16, 4), "zero": (1, 16)}),
    "nested": (NESTED, {"w1": (8, 3, 3, 3), "wi": (12, 8, 1, 1), "wo": (12, 8, 1, 1), "wr": (12, 8, 3, 3),
                        "w3": (12, 5)}),
}  # fmt: skip
OUTER = {"w1", "w3", "w0", "w2", "zero"}  # stored at the top level; the others in the bodies that read them


def model(name: str, *, inside: bool = True) -> onnx.ModelProto:
    """One of the models above.

    Args:
        name: "branches", "loop", "scan" or "nested".
        inside: Store weights that only a body reads in that body.
    """
    text, stored = _STORED[name]
    result = parser.parse_model(text)
    for key, shape in stored.items():
        home = result.graph if key in OUTER or not inside else _reader(result.graph, key)
        home.initializer.append(weights(key, shape))
    return result


def _reader(graph: onnx.GraphProto, name: str) -> onnx.GraphProto:
    """The innermost graph whose nodes read a tensor."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == attribute.GRAPH and _reads(attribute.g, name):
                return _reader(attribute.g, name)
    return graph


def _reads(graph: onnx.GraphProto, name: str) -> bool:
    inner = [a.g for node in graph.node for a in node.attribute if a.type == a.GRAPH]
    return any(name in node.input for node in graph.node) or any(_reads(g, name) for g in inner)
