"""Gradients of matrix products."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcop.gradient.builder import NoGradient, Tensor
from onnxcop.gradient.node import Vjp
from onnxcop.gradient.rules.broadcast import unbroadcast


def matmul_left(g: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """g bᵀ, summed over the batch axes that were broadcast."""
    if b.rank == 1:  # a column: each row of a gets it, times the row's gradient
        return g.unsqueeze([-1]) * b if a.rank > 1 else g * b
    if a.rank == 1:
        return (g.unsqueeze([-2]) @ b.swap(b.rank)).sum(range(b.rank - 1))
    return unbroadcast(g @ b.swap(b.rank), y.sizes[:-2] + a.sizes[-2:], a)


def matmul_right(g: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """aᵀ g; if b is one matrix for all of a's, all rows of a and g are one long matrix each."""
    if a.rank == 1:  # a row: each column of b gets it, times the column's gradient
        return g.unsqueeze([-2]) * a.unsqueeze([-1]) if b.rank > 1 else g * a
    if b.rank == 1:
        return (g.unsqueeze([-1]) * a).sum(range(a.rank - 1))
    if b.rank == 2:
        return _folded(a, a.rank).op("Gemm", _folded(g, y.rank), transA=1)
    return unbroadcast(a.swap(a.rank) @ g, y.sizes[:-2] + b.sizes[-2:], b)


def _folded(x: Tensor, rank: int) -> Tensor:
    """[..., n] as [rows, n]."""
    return x if rank == 2 else x.op("Flatten", axis=-1)


def gemm_a(
    g: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """g op(b)ᵀ, or its transpose."""
    if transA:
        return b.op("Gemm", g, transA=transB, transB=1, alpha=alpha)
    return g.op("Gemm", b, transB=1 - transB, alpha=alpha)


def gemm_b(
    g: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """op(a)ᵀ g, or its transpose."""
    if transB:
        return g.op("Gemm", a, transA=1, transB=transA, alpha=alpha)
    return a.op("Gemm", g, transA=1 - transA, alpha=alpha)


def gemm_c(g: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor, *, beta: float = 1.0) -> Tensor:
    """The sum over what was broadcast."""
    return unbroadcast(g if beta == 1 else beta * g, y.sizes, c)


def einsum(g: Tensor, y: Tensor, *inputs: Tensor, equation: str) -> list[Tensor]:
    """Each input's place in the equation is taken by the output, and the output's by the input."""
    terms = equation.replace(" ", "")
    if "->" not in terms or "." in terms:
        raise NoGradient("its equation has no arrow, or an ellipsis")
    left, out = terms.split("->")
    parts: Sequence[str] = left.split(",")
    if any(len(set(part)) < len(part) for part in parts):
        raise NoGradient("its equation repeats an index within one operand")
    grads = []
    for place, (part, x) in enumerate(zip(parts, inputs, strict=True)):
        others = [(p, t) for i, (p, t) in enumerate(zip(parts, inputs, strict=True)) if i != place]
        reached = set(out).union(*(p for p, _ in others))
        found = "".join(index for index in part if index in reached)
        if not found and part:
            raise NoGradient("an operand is summed up before it meets another")
        result = g.op(
            "Einsum", *(t for _, t in others), equation=",".join([out, *(p for p, _ in others)]) + "->" + found
        )
        missing = [i for i, index in enumerate(part) if index not in reached]
        grads.append(result.unsqueeze(missing).expand(x.dims()) if missing else result)
    return grads


CONTRACTIONS: dict[str, tuple[Vjp, ...]] = {
    "MatMul": (matmul_left, matmul_right),
    "Gemm": (gemm_a, gemm_b, gemm_c),
}
