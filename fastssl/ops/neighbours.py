"""Nearest rows by inner product, in blocks: KoLeo, which spreads features, and top-k search."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastssl.autograd import once_differentiable, with_gradient
from fastssl.dist import all_sum, gather_rows, host_may_wait, resolve_levels, scatter_sums
from fastssl.extension import cpu_features
from fastssl.ops.blocks import steps, wide, world
from fastssl.ops.checks import check_features, unit_rows
from fastssl.ops.contrastive import lib, without_autocast
from fastssl.ops.product import product
from fastssl.ops.sharded import shards_of

# On the CPU KoLeo of no more multiplications, N^2 D, is whole and in few calls: 1.2 to 1.6 times as
# fast as in blocks up to 512 x 64, where calls cost more than arithmetic, and as fast at 512 x 128.
# So is a search of a sixteenth of them, N M D.
SMALL = 1 << 25
LAST = 2**32 - 1  # column
NOT_YET = -(2**63)


def _keys(x: Tensor, first: int) -> Tensor:
    """int64, no two of a row alike: a float32's bits, ascending as integers, over its column from
    behind, so that of equal ones the first is the largest. NaN is larger than all."""
    bits = (x + 0.0).view(torch.int32)  # -0 becomes 0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = bits.masked_fill_(x.isnan(), 0x7FFFFFFF)
    places = LAST - first - torch.arange(x.shape[1], device=x.device)
    return torch.add(places, bits.long(), alpha=LAST + 1)


def topk_ref_(best: Tensor, scores: Tensor, scale: Tensor | None, first: int) -> None:
    """best (R, k), the largest keys so far, takes in those of scores (R, C) float32, times scale
    (C,)."""
    scores = scores if scale is None else scores * scale
    best.copy_(torch.cat([best, _keys(scores, first)], 1).topk(best.shape[1]).values)


def topk_result_ref(best: Tensor) -> tuple[Tensor, Tensor]:
    """The scores (R, k), largest first, and their columns."""
    best = best.sort(dim=1, descending=True).values
    bits = (best >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32), LAST - (best & LAST)


def inverse_lengths_ref(x: Tensor) -> Tensor:
    """(R,) in float32: 1 / |x| by rows, of at least 1e-12."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).clamp_(min=1e-12).reciprocal_()


lib.define("topk_(Tensor(a!) best, Tensor scores, Tensor? scale, int first) -> ()")
lib.define("topk_result(Tensor best) -> (Tensor, Tensor)")
lib.define("inverse_lengths(Tensor x) -> Tensor")
lib.impl("topk_", topk_ref_, "CompositeExplicitAutograd")
lib.impl("topk_result", topk_result_ref, "CompositeExplicitAutograd")
lib.impl("inverse_lengths", inverse_lengths_ref, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastssl::topk_result",
    lambda best: (best.new_empty(best.shape, dtype=torch.float32), torch.empty_like(best)),
    lib=lib,
)
torch.library.register_fake(
    "fastssl::inverse_lengths", lambda x: x.new_empty(x.shape[0], dtype=torch.float32), lib=lib
)


def _largest(x: Tensor, k: int) -> Tensor:
    """(R, k): the places of each row's k largest, in ascending order; of equal ones the first."""
    if x.dtype == torch.float64:
        index = x.sort(dim=1, descending=True, stable=True).indices[:, :k]
    else:
        index = torch.full((len(x), k), NOT_YET, device=x.device)
        torch.ops.fastssl.topk_(index, x, None, 0)
        index = LAST - (index & LAST)
    return index.sort(dim=1).values


def _products(y: Tensor, every: Tensor, at: int) -> Tensor:
    """(rows, n); -inf for a row with itself, where the first stands at `at`."""
    products = product(y, every.T)
    products.diagonal(at).fill_(-math.inf)
    return products


def _neighbours(y: Tensor, every: Tensor, first: int, k: int) -> Tensor:
    """(N, k): the rows of `every` with the largest product with each row of y but the row itself,
    which stands at `first` and after."""
    if k == 1 and y.dtype == torch.float32 and len(every) >= 1024 and host_may_wait(y):
        if y.device.type == "cpu" and "AVX512-BF16" in cpu_features():
            return _nearest_by_bf16(y, every, first).unsqueeze(1)
    if not k:
        return torch.empty(len(y), 0, dtype=torch.int64, device=y.device)

    def nearest(s):
        products = _products(y[s], every, first + s.start)
        return products.argmax(1, keepdim=True) if k == 1 else _largest(products, k)

    return _joined(map(nearest, steps(len(y), len(every), y.dtype)), y.new_empty(0, k).long())


def _joined(parts: Iterable[Tensor], empty: Tensor) -> Tensor:
    """One under the other; most often there is only one."""
    first, *others = [*parts] or [empty]
    return torch.cat([first, *others]) if others else first


