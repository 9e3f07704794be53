"""Streaming log-sum-exp of similarity logits: the one op under every contrastive loss.

With logits l_ij = scale <q_i, k_j> + bias_j over the pairs that count,
row_lse_i = log sum_j e^l_ij, col_lse_j = log sum_i e^l_ij, pos_i = l_{i, target_i}.
Pairs of equal ids are left out (or, with `keep_equal`, all others), pairs of a product above the
row's `limit`, and the pairs of a row with itself where q is k.
"""

import functools
import importlib
import importlib.util
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from fastssl.autograd import once_differentiable
from fastssl.ops.checks import (
    Problem,
    check_features,
    check_target,
    int_vector,
    prepare,
    scale_tensor,
)
from fastssl.ops.labels import label_sums

# --------------------------------------------------------------------------------- 1. reference


def without_autocast(reference):
    @functools.wraps(reference)
    def run(q, *args):
        if not torch.is_autocast_enabled(q.device.type):
            return reference(q, *args)
        with torch.autocast(q.device.type, enabled=False):
            return reference(q, *args)

    return run


def logits_ref(q, k, scale, q_ids, k_ids, keep_equal, bias, limit, symmetric, groups):
    """All logits (G, N, M) in at least fp32, and the mask of pairs that are left out, or None."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q.to(dtype).unflatten(0, (groups, -1))  # (G, N, D)
    k = k.to(dtype).unflatten(0, (groups, -1))  # (G, M, D)
    products = q @ k.mT
    logits = scale.to(dtype) * products
    if bias is not None:
        logits = logits + bias.to(dtype).view(groups, 1, -1)
    out = None
    if q_ids is not None:
        out = (q_ids.view(groups, -1, 1) == k_ids.view(groups, 1, -1)) != keep_equal
    if limit is not None:
        above = products > limit.to(dtype).view(groups, -1, 1)
        out = above if out is None else out | above
    if symmetric:
        self_pairs = torch.eye(q.shape[1], dtype=torch.bool, device=q.device).expand_as(logits)
        out = self_pairs if out is None else out | self_pairs
    return logits, out


@without_autocast
def contrastive_fwd_ref(
    q: Tensor,  # (G N, D)
    k: Tensor,  # (G M, D)
    scale: Tensor,  # ()
    q_ids: Tensor | None,  # (G N,) int32
    k_ids: Tensor | None,  # (G M,) int32
    keep_equal: bool,
    bias: Tensor | None,  # (G M,)
    limit: Tensor | None,  # (G N,)
    target: Tensor | None,  # (G N,) int32, in [0, M)
    rows: bool,
    cols: bool,
    symmetric: bool,
    groups: int,
    store: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward as the papers write it, holding all logits; fp64 in gives fp64 out."""
    logits, out = logits_ref(q, k, scale, q_ids, k_ids, keep_equal, bias, limit, symmetric, groups)
    pos = logits.new_empty(0)
    if target is not None:
        pos = logits.gather(2, target.long().view(groups, -1, 1)).flatten()
    if out is not None:
        logits = logits.masked_fill(out, -torch.inf)
    # An empty tensor each: outputs of an op must not alias.
    row_lse = logits.logsumexp(2).flatten() if rows else logits.new_empty(0)
    col_lse = logits.logsumexp(1).flatten() if cols else logits.new_empty(0)
    return row_lse, col_lse, pos, logits.flatten(0, 1) if store else logits.new_empty(0, 0)


