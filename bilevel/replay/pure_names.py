"""The torch names that branch-free code may use: operations on tensors that torch's dispatcher sees and that depend on their arguments alone.

The list holds what is known to be safe. A missing name costs time; a wrong name could cost a right answer.
"""

from __future__ import annotations

import math
from operator import attrgetter
from types import ModuleType

import torch

import bilevel.prox
import bilevel.pytree

__all__ = ["AS_IMPORTED", "ATTRIBUTES", "KNOWN", "MODULES", "OPERATORS_AS_IMPORTED", "operators_of"]


def _split(names: str) -> frozenset[str]:
    return frozenset(names.split())


# As operations of torch and as methods of tensors. Those in place among them are noted as what they are.
_BOTH = _split("""
    abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr adjoint all amax amin aminmax angle any arccos arccosh arcsin arcsinh arctan
    arctan2 arctanh argmax argmin argsort asin asinh atan atan2 atanh baddbmm bitwise_and bitwise_not bitwise_or bitwise_xor bmm broadcast_to ceil
    cholesky_inverse cholesky_solve chunk clamp clamp_max clamp_min clip clone conj copysign corrcoef cos cosh count_nonzero cov cross cummax cummin
    cumprod cumsum deg2rad det detach diag diag_embed diagflat diagonal diagonal_scatter diff digamma dist div divide dot eq erf erfc erfinv exp
    exp2 expm1 flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac gather ge greater greater_equal gt hardshrink heaviside
    hypot i0 imag index_add index_copy index_fill index_put index_select inner inverse isclose isfinite isinf isnan kron kthvalue le lerp less
    less_equal lgamma log log10 log1p log2 log_softmax logaddexp logaddexp2 logcumsumexp logdet logical_and logical_not logical_or logical_xor logit
    logsumexp lt masked_fill masked_scatter matmul matrix_exp matrix_power max maximum mean median min minimum mm moveaxis movedim mul multiply mv
    mvlgamma nan_to_num nanmean nanquantile nansum narrow ne neg negative nextafter norm not_equal outer permute pinverse polygamma positive pow
    prelu prod quantile rad2deg ravel real reciprocal relu remainder renorm reshape roll rot90 round rsqrt scatter scatter_add scatter_reduce select
    select_scatter sgn sigmoid sign signbit sin sinc sinh slice_scatter slogdet softmax sort split split_with_sizes sqrt square squeeze std sub
    subtract sum svd swapaxes swapdims t take take_along_dim tan tanh tile topk trace transpose tril triu true_divide trunc unbind unflatten
    unsqueeze var vdot where xlogy
""")
_METHODS = _split("""
    H T mH mT bfloat16 bool byte contiguous cpu cuda double expand expand_as fill_diagonal_ float half int long new_empty new_full new_ones
    new_zeros repeat reshape_as short sum_to_size to type_as unfold view view_as fill_ copy_ zero_ device dim dtype element_size is_complex
    is_floating_point itemsize ndim ndimension nelement numel shape size stride
""")
# Of containers, of what finfo and decompositions return, and of devices.
_OTHERS = _split("""
    append count eps extend get index items keys smallest_normal tiny type values indices eigenvalues eigenvectors sign logabsdet Q R L U S Vh P
""")
_TORCH = _split("""
    arange as_tensor atleast_1d atleast_2d atleast_3d block_diag broadcast_shapes broadcast_tensors bucketize cartesian_prod cat cdist celu
    chain_matmul column_stack combinations complex concat concatenate conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    cosine_similarity cumulative_trapezoid dstack einsum eye finfo full full_like group_norm hstack iinfo instance_norm is_complex is_floating_point
    is_tensor isin layer_norm linspace logspace meshgrid numel ones ones_like polar promote_types result_type row_stack rsub scalar_tensor
    searchsorted selu stack std_mean tensor tensordot threshold trapezoid trapz tril_indices triu_indices vander var_mean view_as_complex
    view_as_real vmap vstack zeros zeros_like
""")
_FUNCTIONAL = _split("""
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d affine_grid avg_pool1d
    avg_pool2d avg_pool3d batch_norm bilinear binary_cross_entropy binary_cross_entropy_with_logits celu channel_shuffle conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d cosine_embedding_loss cosine_similarity cross_entropy elu embedding fold gaussian_nll_loss
    gelu glu grid_sample group_norm hardshrink hardsigmoid hardswish hardtanh hinge_embedding_loss huber_loss instance_norm interpolate kl_div
    l1_loss layer_norm leaky_relu linear local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d lp_pool3d margin_ranking_loss max_pool1d
    max_pool2d max_pool3d mish mse_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss nll_loss normalize one_hot pad
    pairwise_distance pixel_shuffle pixel_unshuffle poisson_nll_loss prelu relu relu6 rms_norm scaled_dot_product_attention selu sigmoid silu
    smooth_l1_loss soft_margin_loss softmax softmin softplus softshrink softsign tanh tanhshrink threshold triplet_margin_loss unfold
""")
_LINALG = _split("""
    cholesky cholesky_ex cond cross det diagonal eig eigh eigvals eigvalsh householder_product inv inv_ex ldl_factor ldl_solve lstsq lu lu_factor
    lu_solve matmul matrix_exp matrix_norm matrix_power multi_dot norm pinv qr slogdet solve solve_ex solve_triangular svd svdvals tensorinv
    tensorsolve vander vecdot vector_norm
""")
_FUNC = _split("functional_call grad grad_and_value hessian jacfwd jacrev jvp linearize vjp vmap")


def _public(module: ModuleType) -> frozenset[str]:
    return frozenset(name for name in dir(module) if not name.startswith("_"))


# Terms are values of their arguments.
_PROX = _split(
    "L1 AffineSet Box Custom ElasticNet GroupL2 HalfSpace L1Ball L2Ball LInf NonNegative NuclearNorm PSDCone SecondOrderCone Simplex "
    "TotalVariation1D TransportPolytope Zero"
)

# A module, and what of it may be used.
MODULES: dict[ModuleType, frozenset[str]] = {
    torch: _BOTH | _TORCH,
    torch.nn: frozenset(),
    torch.nn.functional: _FUNCTIONAL,
    torch.linalg: _LINALG,
    torch.special: _public(torch.special),
    torch.fft: _public(torch.fft),
    torch.func: _FUNC,
    math: _public(math),
    bilevel.prox: _PROX,
}
# By identity, as they were when this was imported: what takes the name of one later is a function like any other.
KNOWN = {
    id(value): value
    for module, names in MODULES.items()
    for name in names
    if callable(value := getattr(module, name, None))
    and (not isinstance(value, type) or name in _PROX | {"finfo", "iinfo"})
} | {id(bilevel.pytree.ravel): bilevel.pytree.ravel}


def _in_place(name: str) -> frozenset[str]:
    return frozenset({f"{name}_"} if callable(getattr(torch.Tensor, f"{name}_", None)) else ())


ATTRIBUTES = _BOTH | _METHODS | _OTHERS | frozenset().union(*map(_in_place, _BOTH))
AS_IMPORTED = {name: getattr(torch.Tensor, name) for name in ATTRIBUTES if hasattr(torch.Tensor, name)}
# What operators, len() and the like do to a tensor, which no code names.
_OPERATORS = {
    name: value
    for base in torch.Tensor.__mro__[:-1]
    for name in vars(base)
    if name.startswith("__") and callable(value := getattr(torch.Tensor, name)) and getattr(torch.Tensor, name) is value
}
operators_of = attrgetter(*_OPERATORS)
OPERATORS_AS_IMPORTED = tuple(_OPERATORS.values())