def _nearest_by_bf16(y: Tensor, every: Tensor, first: int) -> Tensor:
    """(N,): the nearest rows as fp32 finds them. The error of a product in bf16 is bounded by what
    its rows lost in rounding, so that fp32 is needed only for the few that may be the largest."""
    coarse = every.bfloat16()  # (n, D)
    lost, length = every.new_empty(2, len(every)).unbind()
    for s in steps(*every.shape, every.dtype):
        lost[s] = torch.linalg.vector_norm(every[s] - coarse[s], dim=1)
        length[s] = torch.linalg.vector_norm(every[s], dim=1)
    longest, most_lost = (length + lost).amax(), lost.amax()
    index = torch.empty(len(y), dtype=torch.int64, device=y.device)
    for s in steps(len(y), len(every), y.dtype):
        own = slice(first + s.start, first + s.stop)
        products = _products(coarse[own], coarse, own.start)
        nearest = products.max(1).indices
        least = (y[s] * every[nearest]).sum(1)
        error = lost[own] * longest + (length[own] + lost[own]) * (most_lost + 1e-5 * longest)
        i, j = (products >= (least - error).unsqueeze(1)).nonzero().unbind(1)
        if len(i) > 8 * len(nearest):
            for t in steps(len(nearest), 2 * len(every), y.dtype):
                at = s.start + t.start
                rows = y[at : s.start + t.stop]
                index[at : s.start + t.stop] = _products(rows, every, first + at).argmax(1)
            continue
        exact = (y[s][i] * every[j]).sum(1)
        best = torch.full_like(least, -math.inf).scatter_reduce_(0, i, exact, "amax")
        i, j = (x[exact == best[i]] for x in (i, j))
        index[s] = nearest.scatter_reduce_(0, i, j, "amin", include_self=False)
    return index


def _unit(x: Tensor, eps: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """The rows in at least fp32, over their lengths (N, 1); those shorter than eps over eps."""
    x = x.to(wide(x))
    if not normalize:
        return x, x.new_ones(len(x), 1)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / length.clamp(min=eps), length


def _through_unit(dy: Tensor, y: Tensor, length: Tensor, eps: float) -> Tensor:
    """The gradient in x from that in y, in place."""
    along = (dy * y).sum(1, keepdim=True).masked_fill_(length < eps, 0)
    return dy.addcmul_(y, along, value=-1).div_(length.clamp(min=eps))


@without_autocast
def _koleo_fwd(x, eps, p, topk, normalize, shards):
    """The loss, its neighbours (N, k) and their distances."""
    y, _ = _unit(x, eps, normalize)
    n, first, levels = len(x), 0, ()
    if shards is not None:
        n, first, levels = shards.total, shards.first, shards.levels
    every = y if shards is None else gather_rows(y, shards)
    k = min(topk, n - 1)
    index = _neighbours(y, every, first, k)

    def distances(s, c):
        difference = (y[s] - every[index[s, c]]).add_(eps)
        return torch.linalg.vector_norm(difference, ord=p, dim=1, keepdim=True)

    blocks, none = steps(*y.shape, y.dtype), y.new_empty(0, 1)
    columns = [_joined((distances(s, c) for s in blocks), none) for c in range(k)]
    distance = columns[0] if k == 1 else torch.cat([y.new_empty(len(y), 0), *columns], 1)  # (N, k)
    total = all_sum((distance + eps).log_().sum(dtype=torch.float64), levels)
    return (total / -max(n * k, 1)).to(y.dtype), index, distance


@without_autocast
def _koleo_bwd(x, index, distance, slope, eps, p, normalize, shards):
    y, length = _unit(x, eps, normalize)
    every, n = y, len(x)
    if shards is not None:
        every, n = gather_rows(y, shards), shards.total
    k = index.shape[1]
    weight = slope / -max(n * k, 1) / (distance + eps)  # (N, k)
    blocks = steps(*y.shape, y.dtype)
    alone = shards is None and len(blocks) == k == 1
    dy, devery = (None, None) if alone else (torch.zeros_like(y), torch.zeros_like(every))
    for c in range(k):
        for s in blocks:
            j, d = index[s, c], distance[s, c].unsqueeze(1)
            g = (y[s] - every[j]).add_(eps).div_(d.masked_fill(d == 0, 1))
            if p != 2:
                g = g.sign() * g.abs().pow_(p - 1)
            g.mul_(weight[s, c].unsqueeze(1))
            if alone:
                dy = torch.index_add(g, 0, j, g, alpha=-1)
                continue
            dy[s] += g
            devery.index_add_(0, j, g, alpha=-1)
    if not alone:
        dy += devery if shards is None else scatter_sums(devery, shards)
    if normalize:
        dy = _through_unit(dy, y, length, eps)
    if dy.dtype != x.dtype:  # of equal rows the gradient may be too large for fp16
        limit = torch.finfo(x.dtype).max
        dy = dy.clamp_(-limit, limit).to(x.dtype)
    return dy


@without_autocast
def _koleo_small(x, eps, normalize, needs):
    """The loss of the nearest row, in the norm of p = 2, and dx if needed: by all products, in few
    calls."""
    y, length = _unit(x, eps, normalize)
    index = (y @ y.T).fill_diagonal_(-math.inf).argmax(1)
    difference = (y - y.index_select(0, index)).add_(eps)
    distance = torch.linalg.vector_norm(difference, dim=1, keepdim=True)
    shifted = distance + eps
    loss = shifted.log().mean().neg_()
    if not any(needs):
        return loss, None
    weight = distance.masked_fill_(distance == 0, 1).mul_(shifted).reciprocal_()
    g = difference.mul_(weight.div_(-len(x)))
    dy = torch.index_add(g, 0, index, g, alpha=-1)
    return loss, _through_unit(dy, y, length, eps) if normalize else dy


def _is_small(x: Tensor) -> bool:
    """fp16, whose gradient may overflow, is left to the other form."""
    if x.device.type != "cpu" or x.dtype == torch.float16 or len(x) < 2:
        return False
    return len(x) * x.numel() <= SMALL


class KoLeo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps, p, topk, normalize, shards):
        loss, index, distance = _koleo_fwd(x, eps, p, topk, normalize, shards)
        ctx.save_for_backward(x, index, distance)
        ctx.options = eps, p, normalize, shards
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        slope = dloss * world(ctx.options[-1])
        return _koleo_bwd(*ctx.saved_tensors, slope, *ctx.options), *[None] * 5