@without_autocast
def contrastive_bwd_ref(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    keep_equal: bool,
    bias: Tensor | None,
    limit: Tensor | None,
    target: Tensor | None,
    q_labels: Tensor | None,  # (G N,) int32
    k_labels: Tensor | None,  # (G M,) int32
    logits: Tensor,  # (G N, M) as stored by the forward, or (0, 0)
    row_lse: Tensor,  # (G N,) or (0,)
    col_lse: Tensor,  # (G M,) or (0,)
    drow: Tensor,  # (G N,) or (0,)
    dcol: Tensor,  # (G M,) or (0,)
    dpos: Tensor,  # (G N,) or (0,)
    drow_alike: Tensor,  # (G N,) or (0,)
    dcol_alike: Tensor,  # (G M,) or (0,)
    symmetric: bool,
    groups: int,
    need_dq: bool,
    need_dk: bool,
    need_dbias: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient written out: g = dlogits, dq = scale g k, dk = scale g^T q.

    drow_alike and dcol_alike count for every pair of equal labels, left out or not; without labels
    for every pair. A row or column whose pairs are all left out has an lse of -inf and no gradient.
    With `symmetric`, k is q, dq is the gradient of both roles, from g + g^T, and what columns would
    be given is empty. With `wide` dq and dk come in at least fp32.
    """
    if logits.numel():
        logits, out = logits.unflatten(0, (groups, -1)), None
    else:
        logits, out = logits_ref(
            q, k, scale, q_ids, k_ids, keep_equal, bias, limit, symmetric, groups
        )
    g = torch.zeros_like(logits)

    def weights(d, lse, dim):
        lse = lse.masked_fill(lse.isneginf(), 0).view(groups, -1).unsqueeze(dim)
        return d.view(groups, -1).unsqueeze(dim) * (logits - lse).exp()

    if drow.numel():
        g += weights(drow, row_lse, 2)
    if dcol.numel():
        g += weights(dcol, col_lse, 1)
    if out is not None:
        g.masked_fill_(out, 0)
    if dpos.numel():
        g.scatter_add_(2, target.long().view(groups, -1, 1), dpos.to(g.dtype).view(groups, -1, 1))
    if drow_alike.numel() or dcol_alike.numel():
        alike = torch.zeros_like(g)
        if drow_alike.numel():
            alike += drow_alike.view(groups, -1, 1)
        if dcol_alike.numel():
            alike += dcol_alike.view(groups, 1, -1)
        if q_labels is not None:
            alike *= q_labels.view(groups, -1, 1) == k_labels.view(groups, 1, -1)
        if symmetric:
            alike.diagonal(dim1=1, dim2=2).zero_()
        g += alike
    q_, k_ = (x.to(g.dtype).unflatten(0, (groups, -1)) for x in (q, k))
    dq, dk = (g @ k_).flatten(0, 1), (g.mT @ q_).flatten(0, 1)  # both without the factor scale
    dscale = (q_.flatten(0, 1) * dq).sum()
    if symmetric:
        dq = dq + dk
    dtype = g.dtype if wide else q.dtype
    dq = scale * dq if need_dq else g.new_empty(0, q.shape[1])
    dk = scale * dk if need_dk else g.new_empty(0, k.shape[1])
    return dq.to(dtype), dk.to(dtype), dscale, g.sum(1).flatten() if need_dbias else g.new_empty(0)


# ------------------------------------------------------- 2.-4. schema, reference kernel and fakes

lib = Library("fastssl", "FRAGMENT")
PROBLEM = (
    "Tensor q, Tensor k, Tensor scale, Tensor? q_ids, Tensor? k_ids, bool keep_equal, "
    "Tensor? bias, Tensor? limit, "
)
lib.define(
    f"contrastive_fwd({PROBLEM}Tensor? target, bool rows, bool cols, bool symmetric, int groups,"
    " bool store) -> (Tensor row_lse, Tensor col_lse, Tensor pos, Tensor logits)"
)
lib.define(
    f"contrastive_bwd({PROBLEM}Tensor? target, Tensor? q_labels, Tensor? k_labels, Tensor logits,"
    " Tensor row_lse, Tensor col_lse, Tensor drow, Tensor dcol, Tensor dpos, Tensor drow_alike,"
    " Tensor dcol_alike, bool symmetric, int groups, bool need_dq, bool need_dk, bool need_dbias,"
    " bool wide) -> (Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)"
)
lib.impl("contrastive_fwd", contrastive_fwd_ref, "CompositeExplicitAutograd")
lib.impl("contrastive_bwd", contrastive_bwd_ref, "CompositeExplicitAutograd")


def _fwd_fake(
    q, k, scale, q_ids, k_ids, keep_equal, bias, limit, target, rows, cols, symmetric, groups, store
):
    torch._check(q.dim() == 2 and k.dim() == 2, lambda: "contrastive_fwd: q and k must be 2-D")
    return (
        scale.new_empty(q.shape[0] if rows else 0),
        scale.new_empty(k.shape[0] if cols else 0),
        scale.new_empty(q.shape[0] if target is not None else 0),
        scale.new_empty((q.shape[0], k.shape[0] // groups) if store else (0, 0)),
    )


def _bwd_fake(
    q, k, scale, q_ids, k_ids, keep_equal, bias, limit, target, q_labels, k_labels, logits,
    row_lse, col_lse, drow, dcol, dpos, drow_alike, dcol_alike, symmetric, groups, need_dq, need_dk,
    need_dbias, wide,
):  # fmt: skip
    like = scale if wide else q
    return (
        like.new_empty(q.shape[0] if need_dq else 0, q.shape[1]),
        like.new_empty(k.shape[0] if need_dk else 0, k.shape[1]),
        scale.new_empty(()),
        scale.new_empty(k.shape[0] if need_dbias else 0),
    )


torch.library.register_fake("fastssl::contrastive_fwd", _fwd_fake, lib=lib)
torch.library.register_fake("fastssl::contrastive_bwd", _bwd_fake, lib=lib)

# ------------------------------------------------------------------------- 5.-6. kernel choice
# The CPU kernel registers itself when fastssl._C is imported. On a GPU the key belongs to Triton,
# imported at the first call; without Triton the reference runs and says so once.


def on_cuda(
    module: str, name: str, reference, cost: str = "holds all N x M logits in memory"
) -> None:
    """Registers `fastssl.kernels.<module>.<name>` for CUDA tensors, or the reference at a cost."""

    @functools.cache
    def kernel():
        if importlib.util.find_spec("triton") is None:
            warnings.warn(
                f"fastssl: Triton is not installed, so {name} on CUDA {cost}. Install "
                "triton >= 3.6.",
                stacklevel=3,
            )
            return reference
        return getattr(importlib.import_module(f"fastssl.kernels.{module}"), name)

    lib.impl(name, lambda *args: kernel()(*args), "CUDA")


on_cuda("contrastive", "contrastive_fwd", contrastive_fwd_ref)
on_cuda("contrastive", "contrastive_bwd", contrastive_bwd_ref)


def implementations(op: str = "contrastive") -> list[dict[str, str]]:
    """What this op runs on each device, and why: rows of op, device, implementation, reason."""
    from fastssl import extension

    if importlib.util.find_spec("triton") is None:
        cuda = ("reference", "Triton is not installed")
    else:
        cuda = ("Triton", "no CUDA C++ kernel has been measured faster")
    rows = [("cpu", *extension.cpu_products()), ("cuda", *cuda)]
    return [
        {"op": op, "device": device, "implementation": what, "reason": why}
        for device, what, why in rows
    ]


# ------------------------------------------------------------------------------- 7. autograd


def by_reference(q: Tensor) -> bool:
    """fp64 exists for oracles; and kernels do not take no rows, this rank's share of a batch that
    others hold."""
    return q.dtype == torch.float64 or not len(q)


def forward(problem: Problem, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, scale, q_ids, k_ids, *rest = problem
    fwd = contrastive_fwd_ref if by_reference(q) else torch.ops.fastssl.contrastive_fwd
    k, k_ids = q if k is None else k, q_ids if k_ids is None else k_ids
    return fwd(q, k, scale, q_ids, k_ids, *rest, *args)


class Upstream(NamedTuple):
    """What the backward is given for each output of `Contrastive`; None where nothing came."""

    row_lse: Tensor | None
    col_lse: Tensor | None
    pos: Tensor | None
    row_alike: Tensor | None = None
    col_alike: Tensor | None = None


def backward(
    problem: Problem,
    target: Tensor | None,
    labels: tuple[Tensor | None, Tensor | None],  # of q and of k
    statistics: tuple[Tensor, Tensor, Tensor],  # logits, row_lse, col_lse
    upstream: Upstream,
    groups: int,
    needs: tuple[bool, bool, bool, bool],  # q, k, scale, bias
    wide: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of a Problem's eight fields."""
    need_q, need_k, need_scale, need_bias = needs
    q, k, scale, q_ids, k_ids, *rest = problem
    symmetric = k is None
    need_dk = need_k and not symmetric
    # The scale's gradient comes for free with dq or dk, so one of them is computed for it.
    need_dq = need_q or (need_scale and not need_dk)
    bwd = contrastive_bwd_ref if by_reference(q) else torch.ops.fastssl.contrastive_bwd
    k, k_ids = q if k is None else k, q_ids if k_ids is None else k_ids
    q_labels, k_labels = labels
    empty = scale.new_empty(0)
    upstream = (empty if d is None else d.contiguous() for d in upstream)
    dq, dk, dscale, dbias = bwd(
        q, k, scale, q_ids, k_ids, *rest, target, q_labels,
        q_labels if k_labels is None else k_labels, *statistics, *upstream, symmetric, groups,
        need_dq, need_dk, need_bias, wide,
    )  # fmt: skip
    return (
        dq if need_q else None,
        dk if need_dk else None,
        dscale if need_scale else None,
        None,
        None,
        None,
        dbias if need_bias else None,
        None,
    )


def needed(ctx) -> tuple[bool, bool, bool, bool]:
    """Which of q, k, scale and bias need a gradient, where a Problem comes first."""
    need = ctx.needs_input_grad
    return need[0], need[1], need[2], need[6]


def alike_sums(
    problem: Problem,
    q_labels: Tensor | None,
    k_labels: Tensor | None,
    groups: int,
    cols: bool,
) -> tuple[Tensor, Tensor]:
    """Sums of logits over the pairs of equal labels, or over all: of each row, and of each column.

    O((N + M) D), for they are linear in the keys.
    """
    q, k, scale, *_, bias, _ = problem
    symmetric = k is None
    q = q.to(scale.dtype)
    k = q if symmetric else k.to(scale.dtype)
    k_labels = q_labels if k_labels is None else k_labels

    def sums(x, y, x_labels, y_labels):
        if x_labels is not None:
            return label_sums(y, y_labels, x_labels)
        N = len(x) // groups
        return y.unflatten(0, (groups, -1)).sum(1).repeat_interleave(N, 0)

    total = sums(q, k if bias is None else torch.cat([k, bias[:, None]], 1), q_labels, k_labels)
    if symmetric:
        total = total - q
    by_row = scale * (q * total[:, : q.shape[1]]).sum(1)
    by_row = by_row if bias is None else by_row + total[:, -1]
    by_col = scale.new_empty(0)
    if cols:
        by_col = scale * (k * sums(k, q, k_labels, q_labels)).sum(1)
        if bias is not None:
            by_col = by_col + bias * sums(k, torch.ones_like(q[:, :1]), k_labels, q_labels)[:, 0]
    return by_row, by_col


def alike_counts(
    scale: Tensor, M: int, symmetric: bool, q_labels: Tensor | None, k_labels: Tensor | None
) -> Tensor:
    """How many pairs the sum of a row has, in scale's dtype: (N,), or () without labels."""
    if q_labels is None:
        return scale.new_full((), M - symmetric)
    k_labels = q_labels if k_labels is None else k_labels
    ones = torch.ones_like(k_labels, dtype=scale.dtype).unsqueeze(1)
    return label_sums(ones, k_labels, q_labels)[:, 0] - int(symmetric)


class Contrastive(torch.autograd.Function):
    """Saves the inputs and the O(N + M) statistics; the backward recomputes the logits.

    Gives row_lse, col_lse, pos; with `alike` what `alike_sums` gives; and `alike_counts`.
    All parts of a gradient meet in fp32, pair by pair: near convergence they cancel.
    """

    @staticmethod
    def forward(
        ctx, q, k, scale, q_ids, k_ids, keep_equal, bias, limit, target, rows, cols, groups, store,
        alike=False, q_labels=None, k_labels=None,
    ):  # fmt: skip
        problem = Problem(q, k, scale, q_ids, k_ids, keep_equal, bias, limit)
        row_lse, col_lse, pos, logits = forward(
            problem, target, rows, cols, k is None, groups, store
        )
        sums = scale.new_empty(0), scale.new_empty(0)  # a tensor each: outputs must not alias
        if alike:
            sums = alike_sums(problem, q_labels, k_labels, groups, cols)
        M = (len(q) if k is None else len(k)) // groups
        count = alike_counts(scale, M, k is None, q_labels, k_labels)
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(
            q, k, scale, q_ids, k_ids, bias, limit, target, q_labels, k_labels,
            logits, row_lse, col_lse,
        )  # fmt: skip
        ctx.keep_equal, ctx.groups = keep_equal, groups
        ctx.set_materialize_grads(False)
        return row_lse, col_lse, pos, *sums, count

    @staticmethod
    @once_differentiable
    def backward(ctx, drow, dcol, dpos, drow_alike, dcol_alike, _):
        q, k, scale, q_ids, k_ids, bias, limit, target, *labels = ctx.saved_tensors[:10]
        problem = Problem(q, k, scale, q_ids, k_ids, ctx.keep_equal, bias, limit)
        upstream = Upstream(drow, dcol, dpos, drow_alike, dcol_alike)
        grads = backward(
            problem, target, labels, ctx.saved_tensors[10:], upstream, ctx.groups, needed(ctx)
        )
        return *grads, *[None] * 8


# ------------------------------------------------------------------------ 8. public function


def contrastive_lse(
    q: Tensor,
    k: Tensor | None = None,
    scale: float | Tensor = 1.0,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    keep_equal: bool = False,
    bias: Tensor | None = None,
    limit: Tensor | None = None,
    target: Tensor | None = None,
    rows: bool = True,
    cols: bool = False,
    store_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of l_ij = scale <q_i, k_j> + bias_j by rows, by columns, or both from one tile.

    Args:
        q: (N, D) float32, bfloat16 or float16; float64 runs the materialising reference. Or
            (G, N, D): G problems of one size, every vector below with a leading G as well.
        k: (M, D) of q's dtype, or None for q against itself. Then only rows are given, every row
            leaves itself out, and the gradient uses the symmetry of q q^T.
        scale: number or one-element tensor (learnable, stays on the device).
        q_ids, k_ids: (N,) and (M,) integers of 32 bits (checked on the CPU only); pairs of equal
            ids are left out. k_ids defaults to q_ids where k has as many rows.
        keep_equal: leave out the pairs of different ids instead.
        bias: (M,) added to every logit of that key; not with k=None.
        limit: (N,) pairs with <q_i, k_j> above limit_i are left out; rows only, no gradient.
        target: (N,) integers in [0, M): the key whose logit is returned for each row, left out
            of the sums or not.
        rows, cols: which directions are wanted.
        store_logits: keep the N x M logits in float32 for the backward, which then needs one
            product less. Not with k=None.

    Returns:
        row_lse (N,), col_lse (M,) and pos (N,) in float32, natural log; empty where not asked for.
        A row or column with every pair left out gives -inf and has no gradient.

    Raises:
        TypeError, ValueError: integer features, differing widths, empty batch, wrong shapes.

    Memory: O((N + M) D); no N x M array unless stored. Backward recomputes the logits.

    Notes: sums and gradients accumulate in float32. Deterministic. NaN features give NaN in their
        rows and columns. Under autocast, float32 features are cast to the autocast dtype.
        Differentiable once, in q, k, scale and bias.

    Example:
        >>> q, k = torch.randn(8, 16), torch.randn(12, 16)
        >>> row_lse, _, _ = contrastive_lse(q, k, scale=10.0)
        >>> bool(torch.allclose(row_lse, (10 * q @ k.T).logsumexp(1), atol=1e-4))
        True

    Paper: blockwise sums as in FlashAttention, arXiv:2205.14135, with one exponential for both
        directions of CLIP, arXiv:2103.00020.
    """
    name = "contrastive_lse"
    check_features(name, q=q, k=k)
    if k is None and (cols or not rows or store_logits):
        raise ValueError(f"{name}: q against itself (k=None) gives rows only and stores nothing.")
    if limit is not None and (cols or k is None):
        raise ValueError(f"{name}: limit is a rule of rows: it needs k and cols=False.")
    scale = scale_tensor(name, "scale", scale, q)
    problem, groups = prepare(name, q, k, scale, q_ids, k_ids, keep_equal, bias, limit)
    target = int_vector(name, "target", target, q.shape[:-1], q.device)
    if target is not None:
        check_target(name, target, (q if k is None else k).shape[-2])
    out = Contrastive.apply(*problem, target, rows, cols, groups, store_logits)[:3]
    if q.dim() == 3:
        out = [x.view(groups, -1) if x.numel() else x for x in out]
    return tuple(out)
