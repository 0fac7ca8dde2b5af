"""FLOP formulas that PyTorch's table lacks, the kind of work of each operator, and what counts as nothing."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import bmm_flop, flop_registry, mm_flop, sdpa_flop_count, shape_wrapper

from vitzoo.kernels.common.registration import paper_formulas

Formula = Callable[..., int]

SCAN_CONVENTIONS = ("exact", "paper")

aten = torch.ops.aten

# Operators that move, choose, reduce, normalise or resample: a few operations an element, left out of MACs by
# every published table. Views and operators tagged `pointwise` or `reduction` belong to them without being
# named.
_NOTHING_BY_CONVENTION = frozenset(
    """
    as_strided _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d arange
    argsort _assert_async _assert_scalar _assert_tensor_metadata avg_pool1d avg_pool2d avg_pool3d
    batch_norm_elemt _batch_norm_no_update bincount bucketize cat channel_shuffle _chunk_cat col2im
    constant_pad_nd copy cudnn_batch_norm cummax cummin cumprod cumsum diagonal_copy embedding empty
    empty_like empty_permuted empty_strided eye fill flip floor_divide full full_like _fused_rms_norm
    _fused_sdp_choice gather glu grid_sampler_2d grid_sampler_3d hardswish hash_tensor im2col index index_add
    index_copy index_fill index_put index_reduce index_select _is_all_true _is_any_true is_same_size isin
    item kthvalue lift lift_fresh_copy linspace _local_scalar_dense _log_softmax logcumsumexp masked_fill
    masked_scatter masked_select _masked_softmax max_pool2d_with_indices max_pool3d_with_indices median mode
    multinomial narrow_copy native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    native_channel_shuffle native_dropout native_group_norm native_layer_norm new_empty new_empty_strided
    new_full new_ones new_zeros nonzero normal one_hot ones ones_like pixel_shuffle pixel_unshuffle polar
    rand rand_like randint randn randn_like randperm range reflection_pad1d reflection_pad2d
    reflection_pad3d renorm repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d
    resize roll rot90 _safe_softmax scalar_tensor scatter scatter_add scatter_reduce searchsorted
    select_scatter set slice_scatter _softmax sort split_copy split_with_sizes_copy _stack stack
    sym_constrain_range sym_constrain_range_for_size _to_copy topk tril tril_indices triu triu_indices
    unbind_copy unfold_copy _unique2 unique_consecutive unique_dim _unsafe_index _unsafe_index_put
    unsafe_split _unsafe_view upsample_bicubic2d _upsample_bicubic2d_aa upsample_bilinear2d
    _upsample_bilinear2d_aa upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact2d upsample_trilinear3d _weight_norm_interface where zero zeros zeros_like
    """.split()
)

_KINDS = {
    **dict.fromkeys(("mm", "addmm", "_addmm_activation", "_scaled_mm", "mv", "addmv"), "matmul"),
    **dict.fromkeys(("bmm", "baddbmm", "addbmm", "dot", "vdot"), "attention"),
}
_INTEGER_PRODUCTS = ("int8_linear", "_int_mm")
_KINDS_BY_PART = {
    "scan": "scan",
    "retention": "scan",
    "attention": "attention",
    "deform": "deformable conv",
    "conv": "conv",
    "linear": "matmul",
}


def kind(packet: Any, by_weight: bool) -> str:
    """Return the kind of work of an operator.

    Args:
        packet: operator, `torch.ops.aten.mm`.
        by_weight: whether a factor is a parameter; a batched product is then a matmul and not attention.
    """
    name = packet._qualified_op_name.partition("::")[2]
    if name in _INTEGER_PRODUCTS:
        return "integer matmul"
    if name in _KINDS:
        return "matmul" if by_weight else _KINDS[name]
    return next((kind for part, kind in _KINDS_BY_PART.items() if part in name), "other")


def counts_as_nothing(func: Any) -> bool:
    """Return whether an operator without a formula is left out of MACs on purpose."""
    if func.namespace not in ("aten", "prims", "prim"):
        return False
    if func.is_view or torch.Tag.pointwise in func.tags or torch.Tag.reduction in func.tags:
        return True
    if not any("Tensor" in str(result.type) for result in func._schema.returns):
        return True
    return func._schema.name.partition("::")[2].rstrip("_") in _NOTHING_BY_CONVENTION


def formulas(scan_convention: str) -> dict[Any, Formula]:
    """Return operator -> formula: PyTorch's, those registered with it (ours too), and the ones it lacks."""
    table = {packet: shape_wrapper(formula) for packet, formula in _added().items()} | flop_registry
    if scan_convention == "paper":
        table |= {packet: shape_wrapper(formula) for packet, formula in paper_formulas.items()}
    return table


def _added() -> dict[Any, Formula]:
    """Return the formulas that PyTorch lacks, for the operators that this build of it has."""
    named: list[tuple[Any, str, Formula]] = [
        (aten, "_scaled_dot_product_flash_attention_for_cpu", _sdpa),
        (aten, "_scaled_dot_product_fused_attention_overrideable", _sdpa),
        (aten, "_scaled_dot_product_attention_math_for_mps", _sdpa),
        (aten, "_int_mm", _mm),
        (aten, "_addmm_activation", _addmm),
        (aten, "mv", _mv),
        (aten, "addmv", _addmv),
        (aten, "dot", _dot),
        (aten, "vdot", _dot),
        (aten, "addbmm", _addbmm),
        (torch.ops.torchvision, "deform_conv2d", _deform_conv2d),
    ]
    return {getattr(space, name): formula for space, name, formula in named if hasattr(space, name)}


def _sdpa(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _mm(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return mm_flop(a, b)


def _addmm(bias: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return mm_flop(a, b)


def _addbmm(bias: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return bmm_flop(a, b)


def _mv(a: Any, x: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(a)


def _addmv(bias: Any, a: Any, x: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(a)


def _dot(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(a)


def _deform_conv2d(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Count the convolution; sampling at fractional places is resampling and counts as nothing."""
    return 2 * prod(out_shape) * prod(weight[1:])