def koleo(
    x: Tensor,
    *,
    eps: float = 1e-8,
    p: float = 2,
    topk: int = 1,
    normalize: bool = True,
    group=None,
) -> Tensor:
    """KoLeo, which pushes each row away from its nearest: loss = -mean_i log(d_i + eps).

    d_i = ||y_i - y_j + eps||_p, y = x / |x|, j the other row of largest <y_i, y_j>.

    Args:
        x: (N, D) float32, bfloat16, float16 (computed in float32) or float64.
        eps: > 0; also the least length that a row is divided by.
        p: >= 1, the norm of the distance.
        topk: >= 1, the number of nearest rows that each row is pushed away from, the mean over
            which is taken; all other rows where there are fewer.
        normalize: False takes rows as they are.
        group: whose ranks' rows are one batch, as in `info_nce`. Every rank has its own N, also 0.

    Returns:
        A float32 (float64) scalar, equal on all ranks; 0, of gradient 0, for one row.

    Raises:
        TypeError, ValueError: integer x, eps, p or topk out of range; on all ranks, what differs
            between them and must not.

    Memory: O(n D), n the rows of all ranks, and blocks of 8 MiB: no N x n products, but of few rows
        on a CPU.

    Notes: the choice of j takes no gradient, y_i and y_j do, on whichever rank. Of rows equally
        near the first counts. Value and gradient are finite also for equal rows and for rows of
        zeros; the gradient may be as large as 1 / eps, in float16 cut off at 65504. Products in
        float32; autocast has no effect. Deterministic on the CPU; on a GPU as index_add_ is.
        Gradients over several ranks as in `info_nce`.

    Example:
        >>> koleo(torch.randn(8, 16)).shape
        torch.Size([])

    Paper: spreading vectors for similarity search, arXiv:1806.03198; DINOv2, arXiv:2304.07193.
    """
    name = "koleo"
    check_features(name, empty=bool(resolve_levels(name, group)), x=x)
    if x.dim() != 2:
        raise ValueError(f"{name}: x must be (N, D), got {tuple(x.shape)}.")
    if not eps > 0:
        raise ValueError(f"{name}: eps must be positive, got {eps}. Typical: 1e-8.")
    if not 1 <= p < math.inf:
        raise ValueError(f"{name}: p must be a finite number >= 1, got {p}. Typical: 2.")
    if not isinstance(topk, int) or topk < 1:
        raise ValueError(f"{name}: topk must be an integer >= 1, got {topk!r}.")
    options = {"eps": eps, "p": p, "topk": topk, "normalize": normalize}
    shards, _ = shards_of(name, group, "gather", x, None, **{"the options": options})
    if shards is None and p == 2 and topk == 1 and _is_small(x):
        return with_gradient(name, _koleo_small, (x,), eps, normalize)
    return KoLeo.apply(x, eps, p, topk, normalize, shards)


