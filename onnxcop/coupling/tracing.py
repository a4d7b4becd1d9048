"""One pass over a model on labels: which indices of which tensors are removed together.

Every node is visited once. The rule of its operator is applied, and the *conservation law* is checked: every live axis
that a rule has read is returned in an output, tied, contracted, dropped or frozen. If several couplings are possible
(which factor of a Reshape stays live, whole groups or stripes), the finest is tried first. If it ends frozen, the next
is tried, and kept if it frees more. The bodies of a control-flow node are visited with the node
(:mod:`onnxcop.coupling.control_flow`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxcop._base.types import IntArray
from onnxcop.coupling import shuffles
from onnxcop.coupling.atoms import AtomPool, Reason
from onnxcop.coupling.choices import best_of
from onnxcop.coupling.control_flow import Follower
from onnxcop.coupling.ops import DEFAULT_RULES, Decline, Label, Op, RuleTable
from onnxcop.coupling.ops.facts import Findings, OrderEdit
from onnxcop.coupling.result import Coupling
from onnxcop.coupling.shuffles import Shuffle
from onnxcop.errors import InternalError
from onnxcop.graph.control_flow import UnusualForm
from onnxcop.graph.shapes import ShapeMap, TensorInfo
from onnxcop.graph.subgraphs import Scope, Scopes, captured, graphs_of, made


def trace(
    model: onnx.ModelProto,
    shapes: ShapeMap,
    rules: RuleTable = DEFAULT_RULES,
    policy: str = "finest",
    *,
    open_axis: int | None = None,
) -> Coupling:
    """Trace the labels of a model, bodies of control flow included.

    Args:
        model: The model; it is not changed.
        shapes: Shapes and folded values, from :func:`onnxcop.graph.shapes.infer`.
        rules: The operator rules.
        policy: The preferred coupling if several exist: "finest" or "coarsest".
        open_axis: An axis of the model's outputs (negative from the end) whose indices may be removed if nothing else
            forbids it.

    Raises:
        InternalError: A rule broke the conservation law.
    """
    orders = shuffles.find(model, shapes)
    return best_of(
        lambda preferred: _Walk(
            model=model,
            shapes=shapes,
            rules=rules,
            preferred=preferred,
            policy=policy,
            orders=orders,
            open_axis=open_axis,
        ).run()
    )


_NO_RULE = "no rule for operator"
_LAYOUT_DOMAIN = "com.microsoft.nchwc"  # ONNX Runtime's own, of files that it optimized to its last level
REWRITTEN = "ONNX Runtime has optimized this file for one machine; prune the file from before, optimize after pruning"


@dataclass(slots=True)
class _Walk:
    model: onnx.ModelProto
    shapes: ShapeMap
    rules: RuleTable
    preferred: Mapping[int, int]
    policy: str
    orders: Mapping[int, Shuffle]
    open_axis: int | None = None
    pool: AtomPool = field(default_factory=AtomPool)
    labels: dict[str, Label] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    declined: list[tuple[int, Reason]] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    derived: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)
    hidden: dict[str, str] = field(default_factory=dict)

    scopes: Scopes = field(init=False)
    bodies: Mapping[tuple[int, str], Scope] = field(init=False)
    reused: set[str] = field(init=False)
    opsets: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.scopes = Scopes.of(self.model)
        self.bodies, self.reused = self.scopes.bodies(), self.scopes.reused()
        self.opsets = {entry.domain: entry.version for entry in self.model.opset_import}
        self.opsets[""] = self.opsets.get("", self.opsets.get("ai.onnx", 1))

    def run(self) -> Coupling:
        """Visit the whole model and solve the ties."""
        self._enter(self.scopes.all[0])
        for value in self.model.graph.output:
            self._freeze(value.name, Reason("reaches a graph output", value.name, given=True), self.open_axis)
        for name in sorted(self.findings.values_read & self.labels.keys()):
            self._freeze(name, Reason("holds sizes or indices", name))
        return Coupling(
            labels=self.labels,
            constants=frozenset(self.constants),
            derived=frozenset(self.derived),
            classes=self.pool.solve(),
            findings=self.findings,
            declined=tuple(self.declined),
            shapes=self.shapes,
        )

    def _enter(self, scope: Scope) -> None:
        """Visit the nodes of one graph."""
        stored = {tensor.name for tensor in scope.graph.initializer}
        self.sources |= stored
        self.derived |= stored
        for index, node in enumerate(scope.graph.node, start=scope.first):
            self._visit(index, node)

    def _visit(self, index: int, node: onnx.NodeProto) -> None:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if node.op_type == "Constant" and not domain:
            self.sources.add(node.output[0])
            self.derived.add(node.output[0])
            return
        holds_graph = next(graphs_of(node), None) is not None
        if all(not name or name in self.derived for name in node.input) and node.input and not holds_graph:
            self.derived.update(node.output)
        if index in self.orders and self._shuffled(index, self.orders[index]):
            return
        infos = [self.shapes[name] if name else None for name in node.input]
        self._note_hidden(node)
        op = Op(
            index=index,
            node=node,
            opset=self.opsets.get(domain, 1),
            attributes=_attributes(node),
            infos=infos,
            out_infos=[self.shapes[name] for name in node.output],
            pool=self.pool,
            findings=self.findings,
            label_of=self._label,
            preferred=self.preferred,
            constants=self.derived,
            policy=self.policy,
        )
        if holds_graph:
            self._control(op)
            return
        rule = self.rules.get((domain, node.op_type))
        if rule is None:
            known_only = all(info is None or info.value is not None for info in infos)
            if not (known_only and all(info.value is not None for info in op.out_infos)):
                named = f"{_NO_RULE} {f'{domain}.' if domain else ''}{node.op_type}"
                self._decline(op, REWRITTEN if domain == _LAYOUT_DOMAIN else named)
            return
        marks = _marks(self.findings)
        try:
            rule(op)
        except Decline as decline:
            _rewind(self.findings, marks)
            self._decline(op, str(decline))
            return
        except (IndexError, KeyError, TypeError, ValueError) as error:  # a node in a form that the rule does not know
            _rewind(self.findings, marks)
            self._decline(op, f"{node.op_type} is not of the usual form ({type(error).__name__}: {error})")
            return
        self._conserve(op)
        for position, label in op.labels_out.items():
            self._store(op, node.output[position], label, op.out_infos[position])

    def _control(self, op: Op) -> None:
        """Follow a node into its bodies; if that is impossible, it is declined before they are visited."""
        if any(self.reused & made(graph) for graph in graphs_of(op.node)):
            self._decline(op, f"{op.node.op_type} whose body uses a name twice")
            return

        def enter(attribute: str) -> None:
            self._enter(self.bodies[op.index, attribute])

        try:
            outputs = Follower(op, self.shapes, self.labels, enter).follow()
        except UnusualForm as form:
            self._decline(op, str(form))
            return
        for position, label in outputs.items():
            self._store(op, op.node.output[position], label, op.out_infos[position])

    def _freeze(self, name: str, reason: Reason, but: int | None = None) -> None:
        """Freeze all axes of a tensor, or all but one."""
        label = self._label(name) or ()
        for axis, atoms in enumerate(label):
            if atoms is not None and but not in (axis, axis - len(label)):
                self.pool.freeze(atoms, reason)

    def _shuffled(self, index: int, shuffle: Shuffle) -> bool:
        """Treat the nodes of a shuffle as one permutation of atoms; False if there are none."""
        label = None if shuffle.source in self.derived else self._label(shuffle.source)
        carried = None if label is None else shuffle.along(label)
        if label is None or carried is None:
            return False
        axis, order = carried
        self.findings.values_read.update(self.model.graph.node[index].input[1:])
        if index == shuffle.nodes[-1]:
            edit = OrderEdit(node=index, chain=shuffle.nodes, label=label, axis=axis, order=order)
            self.labels[shuffle.result] = (*label[:axis], edit.atoms[order], *label[axis + 1 :])
            self.findings.edits.append(edit)
        return True

    def _label(self, name: str) -> Label | None:
        """Label of a tensor; a constant gets new atoms on first use."""
        known_label = self.labels.get(name)
        if known_label is not None or name not in self.sources:
            return known_label
        info = self.shapes[name]
        if info.shape is None:
            return None
        label = tuple(self.pool.allocate(size) if size > 1 else None for size in info.shape)
        self.labels[name] = label
        self.constants.add(name)
        return label

    def _store(self, op: Op, name: str, label: Label | None, info: TensorInfo) -> None:
        if label is None or all(atoms is None for atoms in label):
            return
        shape = info.shape
        if (
            shape is None
            or len(shape) != len(label)
            or any(atoms is not None and len(atoms) != size for atoms, size in zip(label, shape, strict=True))
        ):
            for atoms in label:
                if atoms is not None:
                    self.pool.freeze(atoms, Reason("is combined with a tensor of unknown shape", op.where))
            return
        self.labels[name] = label

    def _note_hidden(self, node: onnx.NodeProto) -> None:
        """Remember the first node behind which shapes are unknown."""
        behind = next((self.hidden[name] for name in node.input if name in self.hidden), None)
        for name in node.output:
            if name and self.shapes[name].shape is None:
                self.hidden[name] = behind or f"{node.op_type} {node.name or node.output[0]}"

    def _decline(self, op: Op, why: str) -> None:
        """Freeze everything that a node touches, including outer tensors that its bodies read."""
        behind = next((self.hidden[name] for name in op.node.input if name in self.hidden), None)
        if behind is not None and not why.startswith(_NO_RULE):
            why = f"behind {behind}, the shape of whose output is not known"
        reason = Reason(why, op.where)
        names = {name for name in op.node.input if name} | captured(op.node)
        for name in sorted(names):
            self._freeze(name, reason)
        self.declined.append((op.index, reason))

    def _conserve(self, op: Op) -> None:
        """Check that every live axis that the rule read has a destination."""
        out = [a for label in op.labels_out.values() for a in label or () if a is not None]
        places = [*out, *op.handled]
        identities = {id(a) for a in places}
        loose = [a for label in op.seen.values() for a in label if a is not None and id(a) not in identities]
        if not loose:
            return
        reached = np.unique(np.concatenate(places)) if places else np.empty(0, np.int64)
        for atoms in loose:
            if not np.isin(atoms, reached).all():
                raise InternalError(f"the rule for {op.node.op_type} lost a live axis of {len(atoms)} at {op.where}")


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.type != a.GRAPH}


def _marks(findings: Findings) -> tuple[int, ...]:
    return (
        len(findings.contractions), len(findings.macs), len(findings.edits),
        len(findings.choices), len(findings.sections), len(findings.statistics),
    )  # fmt: skip


def _rewind(findings: Findings, marks: tuple[int, ...]) -> None:
    """Undo the effects of a rule that declined."""
    lists: tuple[list[Any], ...] = (
        findings.contractions, findings.macs, findings.edits, findings.choices, findings.sections,
        findings.statistics,
    )  # fmt: skip
    for entries, length in zip(lists, marks, strict=True):
        del entries[length:]


def axes_of(labels: Mapping[str, Label]) -> list[IntArray]:
    """All distinct live axes of labelled tensors."""
    seen: dict[int, IntArray] = {}
    for label in labels.values():
        for atoms in label:
            if atoms is not None:
                seen.setdefault(id(atoms), atoms)
    return list(seen.values())
