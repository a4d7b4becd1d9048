"""Labels through the bodies of If, Loop and Scan.

- A tensor that a body reads from outside has the label it has outside.
- The branches of an If return the same indices: their outputs are tied position by position.
- A state that is carried from step to step keeps its indices. The output of a step is tied to the input of the next,
and both to the initial state. So the body starts with the label of the initial state, is visited once, and no fixpoint
is needed.
- The axis that a Loop or Scan iterates over is never pruned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from onnxcop._base.types import IntArray
from onnxcop.coupling.ops import Label, Op
from onnxcop.graph.control_flow import Body, bodies_of
from onnxcop.graph.shapes import ShapeMap, body_runs


@dataclass(frozen=True, slots=True)
class Follower:
    """Follows one node into its bodies.

    Attributes:
        op: The node.
        shapes: Shapes of all tensors.
        labels: Labels of all tensors so far; labels of the bodies' inputs are added.
        enter: Visits the body in the attribute of this name.
    """

    op: Op
    shapes: ShapeMap
    labels: dict[str, Label]
    enter: Callable[[str], None]

    def follow(self) -> dict[int, Label]:
        """Visit the bodies of the node.

        Returns:
            The labels of the node's outputs, by position.

        Raises:
            UnusualForm: The node has bodies unlike those of If, Loop and Scan; nothing was visited.
        """
        op = self.op
        bodies = bodies_of(op.node, op.opset)
        for position in range({"If": 1, "Loop": 2, "Scan": 0}[op.node.op_type]):
            for atoms in op.label(position):
                op.freeze(atoms, "decides the control flow")
        for body in bodies:
            self._hand_in(body)
            first = len(op.findings.macs)
            self.enter(body.attribute)
            self._repeat(body, first)
            for name in body.rigid:
                self._freeze(self._label(name), "decides the control flow")
        return self._outputs(bodies)

    def _hand_in(self, body: Body) -> None:
        for passage in body.enters:
            label = list(self._label(passage.outer))
            if label and passage.axis is not None:
                self.op.freeze(label.pop(passage.axis), "is the axis that control flow runs along")
            if any(atoms is not None for atoms in label):
                self.labels[passage.inner] = tuple(label)

    def _repeat(self, body: Body, first: int) -> None:
        """Count the work of a body as often as it runs, if that is known."""
        count = body_runs(self.op.node, body, self.shapes)
        macs = self.op.findings.macs
        if count is not None:
            macs[first:] = [replace(mac, scale=mac.scale * count) for mac in macs[first:]]

    def _outputs(self, bodies: tuple[Body, ...]) -> dict[int, Label]:
        joined: dict[str, Label] = {}
        for body in bodies:
            states = {after: self._join(self._label(before), self._label(after)) for before, after in body.carried}
            for passage in body.leaves:
                label = states.get(passage.inner, self._label(passage.inner))
                if label and passage.axis is not None:
                    axis = passage.axis % (len(label) + 1)
                    label = (*label[:axis], None, *label[axis:])
                known = joined.get(passage.outer)
                joined[passage.outer] = label if known is None else self._join(known, label)
        return {position: joined[name] for position, name in enumerate(self.op.node.output) if joined.get(name)}

    def _join(self, one: Label, other: Label) -> Label:
        """Tie two tensors that are the same; axes that do not match are frozen."""
        if not one or not other or len(one) != len(other):
            self._freeze(one, self._unequal)
            self._freeze(other, self._unequal)
            return ()
        return tuple(map(self._join_axes, one, other))

    def _join_axes(self, one: IntArray | None, other: IntArray | None) -> IntArray | None:
        if one is not None and other is not None and len(one) == len(other):
            return self.op.tie(one, other)
        why = (
            self._unequal if one is not None and other is not None else "is combined with an axis that is never pruned"
        )
        self._freeze((one, other), why)
        return None

    @property
    def _unequal(self) -> str:
        condition = self.op.infos[0]
        if self.op.node.op_type == "If" and condition is not None and condition.sized:
            return "differs in shape between branches, and a dynamic size decides between them"
        return "differs in shape between branches or steps"

    def _freeze(self, label: Label, why: str) -> None:
        for atoms in label:
            self.op.freeze(atoms, why)

    def _label(self, name: str) -> Label:
        """A tensor's label: all None if it carries no atoms, () if its rank is unknown too."""
        label = self.op.label_of(name) if name else None
        if label is not None:
            return label
        shape = self.shapes[name].shape
        return (None,) * len(shape) if shape is not None else ()
