"""Facts that operator rules state besides ties and freezes: products, their cost, and numbers to rewrite."""

from __future__ import annotations

from dataclasses import dataclass, field

from onnxcop._base.types import IntArray
from onnxcop.graph.linear import Kernel


@dataclass(frozen=True, slots=True)
class Operand:
    """One side of a contraction: the axis of an input that is summed over."""

    input: int
    axis: int
    atoms: IntArray


@dataclass(frozen=True, slots=True)
class Contraction:
    """A node that sums over channels; if `kernel` is set, one operand holds trained weights."""

    node: int
    operands: tuple[Operand, ...]
    kernel: Kernel | None = None
    produced: IntArray | None = None


@dataclass(frozen=True, slots=True)
class Statistic:
    """A node that computes a statistic over an axis: removing indices of the axis changes its results."""

    node: int
    atoms: IntArray


@dataclass(frozen=True, slots=True)
class Mac:
    """Multiply-accumulates of a node: `scale` times the number of kept indices of every axis."""

    node: int
    scale: float
    axes: tuple[IntArray, ...]


@dataclass(frozen=True, slots=True)
class SizeEdit:
    """Element `element` of a size (an input, or an attribute by name) equals the kept count of `atoms`.

    A negative number counts from the end of `whole`, so it is wrong once that axis is shorter.
    """

    node: int
    where: int | str
    element: int
    atoms: IntArray
    whole: IntArray | None = None


@dataclass(frozen=True, slots=True)
class RatioEdit:
    """Attribute `name` equals the kept count of `atoms` over that of `per` (or over `per` itself if it is a number)."""

    node: int
    name: str
    atoms: IntArray
    per: IntArray | int


@dataclass(frozen=True, slots=True)
class IndexEdit:
    """Input `input` holds indices into an axis that carries `atoms`; some are removed along their own `axis`."""

    node: int
    input: int
    atoms: IntArray
    axis: int


@dataclass(frozen=True, slots=True)
class SplitEdit:
    """The node cuts an axis into sections; section i carries `sections[i]`."""

    node: int
    sections: tuple[IntArray, ...]


@dataclass(frozen=True, slots=True)
class AxesEdit:
    """The node drops all axes of size 1, which are `axes`; the `live` axes must not shrink to size 1."""

    node: int
    axes: tuple[int, ...]
    live: tuple[IntArray, ...]


@dataclass(frozen=True, slots=True)
class PinEdit:
    """Attribute `name`, with a default that follows from sizes, is set to `value` once `atoms` lose any."""

    node: int
    name: str
    value: float | list[int]
    atoms: IntArray


@dataclass(frozen=True, slots=True)
class OrderEdit:
    """Nodes (a chain that ends with `node`) that permute an axis of their input.

    Position i of the output holds position `order[i]` of the input, which carries `label`.
    """

    node: int
    chain: tuple[int, ...]
    label: tuple[IntArray | None, ...]
    axis: int
    order: IntArray

    @property
    def atoms(self) -> IntArray:
        """The atoms of the axis."""
        atoms = self.label[self.axis]
        assert atoms is not None
        return atoms


Edit = SizeEdit | RatioEdit | IndexEdit | SplitEdit | AxesEdit | PinEdit | OrderEdit


@dataclass(frozen=True, slots=True)
class Choice:
    """A point where several couplings are possible; `taken` is the one traced."""

    node: int
    taken: int
    options: int
    atoms: IntArray


@dataclass(slots=True)
class Findings:
    """Facts from the rules of a whole graph, besides ties and freezes."""

    contractions: list[Contraction] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    macs: list[Mac] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    sections: list[IntArray] = field(default_factory=list)
    values_read: set[str] = field(default_factory=set)
