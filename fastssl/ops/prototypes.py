"""Assigning samples to prototypes: Sinkhorn-Knopp as a softmax with one bias for each prototype.

With x = scores / epsilon, n iterations of "prototypes share the mass, then every sample sums to 1"
give softmax_k(x_bk + l_k) exactly, where
l_k = log r_k - log sum_b e^x_bk, then n - 1 times l_k += log r_k - log sum_b softmax_k(x + l)_bk.
So codes need no copy of the B x K scores, and what ranks exchange is K numbers an iteration.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastssl.dist import Level, agree, all_logsumexp, resolve_levels
from fastssl.ops.blocks import wide
from fastssl.ops.checks import check_floating, checksum
from fastssl.ops.contrastive import lib, on_cuda, without_autocast

# A prototype that a pass leaves without mass is lifted by this much, and finds its level again.
LEAST_LOG_SUM = math.log(1e-37)


@without_autocast
def sinkhorn_pass_ref(scores: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """(K,) of (B, K), x = scale s: log sum_b e^x_bk, or log sum_b softmax_k(x_bk + bias_k)."""
    x = scores.to(wide(scores)) * scale
    if bias is not None:
        x = (x + bias.to(x.dtype)).log_softmax(1)
    return x.logsumexp(0)


@without_autocast
def sinkhorn_codes_ref(scores: Tensor, scale: float, bias: Tensor) -> Tensor:
    """(B, K): softmax_k(scale s_bk + bias_k)."""
    dtype = wide(scores)
    return (scores.to(dtype) * scale + bias.to(dtype)).softmax(1)


lib.define("sinkhorn_pass(Tensor scores, float scale, Tensor? bias) -> Tensor")
lib.define("sinkhorn_codes(Tensor scores, float scale, Tensor bias) -> Tensor")
lib.impl("sinkhorn_pass", sinkhorn_pass_ref, "CompositeExplicitAutograd")
lib.impl("sinkhorn_codes", sinkhorn_codes_ref, "CompositeExplicitAutograd")


def _pass_fake(scores, scale, bias):
    torch._check(scores.dim() == 2, lambda: "sinkhorn_pass: scores must be 2-D")
    return scores.new_empty(scores.shape[1], dtype=wide(scores))


def _codes_fake(scores, scale, bias):
    torch._check(scores.dim() == 2, lambda: "sinkhorn_codes: scores must be 2-D")
    return scores.new_empty(scores.shape, dtype=wide(scores))


torch.library.register_fake("fastssl::sinkhorn_pass", _pass_fake, lib=lib)
torch.library.register_fake("fastssl::sinkhorn_codes", _codes_fake, lib=lib)
on_cuda("prototypes", "sinkhorn_pass", sinkhorn_pass_ref, "copies all scores to fp32")
on_cuda("prototypes", "sinkhorn_codes", sinkhorn_codes_ref, "copies all scores to fp32")


def _log_sums(scores: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """(G, K), the sums of `sinkhorn_pass`, of (G, B, K) with bias (G, K); or of (B, K), G = 1."""
    scores = scores.unsqueeze(0) if scores.dim() == 2 else scores
    run = sinkhorn_pass_ref if scores.dtype == torch.float64 else torch.ops.fastssl.sinkhorn_pass
    biases = [None] * len(scores) if bias is None else bias.to(wide(scores))
    return torch.stack([run(x, scale, b) for x, b in zip(scores, biases, strict=True)])


def check_scores(name: str, **scores: Tensor | None) -> None:
    """Each (B, K) or (G, B, K) in floating point, of one K and G."""
    first = None
    for label, x in scores.items():
        if x is None:
            continue
        check_floating(name, label, x)
        if x.dim() not in (2, 3) or 0 in (*x.shape[:-2], x.shape[-1]):
            raise ValueError(
                f"{name}: {label} must be (B, K), or (G, B, K), with at least one prototype, "
                f"got {tuple(x.shape)}."
            )
        first = first or (label, x)
        other, y = first
        if (x.shape[:-2], x.shape[-1], x.device) != (y.shape[:-2], y.shape[-1], y.device):
            raise ValueError(
                f"{name}: {label} must have {other}'s groups, prototypes and device, got "
                f"{tuple(x.shape)} on {x.device} beside {tuple(y.shape)} on {y.device}."
            )


def check_temperature(name: str, label: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(
            f"{name}: {label} must be a positive number, got {value!r}. Typical: 0.02 to 0.07."
        )


def check_balance(
    name: str,
    shape: tuple[int, ...],  # (*groups, K)
    like: Tensor,
    epsilon: float,
    n_iters: int,
    marginal: Tensor | None,
    group,
) -> tuple[Tensor, tuple[Level, ...]]:
    """log of K times each prototype's share (K,), with like's dtype and device; the ranks, which
    agree on all of it."""
    check_temperature(name, "epsilon", epsilon)
    if not isinstance(n_iters, int) or n_iters < 0:
        raise ValueError(f"{name}: n_iters must be an integer >= 0, got {n_iters!r}.")
    K = shape[-1]
    share = like.new_zeros(K)
    if marginal is not None:
        if not isinstance(marginal, Tensor) or marginal.shape != (K,):
            got = tuple(marginal.shape) if isinstance(marginal, Tensor) else marginal
            raise ValueError(f"{name}: marginal must be a tensor of shape {(K,)}, got {got}.")
        marginal = marginal.to(like)
        if like.device.type == "cpu" and not torch.compiler.is_compiling():
            if not (bool((marginal >= 0).all()) and 0 < marginal.sum() < math.inf):
                raise ValueError(
                    f"{name}: marginal must hold finite numbers >= 0, not only zeros, got "
                    f"{marginal.min():g} to {marginal.max():g}."
                )
        share = (marginal * (K / marginal.sum())).log()
    levels = resolve_levels(name, group)
    if levels:
        options = {"epsilon": epsilon, "n_iters": n_iters, "the dtype": like.dtype}
        options["the marginal"] = None if marginal is None else ("given", checksum(marginal))
        agree(name, levels, (), like, **{"the groups and prototypes": shape} | options)
    return share, levels


def balance(
    log_sums: Callable[[Tensor | None], Tensor],
    share: Tensor,  # (K,)
    n_iters: int,
    shape: tuple[int, ...],  # (*groups, K)
) -> Tensor:
    """The bias, of that shape.

    log_sums(bias) makes (G, K) of (G, K), over all ranks: log sum_b softmax_k(x + bias), or of e^x
    where bias is None.
    """
    bias = dead = None
    for _ in range(n_iters):
        sums = log_sums(bias)
        if bias is None:
            dead = sums.isneginf()
            bias = torch.where(dead, 0, share - sums)
        else:
            bias = bias + (share - sums.clamp(min=LEAST_LOG_SUM)).masked_fill(dead, 0)
    return share.new_zeros(shape) if bias is None else bias.view(shape)


def _bias(
    name: str,
    scores: Tensor,
    epsilon: float,
    n_iters: int,
    marginal: Tensor | None,
    queue_scores: Tensor | None,
    group,
) -> Tensor:
    check_scores(name, scores=scores, queue_scores=queue_scores)
    shape, like = (*scores.shape[:-2], scores.shape[-1]), scores.new_empty(0, dtype=wide(scores))
    share, levels = check_balance(name, shape, like, epsilon, n_iters, marginal, group)

    def log_sums(bias):
        sums = _log_sums(scores, 1 / epsilon, bias)
        if queue_scores is not None:
            sums = torch.logaddexp(sums, _log_sums(queue_scores, 1 / epsilon, bias).to(sums))
        return all_logsumexp(sums.flatten(), levels).view_as(sums)

    return balance(log_sums, share, n_iters, shape)


@torch.no_grad()
def sinkhorn_bias(
    scores: Tensor,
    epsilon: float,
    n_iters: int = 3,
    *,
    marginal: Tensor | None = None,
    queue_scores: Tensor | None = None,
    group=None,
) -> Tensor:
    """The bias l of Sinkhorn-Knopp: its codes after n_iters are softmax_k(scores / epsilon + l).

    Args:
        scores: (B, K) float32, bfloat16, float16 (float64: materialising reference); rows are
            samples, columns prototypes. Or (G, B, K): G problems of one size, such as one for
            each token position.
        epsilon: > 0, the regularisation; a teacher's temperature.
        n_iters: >= 0; 0 is a plain softmax, bias 0.
        marginal: (K,) the prototypes' shares of the mass, >= 0, of any sum; None: equal ones.
        queue_scores: (Q, K), or (G, Q, K), further samples that take part in the balance.
        group: whose ranks' rows are one batch, as in `info_nce`. Every rank has its own B, also 0.

    Returns:
        (K,) or (G, K) in float32 (float64), without a gradient. A prototype whose scores are all
        -inf has bias 0, and codes 0; one with no share of the mass has bias -inf and codes 0. A
        score that is NaN or +inf, or a sample of nothing but -inf, has NaN for codes, and from two
        iterations on so have all.

    Raises:
        TypeError, ValueError: integer scores, epsilon or n_iters out of range, wrong shapes; on all
            ranks, what differs between them and must not.

    Memory: O(K) for each thread; the scores are read n_iters times, in their own dtype.

    Notes: a sample's codes sum to 1; the prototypes' shares are near the marginal only after enough
        iterations. No maximum is taken from a row: it would change the result of few iterations.
        Exponents are differences to maxima, so scores of any size are safe. Sums in float32, blocks
        of them in float64. Deterministic. Each iteration exchanges K numbers among the ranks.

    Example:
        >>> scores = torch.nn.functional.normalize(torch.randn(8, 16)) @ torch.randn(16, 6)
        >>> codes = torch.softmax(scores / 0.05 + sinkhorn_bias(scores, 0.05), dim=1)
        >>> bool(torch.allclose(codes, sinkhorn(scores, 0.05), atol=1e-5))
        True

    Paper: SwAV, arXiv:2006.09882; Sinkhorn distances, arXiv:1306.0895. The scaling form is this
        library's.
    """
    return _bias("sinkhorn_bias", scores, epsilon, n_iters, marginal, queue_scores, group)


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    epsilon: float,
    n_iters: int = 3,
    *,
    marginal: Tensor | None = None,
    queue_scores: Tensor | None = None,
    hard: bool = False,
    group=None,
) -> Tensor:
    """Sinkhorn-Knopp codes: softmax_k(scores / epsilon + l), l from `sinkhorn_bias`.

    Args:
        hard: 1 for each sample's most likely prototype and 0 for the others.
        scores, epsilon, n_iters, marginal, queue_scores, group: as in `sinkhorn_bias`.

    Returns:
        (B, K) or (G, B, K) in float32 (float64), the codes of `scores` alone, without a gradient.

    Raises: as `sinkhorn_bias`.

    Memory: the result. Where a loss follows, the bias alone is enough.

    Notes: as in `sinkhorn_bias`.

    Example:
        >>> scores = torch.randn(8, 6)
        >>> bool(torch.allclose(sinkhorn(scores, 0.5).sum(1), torch.ones(8), atol=1e-5))
        True
        >>> power_law = torch.arange(1.0, 7) ** -0.25  # few large prototypes, many small ones
        >>> sinkhorn(scores, 0.5, marginal=power_law, hard=True).sum(1)
        tensor([1., 1., 1., 1., 1., 1., 1., 1.])

    Paper: SwAV, arXiv:2006.09882; power-law prior: PMSN, arXiv:2210.07277.
    """
    bias = _bias("sinkhorn", scores, epsilon, n_iters, marginal, queue_scores, group)
    if hard:
        best = (scores.to(bias.dtype) / epsilon + bias.unsqueeze(-2)).argmax(-1, keepdim=True)
        return torch.zeros_like(scores, dtype=bias.dtype).scatter_(-1, best, 1.0)
    run = sinkhorn_codes_ref if scores.dtype == torch.float64 else torch.ops.fastssl.sinkhorn_codes
    if scores.dim() == 2:
        return run(scores, 1 / epsilon, bias)
    return torch.stack([run(x, 1 / epsilon, b) for x, b in zip(scores, bias, strict=True)])


@torch.no_grad()
def prototype_usage(
    scores: Tensor, temperature: float, bias: Tensor | None = None, *, group=None
) -> Tensor:
    """Each prototype's share of all assignments: mean_b softmax_k(scores / temperature + bias).

    Args:
        scores: (B, K), or (G, B, K), as in `sinkhorn_bias`; best the teacher's.
        temperature: > 0, the teacher's, or Sinkhorn's epsilon.
        bias: (K,), or (G, K); -centre / temperature for a centred teacher, None for none. With
            Sinkhorn's the usage is that of its codes: near the marginal even where all features are
            equal, so that it says nothing about collapse.
        group: whose ranks' rows are one batch, as in `info_nce`. Every rank has its own B, also 0.

    Returns:
        (K,) or (G, K) in float32 (float64), of sum 1, without a gradient. NaN where a score is NaN
        or +inf, or a sample has nothing but -inf.

    Raises:
        TypeError, ValueError: integer scores, a temperature out of range, wrong shapes, no row on
            any rank; on all ranks, what differs between them and must not.

    Memory: O(K) for each thread; the scores are read once, in their own dtype.

    Notes: after `sinkhorn_bias` with equal shares nothing need be read for an estimate: softmax of
        -bias is the usage without that bias where all rows are equal, and near it unless prototypes
        differ much in size (of 3000, half of 4096 samples on one: 74 in use, by the estimate 2).
        Sums in float32, blocks of them in float64. Deterministic. Ranks exchange K numbers.

    Example:
        >>> scores = torch.nn.functional.normalize(torch.randn(8, 16)) @ torch.randn(16, 6)
        >>> bool(1 <= effective_prototypes(prototype_usage(scores, 0.05)) <= 6)
        True
        >>> bool(1 <= effective_prototypes((-sinkhorn_bias(scores, 0.05)).softmax(0)) <= 6)
        True

    Paper: the mean prediction of MSN, arXiv:2204.07141.
    """
    name = "prototype_usage"
    check_scores(name, scores=scores)
    check_temperature(name, "temperature", temperature)
    *groups, B, K = scores.shape
    if bias is None:
        bias = scores.new_zeros(K)
    elif not isinstance(bias, Tensor) or bias.shape not in ((K,), (*groups, K)):
        got = tuple(bias.shape) if isinstance(bias, Tensor) else bias
        raise ValueError(f"{name}: bias must be a tensor of shape {(*groups, K)}, got {got}.")
    levels, rows = resolve_levels(name, group), B
    if levels:
        same = {"the groups and prototypes": (*groups, K), "temperature": temperature}
        same["the dtype"] = wide(scores)
        (sizes,) = agree(name, levels, (B,), scores, **same)
        rows = sum(sizes)
    if not rows:
        raise ValueError(f"{name}: the batch must have a row, got {tuple(scores.shape)}. Skip it.")
    bias = bias.to(scores.device).expand(math.prod(groups), K).contiguous()
    sums = _log_sums(scores, 1 / temperature, bias)
    # Shares of the sum, which is the rows of all ranks but for rounding.
    return all_logsumexp(sums.flatten(), levels).view(*groups, K).softmax(-1)


def effective_prototypes(usage: Tensor) -> Tensor:
    """How many prototypes are in use: exp(-sum_k p_k log p_k), p = usage / sum of usage.

    Args:
        usage: (..., K) >= 0, of any sum: `prototype_usage`, or how many samples each prototype has.

    Returns:
        (...), from 1, all on one prototype, to K, all alike; NaN where usage is NaN or all zero.
        Stays on the device: reading it is the caller's decision.

    Memory: O(K).

    Notes: in float32 at least. A batch of B sharp assignments can use no more than B prototypes.

    Example:
        >>> effective_prototypes(torch.tensor([3.0, 3.0, 0.0]))
        tensor(2.)

    Paper: Hill, "Diversity and evenness", Ecology 54, 1973: the number of order 1.
    """
    usage = usage.to(wide(usage))
    return torch.special.entr(usage / usage.sum(-1, keepdim=True)).sum(-1).exp()
