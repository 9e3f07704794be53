"""Few labels: logistic regression on k images of each class or on 1 %, over several draws."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .features import check_splits, standardise, top1_percent
from .linear import class_rank, fit_logistic, fit_selected, predict


def kshot(
    train_h: Tensor,
    train_y: Tensor,
    test_h: Tensor,
    test_y: Tensor,
    shots: Sequence[int] = (1, 5, 10),
    draws: int = 5,
) -> dict:
    """Mean and standard deviation of top-1 accuracy with k labels of each class.

    Draw d takes the first k samples of each class in the order shuffled with seed d, so the same
    images serve every network, and 1 shot is part of 5 shots of the same draw. Features are
    standardised with the whole training split, which needs no labels. With so few labels nothing
    is left to choose the L2 strength on: it is 1 / (number of labels), scikit-learn's C = 1.

    Args:
        train_h, test_h: (N, D) and (M, D) features, floating point.
        train_y, test_y: (N,) and (M,) integer labels >= 0.
        shots: labels per class.
        draws: number of draws, >= 2.

    Returns:
        `top1_percent` and its `sd_percent` over draws (n - 1 in the denominator) by number of
        shots, and the `protocol`.

    Raises:
        ValueError: for wrong shapes, labels, an empty split, values that are not finite, or a
            class with fewer than k training samples.

    Example:
        >>> h, y = torch.eye(4).repeat(9, 1), torch.arange(4).repeat(9)
        >>> kshot(h, y, h, y, shots=(2,))["top1_percent"]
        {'2-shot': 100.0}
    """
    num_classes = check_splits("kshot", train_h, train_y, test_h, test_y)
    if not shots or min(shots) < 1 or draws < 2:
        raise ValueError(
            f"kshot: shots must be >= 1 and draws >= 2, got {tuple(shots)} and {draws}."
        )
    train_h, test_h = standardise(train_h, train_h, test_h)
    mean, sd = {}, {}
    for k in shots:
        top1 = []
        for seed in range(draws):
            chosen = draw(train_y, k, seed)
            weights = fit_logistic(train_h[chosen], train_y[chosen], num_classes, 1 / len(chosen))
            top1.append(top1_percent(predict(test_h, weights), test_y))
        mean[f"{k}-shot"] = sum(top1) / draws
        sd[f"{k}-shot"] = torch.tensor(top1, dtype=torch.float64).std().item()
    protocol = {
        "classifier": "multinomial logistic regression, L-BFGS with strong Wolfe line search",
        "standardised": "with mean and standard deviation of the whole training split",
        "shots": list(shots),
        "l2": {f"{k}-shot": 1 / (k * len(train_y.unique())) for k in shots},
        "draws": draws,
        "draw_seeds": list(range(draws)),
    }
    return {"top1_percent": mean, "sd_percent": sd, "protocol": protocol}


def subset(
    train_h: Tensor,
    train_y: Tensor,
    test_h: Tensor,
    test_y: Tensor,
    shares: Sequence[float] = (0.01, 0.1),
    draws: int = 3,
) -> dict:
    """Mean and standard deviation of top-1 accuracy with a share of the labels, 1 % and 10 %.

    Draw d takes the same number of samples of each class, those that come first in the order
    shuffled with seed d; a class with fewer gives all. The L2 strength is chosen as in `linear`, on
    a tenth of the drawn samples alone; 1 / (number of labels) where no class has two.

    Args:
        train_h, test_h: (N, D) and (M, D) features, floating point.
        train_y, test_y: (N,) and (M,) integer labels >= 0.
        shares: in (0, 1]; at least one sample of a class is taken.
        draws: number of draws, >= 2.

    Returns:
        `top1_percent` and its `sd_percent` over draws (n - 1 in the denominator) by share, and the
        `protocol`.

    Raises:
        ValueError: for wrong shapes, labels, an empty split, values that are not finite, or shares
            or draws out of range.

    Example:
        >>> h, y = torch.eye(4).repeat(9, 1), torch.arange(4).repeat(9)
        >>> subset(h, y, h, y, shares=(0.5,))["top1_percent"]
        {'50%-labels': 100.0}

    Paper: the fractions of SimCLR, arXiv 2002.05709, on frozen features.
    """
    num_classes = check_splits("subset", train_h, train_y, test_h, test_y)
    if draws < 2:
        raise ValueError(f"subset: draws must be >= 2, got {draws}.")
    mean, sd, used = {}, {}, {}
    for share in shares:
        top1, chosen_l2 = [], []
        for seed in range(draws):
            chosen = draw_share(train_y, share, seed)
            h, y = train_h[chosen], train_y[chosen]
            weights, protocol = fit_selected(h, y, num_classes)
            (last_h,) = standardise(h, test_h)
            top1.append(top1_percent(predict(last_h, weights), test_y))
            chosen_l2.append(protocol["l2"])
        name = f"{percent_name(share)}-labels"
        mean[name] = sum(top1) / draws
        sd[name] = torch.tensor(top1, dtype=torch.float64).std().item()
        used[name] = {"labels": len(chosen), "l2": chosen_l2, "top1_percent": top1}
    protocol = {key: protocol[key] for key in ("classifier", "objective", "standardised")}
    protocol |= {
        "balanced": "the same number of each class; a class with fewer gives all",
        "l2_chosen_on": "a tenth of the drawn samples, held out; 1 / labels if no class has two",
        "draws": draws,
        "draw_seeds": list(range(draws)),
        "by_share": used,
    }
    return {"top1_percent": mean, "sd_percent": sd, "protocol": protocol}


def percent_name(share: float) -> str:
    return f"{100 * share:g}%"


def draw_share(y: Tensor, share: float, seed: int) -> Tensor:
    """Indices of share N / C random samples of each of C classes of y (N,), fixed by the seed."""
    if not 0 < share <= 1:
        raise ValueError(f"subset: shares must be in (0, 1], got {share}.")
    k = max(1, round(share * len(y) / len(y.unique())))
    return (class_rank(y, seed) < k).nonzero().flatten()


def draw(y: Tensor, k: int, seed: int) -> Tensor:
    """Indices of k random samples of each class of y (N,), fixed by the seed."""
    counts = y.bincount()
    small = [c for c, n in enumerate(counts.tolist()) if 0 < n < k]
    if small:
        raise ValueError(
            f"kshot: train_y must hold at least k={k} samples of each class, got "
            f"{int(counts[small[0]])} of class {small[0]}. Ask for fewer shots."
        )
    return (class_rank(y, seed) < k).nonzero().flatten()
