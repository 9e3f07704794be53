"""Assigning samples to prototypes: Sinkhorn-Knopp as a softmax with one bias for each prototype.

With x = scores / epsilon, n iterations of "prototypes share the mass, then every sample sums to 1"
give softmax_k(x_bk + l_k) exactly, where
l_k = log r_k - log sum_b e^x_bk, then n - 1 times l_k += log r_k - log sum_b softmax_k(x + l)_bk.
So codes need no copy of the B x K scores, and what ranks exchange is K numbers an iteration.
"""

import math

import torch
from torch import Tensor

from fastssl.dist import agree, all_logsumexp, resolve_levels
from fastssl.ops.checks import check_floating
from fastssl.ops.contrastive import lib, on_cuda, without_autocast

# A prototype that a pass leaves without mass is lifted by this much, and finds its level again.
LEAST_LOG_SUM = math.log(1e-37)


@without_autocast
def sinkhorn_pass_ref(scores: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """(K,) of (B, K), x = scale s: log sum_b e^x_bk, or log sum_b softmax_k(x_bk + bias_k)."""
    x = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if bias is not None:
        x = (x + bias.to(x.dtype)).log_softmax(1)
    return x.logsumexp(0)


@without_autocast
def sinkhorn_codes_ref(scores: Tensor, scale: float, bias: Tensor) -> Tensor:
    """(B, K): softmax_k(scale s_bk + bias_k)."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return (scores.to(dtype) * scale + bias.to(dtype)).softmax(1)


lib.define("sinkhorn_pass(Tensor scores, float scale, Tensor? bias) -> Tensor")
lib.define("sinkhorn_codes(Tensor scores, float scale, Tensor bias) -> Tensor")
lib.impl("sinkhorn_pass", sinkhorn_pass_ref, "CompositeExplicitAutograd")
lib.impl("sinkhorn_codes", sinkhorn_codes_ref, "CompositeExplicitAutograd")


def _pass_fake(scores, scale, bias):
    torch._check(scores.dim() == 2, lambda: "sinkhorn_pass: scores must be 2-D")
    return scores.new_empty(scores.shape[1], dtype=_wide(scores))


def _codes_fake(scores, scale, bias):
    torch._check(scores.dim() == 2, lambda: "sinkhorn_codes: scores must be 2-D")
    return scores.new_empty(scores.shape, dtype=_wide(scores))


torch.library.register_fake("fastssl::sinkhorn_pass", _pass_fake, lib=lib)
torch.library.register_fake("fastssl::sinkhorn_codes", _codes_fake, lib=lib)
on_cuda("prototypes", "sinkhorn_pass", sinkhorn_pass_ref)
on_cuda("prototypes", "sinkhorn_codes", sinkhorn_codes_ref)


def _wide(scores: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


def _log_sums(scores: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    run = sinkhorn_pass_ref if scores.dtype == torch.float64 else torch.ops.fastssl.sinkhorn_pass
    return run(scores, scale, None if bias is None else bias.to(_wide(scores)))


def check_scores(name: str, epsilon: float, **scores: Tensor | None) -> None:
    """Each (B, K) or (G, B, K) in floating point, of one K and G; a positive epsilon."""
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
    if not isinstance(epsilon, (int, float)) or not 0 < epsilon < math.inf:
        raise ValueError(
            f"{name}: epsilon must be a positive number, got {epsilon!r}. Typical: 0.02 to 0.07."
        )


def _bias(
    name: str,
    scores: Tensor,
    epsilon: float,
    n_iters: int,
    marginal: Tensor | None,
    queue_scores: Tensor | None,
    group,
) -> Tensor:
    check_scores(name, epsilon, scores=scores, queue_scores=queue_scores)
    if not isinstance(n_iters, int) or n_iters < 0:
        raise ValueError(f"{name}: n_iters must be an integer >= 0, got {n_iters!r}.")
    K, groups, dtype = scores.shape[-1], scores.shape[:-2], _wide(scores)
    share = torch.zeros(K, dtype=dtype, device=scores.device)
    if marginal is not None:
        if not isinstance(marginal, Tensor) or marginal.shape != (K,):
            got = tuple(marginal.shape) if isinstance(marginal, Tensor) else marginal
            raise ValueError(f"{name}: marginal must be a tensor of shape {(K,)}, got {got}.")
        marginal = marginal.to(device=scores.device, dtype=dtype)
        if scores.device.type == "cpu" and not torch.compiler.is_compiling():
            if not (bool((marginal >= 0).all()) and 0 < marginal.sum() < math.inf):
                raise ValueError(
                    f"{name}: marginal must hold finite numbers >= 0, not only zeros, got "
                    f"{marginal.min():g} to {marginal.max():g}."
                )
        share = (marginal * (K / marginal.sum())).log()
    levels = resolve_levels(name, group)
    if levels:
        options = {"epsilon": epsilon, "n_iters": n_iters, "the dtype": dtype}
        agree(name, levels, (), scores, **{"the groups and prototypes": (*groups, K)} | options)

    samples = [x for x in (scores, queue_scores) if x is not None]
    samples = [x.unsqueeze(0) if x.dim() == 2 else x for x in samples]  # (G, B, K), (G, Q, K)
    G = len(samples[0])

    def log_sums(bias):  # (G, K) of all ranks
        biases = [None] * G if bias is None else bias
        sums, *more = (
            torch.stack([_log_sums(x, 1 / epsilon, b) for x, b in zip(xs, biases, strict=True)])
            for xs in samples
        )
        for queued in more:
            sums = torch.logaddexp(sums, queued.to(dtype))
        return all_logsumexp(sums.flatten(), levels).view(G, K)

    bias = dead = None
    for _ in range(n_iters):
        sums = log_sums(bias)
        if bias is None:
            dead = sums.isneginf()
            bias = torch.where(dead, 0, share - sums)
        else:
            bias = bias + (share - sums.clamp(min=LEAST_LOG_SUM)).masked_fill(dead, 0)
    bias = share.new_zeros(G, K) if bias is None else bias
    return bias.view(*groups, K)


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

    Paper: SwAV, arXiv:2006.09882.
    """
    bias = _bias("sinkhorn", scores, epsilon, n_iters, marginal, queue_scores, group)
    if hard:
        best = (scores.to(bias.dtype) / epsilon + bias.unsqueeze(-2)).argmax(-1, keepdim=True)
        return torch.zeros_like(scores, dtype=bias.dtype).scatter_(-1, best, 1.0)
    run = sinkhorn_codes_ref if scores.dtype == torch.float64 else torch.ops.fastssl.sinkhorn_codes
    if scores.dim() == 2:
        return run(scores, 1 / epsilon, bias)
    return torch.stack([run(x, 1 / epsilon, b) for x, b in zip(scores, bias, strict=True)])
