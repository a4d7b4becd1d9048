"""The table of operator traits agrees with the rules, and with what the operators do."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcop.coupling.ops import DEFAULT_RULES
from onnxcop.graph.traits import MICROSOFT, MOVES, TRAITS, Trait, traits
from onnxcop.runtime.session import EngineOptions, Session

CPU = EngineOptions(provider="cpu", threads=1)
MOVERS = {  # attributes and further inputs of operators that move the elements of [2, 4, 4, 6]
    "Identity": ({}, []),
    "Dropout": ({}, []),
    "Transpose": ({"perm": [0, 2, 3, 1]}, []),
    "Reshape": ({}, [[2, -1]]),
    "Flatten": ({}, []),
    "Squeeze": ({}, []),
    "Unsqueeze": ({}, [[0]]),
    "DepthToSpace": ({"blocksize": 2}, []),
    "SpaceToDepth": ({"blocksize": 2}, []),
    "Expand": ({}, [[3, 2, 4, 4, 6]]),
    "Gather": ({"axis": 1}, [[2, 0]]),
    "Slice": ({}, [[1], [3], [1]]),
    "Split": ({"axis": 1}, [[4]]),
    "Tile": ({}, [[1, 2, 1, 1]]),
    "MaxPool": ({"kernel_shape": [2, 2]}, []),
    "Concat": ({"axis": 0}, []),
}


def test_every_operator_has_a_rule() -> None:
    assert {*TRAITS} <= {*DEFAULT_RULES}
    assert all(TRAITS.values())


def test_layers_take_weights() -> None:
    for domain, name in TRAITS:
        known = TRAITS[domain, name]
        assert bool(known & Trait.BIASED) <= bool(known & Trait.LINEAR) <= bool(known & Trait.PRODUCT)
        if known & Trait.BIASED and not domain:
            assert onnx.defs.get_schema(name, 17).inputs[2].name.lower().startswith(("b", "c"))


def test_the_domain_counts() -> None:
    assert traits(helper.make_node("Conv", ["x", "w"], ["y"], domain="ai.onnx")) & Trait.LINEAR
    assert not traits(helper.make_node("Conv", ["x", "w"], ["y"], domain="my.domain"))
    assert traits(helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain=MICROSOFT)) & Trait.LINEAR
    assert not traits(helper.make_node("FusedMatMul", ["x", "w"], ["y"]))


def movers() -> list[str]:
    return [name for (_, name), known in TRAITS.items() if known & (MOVES | Trait.SELECTS)]


@pytest.mark.parametrize("name", movers())
def test_movers_compute_no_element(name: str) -> None:
    attributes, others = MOVERS[name]
    numbers = np.random.default_rng(0).permutation(192).reshape(2, 4, 4, 6).astype(np.float32)
    stored = [
        helper.make_tensor(f"i{place}", TensorProto.INT64, [len(values)], values) for place, values in enumerate(others)
    ]
    graph = helper.make_graph(
        [helper.make_node(name, ["x", *(tensor.name for tensor in stored)], ["y"], **attributes)],
        "mover",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 4, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        stored,
    )
    with Session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), CPU) as session:
        found = np.asarray(session.run({"x": numbers})["y"])
    assert {*found.ravel().tolist()} <= {*numbers.ravel().tolist()}
    if TRAITS["", name] & Trait.KEEPS:
        np.testing.assert_array_equal(np.sort(found, axis=None), np.sort(numbers, axis=None))