@torch.no_grad()
def topk_cosine(
    queries: Tensor, bank: Tensor, k: int, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k rows of the bank of largest cosine with each query, largest first.

    Args:
        queries: (N, D), bank: (M, D) float32, bfloat16, float16 (computed in float32) or float64.
        k: 1 <= k <= M.
        chunk: rows of the bank in one product; None: 8192, or k if that is more.

    Returns:
        cosines (N, k) in float32 (float64) and rows of the bank (N, k), int64, without a gradient.

    Raises:
        TypeError, ValueError: integer features, differing widths, k or chunk out of range.

    Memory: the result, one chunk of the bank in float32, blocks of 8 MiB: no N x M cosines.

    Notes: of equal cosines the lower row comes first. Deterministic; equal for every chunk but for
        the rounding of products. A row of zeros has cosine 0 with all. Autocast has no effect.

    Example:
        >>> cosines, rows = topk_cosine(torch.eye(4), torch.eye(4)[[2, 0, 1, 3]], 1)
        >>> rows.flatten().tolist()
        [1, 2, 0, 3]

    Paper: k nearest neighbours as in arXiv:1805.01978; NNCLR, arXiv:2104.14548.
    """
    name = "topk_cosine"
    check_features(name, queries=queries, bank=bank)
    if queries.dim() != 2:
        raise ValueError(f"{name}: queries must be (N, D), got {tuple(queries.shape)}.")
    if not isinstance(k, int) or not 1 <= k <= len(bank):
        raise ValueError(
            f"{name}: k must be an integer from 1 to the bank's {len(bank)} rows, got {k!r}."
        )
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"{name}: chunk must be an integer >= 1, got {chunk!r}.")
    return _topk_cosine(queries, bank, k, max(8192, k) if chunk is None else chunk)


@without_autocast
def _topk_cosine(queries, bank, k, chunk):
    dtype = wide(queries, bank)
    if dtype == torch.float64:
        return _topk_cosine_ref(unit_rows(queries.to(dtype)), bank, k, chunk)
    if queries.device.type == "cpu" and len(bank) <= chunk:
        if 16 * queries.numel() * len(bank) <= SMALL:
            return _topk_cosine_small(queries.to(dtype), bank.to(dtype), k)
    # The bank's lengths are left out of the products, and those of queries that must stay bf16.
    ops, narrow = torch.ops.fastssl, dtype
    if queries.dtype == bank.dtype == torch.bfloat16:
        narrow = torch.bfloat16
    queries, bank = (x if x.stride(1) == 1 else x.contiguous() for x in (queries, bank))
    queries = queries.to(narrow)
    inverse = ops.inverse_lengths(queries).unsqueeze(1)
    if narrow == dtype:
        queries = queries * inverse
    best = torch.full((len(queries), k), NOT_YET, device=queries.device)
    for first in range(0, len(bank), chunk):
        keys = bank[first : first + chunk].to(queries.dtype)  # (C, D)
        of_keys = ops.inverse_lengths(keys)
        for s in steps(len(queries), len(keys), dtype):
            ops.topk_(best[s], product(queries[s], keys.T), of_keys, first)
    cosines, rows = ops.topk_result(best)
    return cosines if narrow == dtype else cosines.mul_(inverse), rows


def _topk_cosine_small(queries, bank, k):
    """With all products at once, in few calls."""
    ops, length = torch.ops.fastssl, torch.linalg.vector_norm
    queries = queries / length(queries, dim=1, keepdim=True).clamp_(min=1e-12)
    inverse = length(bank, dim=1).clamp_(min=1e-12).reciprocal_()
    best = torch.full((len(queries), k), NOT_YET, device=queries.device)
    ops.topk_(best, torch.mm(queries, bank.T), inverse, 0)
    return ops.topk_result(best)


def _topk_cosine_ref(queries, bank, k, chunk):
    best = queries.new_full((len(queries), k), -math.inf)
    rows = torch.zeros_like(best, dtype=torch.int64)
    for first in range(0, len(bank), chunk):
        keys = unit_rows(bank[first : first + chunk].to(queries.dtype))  # (C, D)
        known = min(first, k)  # so many columns of best are filled, in the order of the bank
        for s in steps(len(queries), len(keys), queries.dtype):
            products = queries[s] @ keys.T  # (R, C)
            near = _largest(products, min(k, len(keys)))
            both = torch.cat([best[s, :known], products.gather(1, near)], 1)
            found = torch.cat([rows[s, :known], near + first], 1)
            kept = _largest(both, min(k, both.shape[1]))
            best[s, : kept.shape[1]] = both.gather(1, kept)
            rows[s, : kept.shape[1]] = found.gather(1, kept)
    best, order = best.sort(dim=1, descending=True, stable=True)
    return best, rows.gather(1, order)
