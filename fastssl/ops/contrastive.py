"""Streaming log-sum-exp of similarity logits: the one op under every contrastive loss.

With logits l_ij = scale <q_i, k_j> + bias_j, pairs of equal ids left out:
row_lse_i = log sum_j e^l_ij, col_lse_j = log sum_i e^l_ij, pos_i = l_{i, target_i}.
"""

import functools
import importlib.util
import warnings

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import Library

# --------------------------------------------------------------------------------- 1. reference


def _without_autocast(reference):
    @functools.wraps(reference)
    def run(q, *args):
        with torch.autocast(q.device.type, enabled=False):
            return reference(q, *args)

    return run


def _logits_ref(q, k, scale, q_ids, k_ids, bias):
    """All N x M logits in at least fp32, and the mask of pairs that are left out."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = scale.to(dtype) * (q.to(dtype) @ k.to(dtype).T)  # (N, M)
    if bias is not None:
        logits = logits + bias.to(dtype)
    out = None if q_ids is None else q_ids[:, None] == k_ids[None, :]  # (N, M)
    return logits, out


@_without_autocast
def contrastive_fwd_ref(
    q: Tensor,  # (N, D)
    k: Tensor,  # (M, D)
    scale: Tensor,  # ()
    q_ids: Tensor | None,  # (N,) int32
    k_ids: Tensor | None,  # (M,) int32
    bias: Tensor | None,  # (M,)
    target: Tensor | None,  # (N,) int32
    rows: bool,
    cols: bool,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward as the papers write it, holding all N x M logits; fp64 in gives fp64 out."""
    logits, out = _logits_ref(q, k, scale, q_ids, k_ids, bias)
    empty = logits.new_empty(0)
    pos = empty if target is None else logits.gather(1, target.long()[:, None])[:, 0]
    if out is not None:
        logits = logits.masked_fill(out, -torch.inf)
    row_lse = logits.logsumexp(1) if rows else empty
    col_lse = logits.logsumexp(0) if cols else empty
    return row_lse, col_lse, pos


