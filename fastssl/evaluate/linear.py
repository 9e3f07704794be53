"""Linear probe: multinomial logistic regression on frozen features, solved to its optimum."""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import check_splits, standardise, top1_percent

L2_GRID = tuple(10.0**e for e in range(2, -7, -1))


def linear(
    train_h: Tensor,
    train_y: Tensor,
    test_h: Tensor,
    test_y: Tensor,
    l2_grid: Sequence[float] = L2_GRID,
    max_iter: int = 1000,
) -> dict:
    """Top-1 accuracy of a linear classifier whose L2 strength is chosen without the test split.

    The strength is the one that does best on a tenth of the training split held out class by
    class (the strongest among equals); the classifier is then fitted on all of it. Features are
    standardised with the statistics of the samples fitted on.

    Args:
        train_h, test_h: (N, D) and (M, D) features, floating point; solved in their dtype.
        train_y, test_y: (N,) and (M,) integer labels >= 0.
        l2_grid: candidates for l2 in `fit_logistic`.
        max_iter: L-BFGS iterations of each fit.

    Returns:
        `top1_percent` and the `protocol` that gave it, with the accuracy of each candidate.

    Raises:
        ValueError: for wrong shapes, labels, an empty split, values that are not finite, a class
            that the training split lacks, or no class with two samples.

    Example:
        >>> h, y = torch.eye(4).repeat(9, 1), torch.arange(4).repeat(9)
        >>> linear(h, y, h, y)["top1_percent"]
        {'linear': 100.0}

    Paper: the protocol of Kornblith et al., "Do Better ImageNet Models Transfer Better?",
    arXiv 1805.08974, as in CLIP, arXiv 2103.00020. No augmentation; features are computed once.
    """
    num_classes = check_splits("linear", train_h, train_y, test_h, test_y)
    held = held_out(train_y)
    if not held.any():
        raise ValueError(
            "linear: train_y must hold at least two samples of some class to choose the L2 "
            "strength, got one of each. Use knn, or pass more data."
        )
    weights, chosen = fit_selected(train_h, train_y, num_classes, l2_grid, max_iter)
    (last_h,) = standardise(train_h, test_h)
    top1 = top1_percent(predict(last_h, weights), test_y)
    return {"top1_percent": {"linear": top1}, "protocol": chosen}


def fit_selected(
    h: Tensor,
    y: Tensor,
    num_classes: int,
    l2_grid: Sequence[float] = L2_GRID,
    max_iter: int = 1000,
) -> tuple[tuple[Tensor, Tensor], dict]:
    """The classifier of `linear`, for features standardised as h (N, D), and its protocol.

    Where no class has two samples, nothing can be held out: then l2 is 1 / N, scikit-learn's C = 1.
    """
    held = held_out(y)
    selection = {}
    if held.any():
        fit_h, held_h = standardise(h[~held], h[~held], h[held])
        weights = None
        # From strong to weak, each fit starting from the last: the path is smooth, so it is cheap.
        for l2 in sorted(l2_grid, reverse=True):
            weights = fit_logistic(fit_h, y[~held], num_classes, l2, weights, max_iter)
            selection[l2] = top1_percent(predict(held_h, weights), y[held])
    l2 = max(selection, key=selection.get, default=1 / len(y))
    (fit_h,) = standardise(h, h)
    return fit_logistic(fit_h, y, num_classes, l2, None, max_iter), {
        "classifier": "multinomial logistic regression, L-BFGS with strong Wolfe line search",
        "objective": "mean cross-entropy + l2/2 * sum of squared weights (bias free)",
        "standardised": "with mean and standard deviation of the samples fitted on",
        "l2_grid": sorted(l2_grid, reverse=True),
        "l2": l2,
        "l2_chosen_on": f"{int(held.sum())} of the {len(y)} training samples, held out",
        "held_out_top1_percent": {f"{key:g}": value for key, value in selection.items()},
        "refitted_on": len(y),
        "max_iter": max_iter,
    }


def held_out(y: Tensor, seed: int = 0) -> Tensor:
    """Mask (N,) of a random tenth of each class; every class keeps at least one sample to fit."""
    return class_rank(y, seed) % 10 == 1


def class_rank(y: Tensor, seed: int) -> Tensor:
    """Place of each sample in a random order of its own class, (N,) int64 from 0."""
    shuffle = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    order = shuffle[y[shuffle].argsort(stable=True)]  # class by class, random within
    counts = y.bincount()
    first = (counts.cumsum(0) - counts)[y[order]]
    rank = torch.empty_like(y, dtype=torch.int64)
    rank[order] = torch.arange(len(y), device=y.device) - first
    return rank


def fit_logistic(
    h: Tensor,
    y: Tensor,
    num_classes: int,
    l2: float,
    start: tuple[Tensor, Tensor] | None = None,
    max_iter: int = 1000,
) -> tuple[Tensor, Tensor]:
    """Weight (D, C) and bias (C,) that minimise  mean_i CE(h_i W + b, y_i) + l2/2 ||W||^2.

    With several labels an image CE is the sum over classes of binary cross-entropies: then it is
    one classifier for each class against the rest.

    Args:
        h: (N, D) floating point.
        y: (N,) int64 in [0, num_classes), or (N, num_classes) of 0 and 1.
        l2: >= 0; scikit-learn's C is 1 / (N * l2).
        start: where to begin; zeros by default. The problem is convex: only time depends on it.
        max_iter: bound on L-BFGS iterations.
    """
    if start is None:
        start = h.new_zeros(h.shape[1], num_classes), h.new_zeros(num_classes)
    weight, bias = (w.clone().requires_grad_() for w in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        tolerance_grad=1e-6 if h.dtype != torch.float64 else 1e-8,
        tolerance_change=1e-9 if h.dtype != torch.float64 else 1e-13,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    if y.ndim == 2:
        y = y.to(h.dtype)

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits = h @ weight + bias
        if y.ndim == 1:
            loss = F.cross_entropy(logits, y)
        else:
            loss = num_classes * F.binary_cross_entropy_with_logits(logits, y)
        loss = loss + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    with _few_threads(h.numel() * num_classes):
        optimizer.step(objective)
    return weight.detach(), bias.detach()


@contextmanager
def _few_threads(products: int):
    """One thread while steps take microseconds: more would mostly wait for each other, and forty
    times as long on a machine that is busy with something else (measured on two cores)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if products < 1 << 25 else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def predict(h: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """Most likely class (N,) of features h (N, D)."""
    weight, bias = weights
    return (h @ weight + bias).argmax(1)
