r"""Hessians of linear probes and of any loss, and Gram matrices that stream.

Linear probing fits a linear map on fixed features X [n, d]. Its Hessians, in the mean convention:

    l2        1/(2n) |X w - y|^2           H = X^T X / n
    logistic  mean log(1 + exp(-y x^T w))  H = X^T diag(p (1 - p)) X / n,       p = sigmoid(X w)
    softmax   mean cross-entropy of X W    H = 1/n sum_i (x_i x_i^T) kron (diag p_i - p_i p_i^T)

The sum convention is n times that. The l2 Hessian with several outputs is the same block for each,
so [d, d] is all there is. Damping is in units of the mean-convention Hessian: H + damping I, times
n in the sum convention; it is the Hessian of an attacker who uses that weight decay.

Operators are matvec closures: nothing of the Hessian's size is formed. Products are taken at
``precision="highest"``, since accelerators round float32 products by default, and added up over
blocks of rows. Powers of two are split off before anything is squared: what fits the dtype comes
out right, also where a sum of squares on the way to a mean, or p (1 - p) itself, would not fit.

float64 and float32 are computed in; float16 and bfloat16 are computed in float32, and so is the
result. Where a probe's features and weights, or an operator and its vector, differ, the wider dtype
is taken. NumPy's float64 is float32 while x64 is off.

Source of the l2 case: Zheng et al. (2025), https://arxiv.org/abs/2505.23760, equation 9.
"""

from jaximm.hessians.losses import (
    FlatOperator,
    dense_hessian,
    flatten_operator,
    gauss_newton_operator,
    hvp,
)
from jaximm.hessians.moments import (
    GramMoments,
    GramState,
    gram_finalise,
    gram_init,
    gram_merge,
    gram_update,
    psum_gram,
)
from jaximm.hessians.probes import (
    l2_probe_hessian,
    l2_probe_operator,
    logistic_probe_hessian,
    logistic_probe_operator,
    softmax_probe_hessian,
    softmax_probe_operator,
)
from jaximm.hessians.rows import CONVENTIONS, Matvec
from jaximm.hessians.sharded import (
    column_sharded_gram,
    column_sharded_operator,
    dual_gram,
    sharded_l2_probe_operator,
)

__all__ = [
    "CONVENTIONS",
    "FlatOperator",
    "GramMoments",
    "GramState",
    "Matvec",
    "column_sharded_gram",
    "column_sharded_operator",
    "dense_hessian",
    "dual_gram",
    "flatten_operator",
    "gauss_newton_operator",
    "gram_finalise",
    "gram_init",
    "gram_merge",
    "gram_update",
    "hvp",
    "l2_probe_hessian",
    "l2_probe_operator",
    "logistic_probe_hessian",
    "logistic_probe_operator",
    "psum_gram",
    "sharded_l2_probe_operator",
    "softmax_probe_hessian",
    "softmax_probe_operator",
]