@_without_autocast
def contrastive_bwd_ref(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    bias: Tensor | None,
    target: Tensor | None,
    row_lse: Tensor,  # (N,) or (0,)
    col_lse: Tensor,  # (M,) or (0,)
    drow: Tensor,  # (N,) or (0,)
    dcol: Tensor,  # (M,) or (0,)
    dpos: Tensor,  # (N,) or (0,)
    symmetric: bool,
    need_dq: bool,
    need_dk: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient written out: G = dlogits, dq = scale G k, dk = scale G^T q.

    A row or column whose pairs are all left out has an lse of -inf and no gradient. With
    `symmetric`, k is q and dq is the gradient of both roles, from G + G^T.
    """
    logits, out = _logits_ref(q, k, scale, q_ids, k_ids, bias)
    g = torch.zeros_like(logits)
    if drow.numel():
        g += drow[:, None] * (logits - row_lse.masked_fill(row_lse.isneginf(), 0)[:, None]).exp()
    if dcol.numel():
        g += dcol[None, :] * (logits - col_lse.masked_fill(col_lse.isneginf(), 0)[None, :]).exp()
    if out is not None:
        g.masked_fill_(out, 0)
    if dpos.numel():
        g.scatter_add_(1, target.long()[:, None], dpos[:, None].to(g.dtype))
    q_, k_ = q.to(g.dtype), k.to(g.dtype)
    dq, dk = g @ k_, g.T @ q_  # (N, D), (M, D), both without the factor scale
    dscale = (q_ * dq).sum()
    if symmetric:
        dq = dq + dk
    dq = (scale * dq).to(q.dtype) if need_dq else q.new_empty(0, q.shape[1])
    dk = (scale * dk).to(k.dtype) if need_dk else k.new_empty(0, k.shape[1])
    return dq, dk, dscale, g.sum(0) if bias is not None else g.new_empty(0)


# ------------------------------------------------------- 2.-4. schema, reference kernel and fakes

_lib = Library("fastssl", "FRAGMENT")
_problem = "Tensor q, Tensor k, Tensor scale, Tensor? q_ids, Tensor? k_ids, Tensor? bias, "
_lib.define(
    f"contrastive_fwd({_problem}Tensor? target, bool rows, bool cols, bool symmetric)"
    " -> (Tensor row_lse, Tensor col_lse, Tensor pos)"
)
_lib.define(
    f"contrastive_bwd({_problem}Tensor? target, Tensor row_lse, Tensor col_lse, Tensor drow,"
    " Tensor dcol, Tensor dpos, bool symmetric, bool need_dq, bool need_dk)"
    " -> (Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)"
)
_lib.impl("contrastive_fwd", contrastive_fwd_ref, "CompositeExplicitAutograd")
_lib.impl("contrastive_bwd", contrastive_bwd_ref, "CompositeExplicitAutograd")


def _fwd_fake(q, k, scale, q_ids, k_ids, bias, target, rows, cols, symmetric):
    torch._check(q.dim() == 2 and k.dim() == 2, lambda: "contrastive_fwd: q and k must be 2-D")
    return (
        scale.new_empty(q.shape[0] if rows else 0),
        scale.new_empty(k.shape[0] if cols else 0),
        scale.new_empty(q.shape[0] if target is not None else 0),
    )


def _bwd_fake(
    q, k, scale, q_ids, k_ids, bias, target, row_lse, col_lse, drow, dcol, dpos,
    symmetric, need_dq, need_dk,
):  # fmt: skip
    return (
        q.new_empty(q.shape[0] if need_dq else 0, q.shape[1]),
        k.new_empty(k.shape[0] if need_dk else 0, k.shape[1]),
        scale.new_empty(()),
        scale.new_empty(k.shape[0] if bias is not None else 0),
    )


torch.library.register_fake("fastssl::contrastive_fwd", _fwd_fake, lib=_lib)
torch.library.register_fake("fastssl::contrastive_bwd", _bwd_fake, lib=_lib)

# ------------------------------------------------------------------------- 5.-6. kernel choice
# The CPU kernel registers itself when fastssl._C is imported. On a GPU the key belongs to Triton,
# imported at the first call; without Triton the reference runs and says so once.


@functools.cache
def _cuda_kernels():
    if importlib.util.find_spec("triton") is None:
        warnings.warn(
            "fastssl: Triton is not installed, so contrastive losses on CUDA hold all N x M logits "
            "in memory. Install triton >= 3.6.",
            stacklevel=2,
        )
        return contrastive_fwd_ref, contrastive_bwd_ref
    from fastssl.kernels import contrastive as kernels

    return kernels.contrastive_fwd, kernels.contrastive_bwd


_lib.impl("contrastive_fwd", lambda *args: _cuda_kernels()[0](*args), "CUDA")
_lib.impl("contrastive_bwd", lambda *args: _cuda_kernels()[1](*args), "CUDA")


def implementations() -> list[dict[str, str]]:
    """What this op runs on each device, and why: rows of op, device, implementation, reason."""
    from fastssl import extension

    if importlib.util.find_spec("triton") is None:
        cuda = ("reference", "Triton is not installed")
    else:
        cuda = ("Triton", "no CUDA C++ kernel has been measured faster")
    rows = [("cpu", *extension.cpu_products()), ("cuda", *cuda)]
    return [
        {"op": "contrastive", "device": device, "implementation": what, "reason": why}
        for device, what, why in rows
    ]


# ------------------------------------------------------------------------------- 7. autograd


# In all of these k=None means q, and k_ids=None means q_ids: one tensor given twice to an autograd
# Function would break the graph under torch.compile.


def _forward(q, k, scale, q_ids, k_ids, *args):
    # fp64 exists for oracles and runs the reference on every device.
    double = q.dtype == torch.float64
    fwd = contrastive_fwd_ref if double else torch.ops.fastssl.contrastive_fwd
    k, k_ids = q if k is None else k, q_ids if k_ids is None else k_ids
    return fwd(q, k, scale, q_ids, k_ids, *args)


def _backward(ctx, drow, dcol, dpos):
    """Gradients of the first six inputs from those of row_lse, col_lse and pos."""
    q, k, scale, q_ids, k_ids, bias, target, row_lse, col_lse = ctx.saved_tensors[:9]
    need_q, need_k, need_scale, _, _, need_bias = ctx.needs_input_grad[:6]
    need_dk = need_k and not ctx.symmetric
    # The scale's gradient comes for free with dq or dk, so one of them is always computed.
    need_dq = need_q or (ctx.symmetric and need_k) or not need_dk
    bwd = contrastive_bwd_ref if q.dtype == torch.float64 else torch.ops.fastssl.contrastive_bwd
    k, k_ids = q if k is None else k, q_ids if k_ids is None else k_ids
    dq, dk, dscale, dbias = bwd(
        q, k, scale, q_ids, k_ids, bias, target, row_lse, col_lse, drow, dcol, dpos,
        ctx.symmetric, need_dq, need_dk,
    )  # fmt: skip
    return (
        dq if need_q else None,
        dk if need_dk else None,
        dscale if need_scale else None,
        None,
        None,
        dbias if need_bias else None,
    )


class _Contrastive(torch.autograd.Function):
    """Saves the inputs and the O(N + M) statistics; the backward recomputes the logits."""

    @staticmethod
    def forward(ctx, q, k, scale, q_ids, k_ids, bias, target, rows, cols, symmetric):
        out = _forward(q, k, scale, q_ids, k_ids, bias, target, rows, cols, symmetric)
        ctx.save_for_backward(q, k, scale, q_ids, k_ids, bias, target, *out[:2])
        ctx.symmetric = symmetric
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        empty = ctx.saved_tensors[2].new_empty(0)
        grads = [empty if g is None else g.contiguous() for g in grads]
        return *_backward(ctx, *grads), None, None, None, None


class _InfoNCE(torch.autograd.Function):
    """Per-row losses of `info_nce` in one node: at small N autograd costs more than arithmetic.

    Where a row's positive has the row's own id (`own`), the sum left it out. Then the loss is
    log(e^lse + e^pos) - pos = softplus(lse - pos), of slope sigmoid(lse - pos).
    """

    @staticmethod
    def forward(ctx, q, k, scale, q_ids, k_ids, bias, target, own, both, symmetric, reduction):
        row_lse, col_lse, pos = _forward(
            q, k, scale, q_ids, k_ids, bias, target, True, both, symmetric
        )
        loss = row_lse - pos
        if own is not None:
            loss = torch.where(own, torch.nn.functional.softplus(loss), loss)
        if both:
            cols = col_lse - pos
            if own is not None:
                cols = torch.where(own, torch.nn.functional.softplus(cols), cols)
            loss = 0.5 * (loss + cols)
        ctx.save_for_backward(q, k, scale, q_ids, k_ids, bias, target, row_lse, col_lse, pos, own)
        ctx.both, ctx.symmetric = both, symmetric
        ctx.weight = (0.5 if both else 1.0) / (q.shape[0] if reduction == "mean" else 1)
        return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        row_lse, col_lse, pos, own = ctx.saved_tensors[7:]
        drow = dcol = (ctx.weight * dloss).expand_as(row_lse).contiguous()
        if own is not None:
            drow = torch.where(own, drow * torch.sigmoid(row_lse - pos), drow)
            if ctx.both:
                dcol = torch.where(own, dcol * torch.sigmoid(col_lse - pos), dcol)
        dpos = -(drow + dcol) if ctx.both else -drow
        grads = _backward(ctx, drow, dcol if ctx.both else dpos.new_empty(0), dpos)
        return *grads, None, None, None, None, None


# ----------------------------------------------------------------------- 8. public functions


def _check_features(name: str, q: Tensor, k: Tensor | None) -> None:
    for label, x in (("q", q), ("k", k)):
        if x is None:
            continue
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"{name}: {label} must be a float32, bfloat16, float16 or float64 tensor, "
                f"got {got}. Convert it with .float()."
            )
        if x.dim() != 2 or 0 in x.shape:
            raise ValueError(
                f"{name}: {label} must be (rows, D) with at least one row and one column, "
                f"got {tuple(x.shape)}. Skip empty batches; flatten leading dimensions."
            )
    if k is None:
        return
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{name}: k must have q's width D={q.shape[1]}, got {tuple(k.shape)}. "
            "Project both to one width."
        )
    if q.device != k.device:
        raise ValueError(
            f"{name}: q and k must be on one device, got {q.device} and {k.device}. Use .to()."
        )


def _int_vector(name: str, label: str, x: Tensor | None, rows: int, device) -> Tensor | None:
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: {label} must be an integer tensor, got {got}. Use .long().")
    if x.shape != (rows,):
        raise ValueError(
            f"{name}: {label} must have shape ({rows},), one entry a row, got {tuple(x.shape)}."
        )
    if x.dtype == torch.int64:
        limit = torch.iinfo(torch.int32)
        if label == "target":  # what lies outside int32 lies outside [0, M) as well: keep it there
            x = x.clamp(limit.min, limit.max)
        elif x.device.type == "cpu" and not torch.compiler.is_compiling():
            if x.amin() < limit.min or x.amax() > limit.max:
                raise ValueError(
                    f"{name}: {label} must fit into 32 bits, got up to {int(x.abs().amax())}. "
                    "Renumber them with torch.unique(ids, return_inverse=True)[1]."
                )
    return x.to(device=device, dtype=torch.int32).contiguous()


def _scale_tensor(name: str, label: str, value: float | Tensor, q: Tensor) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: {label} must hold one number, got {tuple(value.shape)}.")
        return value.reshape(()).to(device=q.device, dtype=dtype)
    return torch.full((), value, device=q.device, dtype=dtype)


def _unit_rows(x: Tensor) -> Tensor:
    """L2-normalised in at least fp32: the squares of small fp16 numbers would underflow."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.normalize(x.to(dtype), dim=1).to(x.dtype)


def _prepare(name, q, k, scale, q_ids, k_ids, bias, target):
    """The op's tensor arguments, checked, in one dtype and on one device."""
    device, symmetric = q.device, k is None
    if q.dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    else:
        dtype = q.dtype if symmetric else torch.promote_types(q.dtype, k.dtype)
    if k is q:  # one tensor in both roles: as two, for the autograd Function
        k = q.view_as(q)
    q = q.to(dtype)
    if symmetric:
        if k_ids is not None or bias is not None:
            raise ValueError(f"{name}: q against itself (k=None) takes neither k_ids nor bias.")
        if q_ids is None:
            q_ids = torch.arange(q.shape[0], device=device, dtype=torch.int32)
    else:
        k = k.to(dtype)
        if k_ids is q_ids or (k_ids is None and q.shape[0] == k.shape[0]):
            k_ids = None
        elif (q_ids is None) != (k_ids is None):
            raise ValueError(f"{name}: q_ids and k_ids go together, got only one of them.")
        k_ids = _int_vector(name, "k_ids", k_ids, k.shape[0], device)
    q_ids = _int_vector(name, "q_ids", q_ids, q.shape[0], device)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.shape != k.shape[:1]:
            got = tuple(bias.shape) if isinstance(bias, Tensor) else bias
            raise ValueError(
                f"{name}: bias must be a tensor of shape ({k.shape[0]},), one entry a key, "
                f"got {got}."
            )
        bias = bias.to(device=device, dtype=scale.dtype).contiguous()
    target = _int_vector(name, "target", target, q.shape[0], device)
    return q, k, scale, q_ids, k_ids, bias, target


def contrastive_lse(
    q: Tensor,
    k: Tensor | None = None,
    scale: float | Tensor = 1.0,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    bias: Tensor | None = None,
    target: Tensor | None = None,
    rows: bool = True,
    cols: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of l_ij = scale <q_i, k_j> + bias_j by rows, by columns, or both from one tile.

    Args:
        q: (N, D) float32, bfloat16 or float16; float64 runs the materialising reference.
        k: (M, D) of q's dtype, or None for q against itself. Then only rows are given, every row
            leaves itself out, and the gradient uses the symmetry of q q^T.
        scale: number or one-element tensor (learnable, stays on the device).
        q_ids, k_ids: (N,) and (M,) integers of 32 bits (checked on the CPU only); pairs of equal
            ids are left out. k_ids defaults to q_ids where k has as many rows.
        bias: (M,) added to every logit of that key; not with k=None.
        target: (N,) integers in [0, M): the key whose logit is returned for each row, left out
            of the sums or not.
        rows, cols: which directions are wanted.

    Returns:
        row_lse (N,), col_lse (M,) and pos (N,) in float32, natural log; empty where not asked for.
        A row or column with every pair left out gives -inf and has no gradient.

    Raises:
        TypeError, ValueError: integer features, differing widths, empty batch, wrong shapes.

    Memory: O((N + M) D); no N x M array. Backward recomputes the logits.

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
    _check_features(name, q, k)
    if k is None and (cols or not rows):
        raise ValueError(f"{name}: q against itself (k=None) gives rows only.")
    scale = _scale_tensor(name, "scale", scale, q)
    args = _prepare(name, q, k, scale, q_ids, k_ids, bias, target)
    return _Contrastive.apply(*args, rows, cols, k is None)


def info_nce(
    q: Tensor,
    k: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    target: Tensor | None = None,
    symmetric: bool = False,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    bias: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE: loss_i = log sum_j e^l_ij - l_{i, target_i}, l_ij = <q_i, k_j> / tau + bias_j.

    Args:
        q: (N, D) anchors, float32, bfloat16, float16 (float64: materialising reference).
        k: (M, D) keys, or None for q against itself without the self-pairs (NT-Xent).
        temperature, logit_scale: exactly one of them; logit_scale = 1 / temperature. A number, or
            a one-element tensor, which may be learnable. Positive; only numbers are checked.
        target: (N,) integers, the positive key of each row; default: row i's is key i. With k=None
            it must be another row.
        symmetric: average the losses of rows and of columns (CLIP); needs N = M and no target.
        q_ids, k_ids: (N,), (M,) integers; pairs of equal ids are no negatives of each other.
            A row's own positive always counts. With k=None only q_ids is given.
        bias: (M,) added to every logit of that key.
        normalize: L2-normalise the rows of q and k first, in float32.
        reduction: "mean", "sum" or "none" for (N,) losses.

    Returns:
        A float32 scalar, or (N,).

    Raises:
        TypeError, ValueError: integer features, differing widths, empty batch, wrong shapes,
            non-positive temperature, a target outside [0, M) on the CPU.

    Memory: O((N + M) D); the logits are never stored.

    Notes: as in `contrastive_lse`. NaN or infinite features give a non-finite loss rather than an
        error, because looking at them would stall a GPU. One process: nothing is gathered.

    Example:
        >>> image, text = torch.randn(8, 16), torch.randn(8, 16)
        >>> loss = info_nce(image, text, temperature=0.1, symmetric=True, normalize=True)
        >>> loss.shape
        torch.Size([])

    Paper: CPC arXiv:1807.03748; CLIP arXiv:2103.00020; SimCLR arXiv:2002.05709.
    """
    name = "info_nce"
    _check_features(name, q, k)
    if (temperature is None) == (logit_scale is None):
        raise ValueError(f"{name}: give exactly one of temperature and logit_scale.")
    label, value = (
        ("temperature", temperature) if logit_scale is None else ("logit_scale", logit_scale)
    )
    if not isinstance(value, Tensor) and not value > 0:
        raise ValueError(f"{name}: {label} must be positive, got {value}. Typical: 0.07 to 0.5.")
    scale = _scale_tensor(name, label, value, q)
    if logit_scale is None:
        scale = scale.reciprocal()
    N = q.shape[0]
    if k is None and (target is None or symmetric):
        raise ValueError(f"{name}: q against itself (k=None) needs a target and symmetric=False.")
    if target is None:
        if k.shape[0] < N or (symmetric and k.shape[0] != N):
            raise ValueError(
                f"{name}: without a target, key i is row i's positive: k must have "
                f"{'' if symmetric else 'at least '}{N} rows, got {k.shape[0]}."
            )
        target = torch.arange(N, device=q.device, dtype=torch.int32)
    elif symmetric:
        raise ValueError(f"{name}: symmetric=True takes no target: key i is row i's positive.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{name}: reduction must be "mean", "sum" or "none", got {reduction!r}.')
    if normalize:
        q, k = _unit_rows(q), k if k is None else _unit_rows(k)
    args = _prepare(name, q, k, scale, q_ids, k_ids, bias, target)
    own = None
    if q_ids is not None:
        q_ids, k_ids, target = args[3], args[4], args[6]
        own = (q_ids if k_ids is None else k_ids)[target.long()] == q_ids
    return _InfoNCE.apply(*args, own, symmetric, k is None, reduction)
