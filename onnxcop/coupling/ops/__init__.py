"""What every operator does to labels: one table of small functions.

`DEFAULT_RULES` maps (domain, operator) to its rule. Pass `DEFAULT_RULES | {("my.domain", "MyOp"): rule}`
to add an operator of your own, or register a table as an entry point of
`onnxcop.operators`. An operator without a rule freezes what it touches, and the rest of the model is still pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from onnxcop._base.plugins import loaded, skipped
from onnxcop.coupling.ops import (
    attention,
    blocked,
    contraction,
    elementwise,
    fused,
    indexing,
    movement,
    normalization,
    quantized,
    recurrent,
    reduction,
    reshape,
)  # fmt: skip
from onnxcop.coupling.ops.facts import Choice, Contraction, Edit
from onnxcop.coupling.ops.op import Decline, Label, Op, Rule, RuleTable
from onnxcop.graph.linear import Kernel

_UNARY = """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu
HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink
Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu""".split()

_BROADCAST = """Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Max Mean Min Mod Mul Or Pow Sub Sum
Xor""".split()

_COMPARE = "Equal Greater GreaterOrEqual Less LessOrEqual".split()

_POOL = "AveragePool MaxPool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool".split()

_REDUCE = """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
ReduceSum ReduceSumSquare""".split()

_GENERATED = """EyeLike RandomNormal RandomUniform RandomNormalLike RandomUniformLike
Range""".split()

_SINGLE: dict[str, Callable[[Op], None]] = {
    "ArgMax": normalization.along_axis,
    "ArgMin": normalization.along_axis,
    "Attention": attention.attention,
    "BatchNormalization": elementwise.batch_normalization,
    "CastLike": elementwise.unary,
    "Clip": elementwise.clip,
    "Concat": movement.concat,
    "ConstantOfShape": movement.constant_of_shape,
    "Conv": contraction.conv,
    "ConvInteger": contraction.conv_integer,
    "ConvTranspose": contraction.conv_transpose,
    "CumSum": normalization.along_axis,
    "DepthToSpace": movement.depth_to_space,
    "DequantizeLinear": elementwise.quantize,
    "Dropout": elementwise.dropout,
    "DynamicQuantizeLinear": quantized.dynamic_quantize,
    "Einsum": contraction.einsum,
    "Expand": movement.expand,
    "Flatten": reshape.flatten,
    "Gather": indexing.gather,
    "GatherElements": indexing.gather_elements,
    "GatherND": indexing.gather_nd,
    "Gemm": contraction.gemm,
    "GridSample": indexing.sample,
    "GroupNormalization": normalization.group_normalization,
    "Hardmax": normalization.softmax,
    "InstanceNormalization": normalization.instance_normalization,
    "LRN": normalization.local_response,
    "LSTM": recurrent.recurrent,
    "GRU": recurrent.recurrent,
    "RNN": recurrent.recurrent,
    "LayerNormalization": normalization.layer_normalization,
    "LogSoftmax": normalization.softmax,
    "LpNormalization": normalization.over_axis,
    "MatMul": contraction.matmul,
    "MatMulInteger": contraction.matmul_integer,
    "MeanVarianceNormalization": normalization.mean_variance,
    "PRelu": elementwise.prelu,
    "Pad": indexing.pad,
    "QLinearConv": contraction.qlinear_conv,
    "QLinearMatMul": contraction.qlinear_matmul,
    "QuantizeLinear": elementwise.quantize,
    "RMSNormalization": normalization.layer_normalization,
    "Reshape": reshape.reshape,
    "Resize": movement.resize,
    "RoiAlign": indexing.sample,
    "RotaryEmbedding": attention.rotary_embedding,
    "Scatter": indexing.scatter_elements,
    "ScatterElements": indexing.scatter_elements,
    "ScatterND": indexing.scatter_nd,
    "MaxRoiPool": indexing.sample,
    "Shape": movement.shape_of,
    "SimplifiedLayerNormalization": normalization.layer_normalization,
    "Size": movement.shape_of,
    "Slice": indexing.slice_,
    "Softmax": normalization.softmax,
    "SpaceToDepth": movement.space_to_depth,
    "Split": indexing.split,
    "Squeeze": movement.squeeze,
    "Tile": movement.tile,
    "TopK": normalization.along_axis,
    "Transpose": movement.transpose,
    "Unsqueeze": movement.unsqueeze,
    "Upsample": movement.resize,
    "Where": elementwise.where,
}

# Operators of onnxruntime's own.
MICROSOFT = "com.microsoft"
_CONTRIB: dict[str, Callable[[Op], None]] = {
    "Attention": attention.packed_attention,
    "BiasGelu": fused.with_bias,
    "DequantizeLinear": elementwise.quantize,
    "DynamicQuantizeMatMul": quantized.dynamic_quantize_matmul,
    "EmbedLayerNormalization": fused.embed_normalization,
    "FastGelu": fused.with_bias,
    "FusedConv": fused.fused_conv,
    "FusedGemm": contraction.gemm,
    "FusedMatMul": fused.fused_matmul,
    "Gelu": elementwise.unary,
    "GroupQueryAttention": attention.group_query_attention,
    "MatMulNBits": blocked.matmul_nbits,
    "MoE": blocked.mixture_of_experts,
    "MatMulIntegerToFloat": quantized.matmul_integer_to_float,
    "MultiHeadAttention": attention.multi_head_attention,
    "NhwcMaxPool": reduction.channels_last_pool,
    "QAttention": attention.quantized_attention,
    "QGemm": quantized.qgemm,
    "QLinearAdd": quantized.qlinear_binary,
    "QLinearAveragePool": quantized.qlinear_pool,
    "QLinearConcat": quantized.qlinear_concat,
    "QLinearGlobalAveragePool": quantized.qlinear_pool,
    "QLinearLeakyRelu": quantized.qlinear_unary,
    "QLinearMul": quantized.qlinear_binary,
    "QLinearSigmoid": quantized.qlinear_unary,
    "QLinearSoftmax": quantized.qlinear_softmax,
    "QLinearWhere": quantized.qlinear_where,
    "QuantizeLinear": elementwise.quantize,
    "QuickGelu": elementwise.unary,
    "RotaryEmbedding": attention.rotary_embedding,
    "SkipLayerNormalization": fused.skip_normalization,
    "SkipSimplifiedLayerNormalization": fused.skip_normalization,
}

DEFAULT_RULES: dict[tuple[str, str], Rule] = (
    {("", name): elementwise.unary for name in _UNARY}
    | {("", name): elementwise.broadcast for name in _BROADCAST}
    | {("", name): elementwise.comparison for name in _COMPARE}
    | {("", name): reduction.pool for name in _POOL}
    | {("", name): reduction.reduce for name in _REDUCE}
    | {("", name): movement.generated for name in _GENERATED}
    | {("", name): rule for name, rule in _SINGLE.items()}
    | {(MICROSOFT, name): rule for name, rule in _CONTRIB.items()}
)


GROUP = "onnxcop.operators"


@cache
def known_rules() -> RuleTable:
    """The default rules and those that other packages register as entry points of `onnxcop.operators`.

    An entry point is a mapping from (domain, operator) to a rule; one that fails to load is named in a
    warning and skipped.
    """
    rules = dict(DEFAULT_RULES)
    for entry, table in loaded(GROUP):
        if isinstance(table, Mapping) and all(map(callable, table.values())):
            rules.update(table)
        else:
            skipped(entry, f"{entry.value} is not a mapping from (domain, operator) to a rule")
    return rules


__all__ = [
    "DEFAULT_RULES", "Choice", "Contraction", "Decline", "Edit", "Kernel", "Label", "Op", "Rule", "RuleTable",
    "known_rules",
]  # fmt: skip
