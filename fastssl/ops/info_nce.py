"""InfoNCE and what people vary about it, on the ops `contrastive` and `queue`."""

import torch
from torch import Tensor

from fastssl.autograd import once_differentiable
from fastssl.dist import resolve_levels
from fastssl.ops import contrastive, queue
from fastssl.ops.checks import (
    Problem,
    check_features,
    check_reduction,
    check_target,
    float_vector,
    int_vector,
    number_or_tensor,
    prepare,
    reduced,
    scale_of,
    softplus,
    unit_rows,
)
from fastssl.ops.sharded import Sharded, shards_of


def _picked(x: Tensor, target: Tensor, groups: int) -> Tensor:
    """x[target] of a flat x, target counting inside its group; what lies outside is moved in."""
    target = target.long().clamp(0, len(x) // groups - 1)
    if groups > 1:
        first = torch.arange(groups, device=x.device) * (len(x) // groups)
        target = (target.view(groups, -1) + first[:, None]).flatten()
    return x[target]


def _losses(lse: Tensor, pos: Tensor, own: Tensor | None, masked: bool) -> Tensor:
    """lse - pos, or softplus of it where the sum left the positive out (`own`); 0 for a row whose
    keys are all left out, which can only be where something is `masked`."""
    if masked:
        dead = lse.isneginf()
        lse, pos = torch.where(dead, 0.0, lse), torch.where(dead, 0.0, pos)
    loss = lse - pos
    if own is not None:
        loss = torch.where(own, softplus(loss), loss)
    return torch.where(dead, 0.0, loss) if masked else loss


def _slopes(d: Tensor, lse: Tensor, pos: Tensor, own: Tensor | None, masked: bool) -> Tensor:
    """d times the derivative of `_losses` by lse."""
    if own is not None:
        d = torch.where(own, d * torch.sigmoid(lse - pos), d)
    return torch.where(lse.isneginf(), 0.0, d) if masked else d


class InfoNCE(torch.autograd.Function):
    """The plain loss in one node: at small N autograd costs more than arithmetic.

    Where a row's positive has the row's own id (`own`), the sum left it out. Then the loss is
    log(e^lse + e^pos) - pos = softplus(lse - pos), of slope sigmoid(lse - pos). With `frozen` keys
    the forward brings the query's gradient along, in fp32, and there is no second pass.
    """

    @staticmethod
    def forward(
        ctx, q, k, scale, q_ids, k_ids, keep_equal, bias, limit,
        target, own, both, groups, frozen, store, reduction,
    ):  # fmt: skip
        problem = Problem(q, k, scale, q_ids, k_ids, keep_equal, bias, limit)
        out = col_lse = logits = None
        if frozen:
            row_lse, out = queue.forward(problem, groups)
            pos = scale * (q.to(scale.dtype) * _picked(k, target, groups)).sum(1)
            inside = (target >= 0) & (target < len(k) // groups)
            pos = torch.where(inside, pos, torch.nan)
            if bias is not None:
                pos = pos + _picked(bias, target, groups)
        else:
            row_lse, col_lse, pos, logits = contrastive.forward(
                problem, target, True, both, k is None, groups, store
            )
        masked = bias is not None
        if both and own is None and not masked:
            loss = torch.lerp(row_lse, col_lse, 0.5) - pos
        else:
            loss = _losses(row_lse, pos, own, masked)
            if both:
                loss = torch.lerp(loss, _losses(col_lse, pos, own, masked), 0.5)
        ctx.save_for_backward(
            q, k, scale, q_ids, k_ids, bias, limit, target, own,
            logits, row_lse, col_lse, pos, out,
        )  # fmt: skip
        ctx.keep_equal, ctx.both, ctx.groups = keep_equal, both, groups
        ctx.weight = (0.5 if both else 1.0) / (q.shape[0] if reduction == "mean" else 1)
        return reduced(loss, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        q, k, scale, q_ids, k_ids, bias, limit, target, own, *statistics, pos, out = (
            ctx.saved_tensors
        )
        _, row_lse, col_lse = statistics
        masked = bias is not None
        d = torch.full_like(row_lse, ctx.weight).mul_(dloss)
        drow = _slopes(d, row_lse, pos, own, masked)
        if out is not None:
            difference = out - _picked(k, target, ctx.groups)
            by_row = drow.unsqueeze(1) * difference  # (N, D)
            dscale = (q * by_row).sum() if ctx.needs_input_grad[2] else None
            dq = (scale * by_row).to(q.dtype) if ctx.needs_input_grad[0] else None
            return dq, None, dscale, *[None] * 12
        dcol, dpos = col_lse, -drow
        if ctx.both:
            dcol = _slopes(d, col_lse, pos, own, masked)
            dpos = -(drow + dcol)
        upstream = contrastive.Upstream(drow, dcol, dpos)
        problem = Problem(q, k, scale, q_ids, k_ids, ctx.keep_equal, bias, limit)
        grads = contrastive.backward(
            problem, target, (None, None), statistics, upstream, ctx.groups, contrastive.needed(ctx)
        )
        return *grads, *[None] * 7


def _without_positive(
    problem: Problem, target: Tensor, M: int, groups: int, first: int = 0
) -> Problem:
    """Each row's id its positive's place, counted from `first`, unless there are ids already."""
    if problem.q_ids is not None:
        return problem
    every_key = torch.arange(first, first + M, device=target.device, dtype=torch.int32)
    every_key = every_key.repeat(groups if len(problem.q) else 0)
    return problem._replace(q_ids=target + first, k_ids=every_key)


def _soft_losses(problem: Problem, target: Tensor, lse: Tensor) -> Tensor:
    """sum_j t_ij (lse_i - l_ij) of targets (G, N, M)."""
    groups, N, M = target.shape
    with torch.autocast(target.device.type, enabled=False):
        means = (target @ problem.k.unflatten(0, (groups, M))).flatten(0, 1)  # (G N, D)
    pos = problem.scale * (problem.q * means).sum(1)
    if problem.bias is not None:
        weighted = torch.where(target == 0, 0.0, target * problem.bias.view(groups, 1, M))
        pos = pos + weighted.sum(2).flatten()
    return target.sum(2).flatten() * lse - pos


def _learns(x) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()


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
    margin: float | None = None,
    decoupled: bool = False,
    hard_negatives: Tensor | None = None,
    soft_target: Tensor | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    row_weight: float = 0.5,
    normalize: bool = False,
    store_logits: bool = False,
    return_lse: bool = False,
    reduction: str = "mean",
    group=None,
    exchange: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """InfoNCE: loss_i = log sum_j e^l_ij - l_{i, target_i}, l_ij = <q_i, k_j> / tau + bias_j.

    Args:
        q: (N, D) anchors, float32, bfloat16, float16 (float64: materialising reference). Or
            (G, N, D): G problems of one size; then every vector below has a leading G as well.
        k: (M, D) keys, or None for q against itself without the self-pairs (NT-Xent).
        temperature, logit_scale: exactly one of them; logit_scale = 1 / temperature. A number, or
            a one-element tensor, which may be learnable. Positive; only numbers are checked.
        target: (N,) integers, the positive key of each row; default: row i's is key i. With k=None
            it must be another row.
        symmetric: average the losses of rows and of columns (CLIP); needs N = M and no target.
        q_ids, k_ids: (N,), (M,) integers of 32 bits (checked on the CPU only); pairs of equal ids
            are no negatives of each other. A row's own positive always counts. With k=None only
            q_ids is given.
        bias: (M,) added to every logit of that key.
        margin: keys with <q_i, k_j> > <q_i, k_target> + margin are taken for false negatives and
            left out, in units of the product (cosine of normalised rows). May be negative: the
            positive itself always counts. Needs k.
        decoupled: the positive leaves the denominator (DCL). A row and its positive must share
            their id where q_ids are given, as they must be with k=None.
        hard_negatives: (N, H, D) further negatives of each row alone, in the row direction.
        soft_target: (N, M) weights t_ij in place of the target: sum_j t_ij (lse_i - l_ij). Needs
            k; not symmetric, not with margin or decoupled. The products run in float32.
        label_smoothing: share in [0, 1) of the target spread evenly over all keys, so the loss is
            infinite where the bias of a key is; not with ids, margin, decoupled or hard_negatives.
        sample_weight: (N,) factor of each row's loss (of each pair's, if symmetric).
        row_weight: share of the row direction if symmetric (ConVIRT); the columns' is the rest.
        normalize: L2-normalise the rows first, in float32.
        store_logits: keep the logits for the backward: one product less for 4 N M bytes. Needs k.
        return_lse: also return the log-sum-exp over keys, (N,), or (2, N) for rows and columns.
        reduction: "mean" of the weighted losses, "sum" or "none" for (N,) losses.
        group: whose ranks' rows are one batch: None (all processes, once torch.distributed is
            initialised), a process group, a DeviceMesh of one dimension or two (nodes, and the
            ranks of a node), or fastssl.LOCAL for this process alone. Every rank gives its own
            rows, any number of them; row i's positive is among its own keys, and target counts
            within those. Groups of problems (3-D q) stay where they are.
        exchange: how keys reach other ranks: "gather" all of them, "ring" block by block (with a
            mesh of two dimensions: gathered inside a node, round the nodes), or "auto": a ring over
            such a mesh, and where all keys would take more than 1 GiB.

    Returns:
        A float32 scalar, or (N,); with return_lse a pair. Over several ranks the scalar is that of
        the rows of all ranks, equal on each.

    Raises:
        TypeError, ValueError: integer features, differing widths, empty batch, wrong shapes,
            non-positive temperature, options that exclude each other, a target outside [0, M) on
            the CPU; on all ranks, what differs between them and must not. RuntimeError: a rank has
            stopped.

    Memory: O((N + M) D); the logits are never stored unless asked for. Keys that take no gradient
        cost 2 products of N x M x D in all, or 3 with any of margin, decoupled, hard_negatives,
        soft_target, label_smoothing, sample_weight and return_lse; both sides 4, q = k 2.5.

    Notes: as in `contrastive_lse`. A row whose keys are all left out has loss 0 and no gradient.
        NaN or infinite features give a non-finite loss rather than an error, because looking at
        them would stall a GPU. Over W ranks see `docs/distributed.md`: gradients are those of the
        sum of all ranks' losses, which after DistributedDataParallel's mean is the gradient of one
        process with the whole batch.

    Example:
        >>> image, text = torch.randn(8, 16), torch.randn(8, 16)
        >>> loss = info_nce(image, text, temperature=0.1, symmetric=True, normalize=True)
        >>> loss.shape
        torch.Size([])

    Paper: CPC arXiv:1807.03748; CLIP arXiv:2103.00020; SimCLR arXiv:2002.05709; ConVIRT
        arXiv:2010.00747; DCL arXiv:2110.06848.
    """
    name = "info_nce"
    alone = not resolve_levels(name, group)
    check_features(name, empty=not alone, q=q, k=k)
    scale = scale_of(name, temperature, logit_scale, q)
    check_reduction(name, reduction)
    rows = q.shape[:-1]
    keys = rows if k is None else k.shape[:-1]
    N, M = rows[-1], keys[-1]
    if k is None and (target is None or symmetric):
        raise ValueError(f"{name}: q against itself (k=None) needs a target and symmetric=False.")
    given = target is not None
    if soft_target is not None:
        if target is not None or symmetric or k is None or margin is not None or decoupled:
            raise ValueError(
                f"{name}: soft_target needs k and excludes target, symmetric, margin and decoupled."
            )
        if soft_target.shape != (*rows, M):
            raise ValueError(
                f"{name}: soft_target must have shape {(*rows, M)}, got {tuple(soft_target.shape)}."
            )
    elif target is None:
        if M < N or (symmetric and M != N):
            raise ValueError(
                f"{name}: without a target, key i is row i's positive: k must have "
                f"{'' if symmetric else 'at least '}{N} rows, got {M}."
            )
        target = torch.arange(N, device=q.device, dtype=torch.int32)
        if q.dim() == 3:
            target = target.repeat(len(q))
    elif symmetric:
        raise ValueError(f"{name}: symmetric=True takes no target: key i is row i's positive.")
    if hard_negatives is not None:
        check_features(name, empty=not alone, hard_negatives=hard_negatives.flatten(0, -2))
        if hard_negatives.shape[:-2] != rows or hard_negatives.shape[-1] != q.shape[-1]:
            raise ValueError(
                f"{name}: hard_negatives must be {(*rows, 'H', q.shape[-1])}, "
                f"got {tuple(hard_negatives.shape)}."
            )
    if margin is not None and k is None:
        raise ValueError(f"{name}: margin needs k.")
    if store_logits and k is None:
        raise ValueError(f"{name}: store_logits needs k.")
    varied = decoupled or margin is not None or hard_negatives is not None
    if label_smoothing and (varied or soft_target is not None or q_ids is not None):
        raise ValueError(
            f"{name}: label_smoothing spreads over all keys: it excludes ids, margin, decoupled, "
            "hard_negatives and soft_target."
        )
    if not 0 <= label_smoothing < 1 or not 0 <= row_weight <= 1:
        raise ValueError(
            f"{name}: label_smoothing must lie in [0, 1) and row_weight in [0, 1], "
            f"got {label_smoothing} and {row_weight}."
        )
    if not alone and (soft_target is not None or store_logits):
        raise ValueError(
            f"{name}: soft_target and store_logits need all logits in one place. Give "
            "group=fastssl.LOCAL."
        )
    if normalize:
        q, k = unit_rows(q), k if k is None else unit_rows(k)
    if given:
        target = int_vector(name, "target", target, rows, q.device)
        check_target(name, target, M)
    if decoupled and q_ids is None and (k is None or target is None):
        raise ValueError(f"{name}: decoupled needs a target and, with k=None, q_ids.")

    if margin is not None and symmetric:  # each direction leaves out other pairs
        options = {
            "logit_scale": scale, "margin": margin, "decoupled": decoupled, "reduction": "none",
            "sample_weight": sample_weight, "group": group, "exchange": exchange,
        }  # fmt: skip
        if bias is not None or hard_negatives is not None or return_lse or store_logits:
            raise ValueError(
                f"{name}: margin with symmetric=True excludes bias, hard_negatives, return_lse "
                "and store_logits."
            )
        by_row = info_nce(q, k, q_ids=q_ids, k_ids=k_ids, **options)
        by_col = info_nce(k, q, q_ids=q_ids if k_ids is None else k_ids, k_ids=q_ids, **options)
        shards, _ = shards_of(name, group, exchange, q.flatten(0, -2), k.flatten(0, -2))
        return reduced(row_weight * by_row + (1 - row_weight) * by_col, reduction, shards)

    # The gradients of the two parts of a soft loss, which cancel near convergence, are rounded one
    # by one.
    dtype = None if soft_target is None else scale.dtype
    problem, groups = prepare(name, q, k, scale, q_ids, k_ids, bias=bias, dtype=dtype)
    options = {
        "dimensions": q.dim(), "k": k is not None, "ids": q_ids is not None,
        "bias": bias is not None, "symmetric": symmetric, "decoupled": decoupled, "margin": margin,
    }  # fmt: skip
    numbers = number_or_tensor(temperature, logit_scale, label_smoothing, row_weight)
    shards, key_shards = shards_of(
        name, group, exchange, problem.q, problem.k, scale, problem.bias,
        **{"the reduction": reduction, "the options": options},
        **{"temperature, logit_scale, label_smoothing and row_weight": numbers},
    )  # fmt: skip
    first = 0 if shards is None else key_shards.first
    own = None
    if decoupled or margin is not None:
        problem = _without_positive(problem, target, M, groups, first)
    if margin is not None:
        with torch.no_grad():
            x, y = problem.q.to(scale.dtype), _picked(problem.k, target, groups).to(scale.dtype)
            product = (x * y).sum(1)
            # A copy of the positive is no false negative, however the two products rounded.
            slack = 1e-5 * torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1)
            problem = problem._replace(limit=product + margin + slack)
            own = product > problem.limit  # only where the margin is negative
    if problem.q_ids is not None and target is not None:
        k_ids = problem.q_ids if problem.k_ids is None else problem.k_ids
        same = _picked(k_ids, target, groups) == problem.q_ids
        own = same if own is None else own | same
    weight = float_vector(name, "sample_weight", sample_weight, rows, scale)
    frozen = not (symmetric or k is None or store_logits or _learns(k) or _learns(bias))
    plain = not (varied or label_smoothing or return_lse) and soft_target is None
    plain = plain and weight is None and (row_weight == 0.5 or not symmetric)
    if plain and shards is None:
        frozen = frozen and _learns(problem.q)
        if frozen and problem.q_ids is None:
            # Without the positive in the sum its softmax weight, near 1 at convergence, is never
            # rounded and then subtracted from 1.
            problem = _without_positive(problem, target, M, groups)
            own = torch.ones_like(target, dtype=torch.bool)
        loss = InfoNCE.apply(
            *problem, target, own, symmetric, groups, frozen, store_logits, reduction
        )
        return loss.view(rows) if reduction == "none" else loss

    if shards is None or q.dim() == 3:
        row_lse, col_lse, pos, *total, count = contrastive.Contrastive.apply(
            *problem, target, True, symmetric, groups, store_logits, label_smoothing > 0
        )
    else:
        row_lse, col_lse, pos, *total, count = Sharded.apply(
            *problem, target, symmetric, label_smoothing > 0, None, None, key_shards
        )
    wide = scale.dtype
    if hard_negatives is not None:
        extra = unit_rows(hard_negatives) if normalize else hard_negatives
        extra = extra.to(problem.q.dtype).flatten(0, -3)  # (N, H, D)
        extra = scale * (extra.to(wide) * problem.q.to(wide).unsqueeze(1)).sum(2)  # (N, H)
        row_lse = torch.logaddexp(row_lse, extra.logsumexp(1))

    def losses(lse, total):
        if soft_target is not None:
            gap = _soft_losses(problem, soft_target.to(wide).view(groups, N, M), lse)
        else:
            gap = _losses(lse, pos, None if decoupled else own, True)
        if label_smoothing:
            gap = gap + label_smoothing * (pos - total / count.clamp(min=1))
        return torch.where(lse.isneginf(), 0.0, gap)

    loss = losses(row_lse, total[0])
    if symmetric:
        loss = row_weight * loss + (1 - row_weight) * losses(col_lse, total[1])
    if weight is not None:
        loss = loss * weight
    loss = reduced(loss.view(rows), reduction, shards)
    if not return_lse:
        return loss
    lse = torch.stack([row_lse, col_lse] if symmetric else [row_lse])
    if own is not None and not decoupled:  # the positive counts
        lse = torch.where(own, torch.logaddexp(lse, pos), lse)
    return loss, lse.view(2, *rows) if symmetric else lse.view(rows)
