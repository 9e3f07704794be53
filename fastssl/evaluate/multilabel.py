"""Several labels for each image: average precision and area under the ROC curve of every class."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 22  # scores ranked at once; bounds the memory


def multilabel(scores: Tensor, targets: Tensor, names: Sequence[str] | None = None) -> dict:
    """Mean average precision and mean ROC-AUC over the classes that can be scored.

        mAP = mean_c AP_c,  mAUC = mean_c AUC_c  over classes with both a positive and a negative

    Args:
        scores: (N, C) floating point, finite; higher is more likely. Logits or probabilities.
        targets: (N, C), 0 or 1, of any dtype.
        names: of the classes; by default their numbers.

    Returns:
        `map` and `auc` in [0, 1], each class's as `average_precision` and `roc_auc`, and `skipped`,
        the classes whose labels are all 0 or all 1: no score can rank them.

    Raises:
        ValueError: wrong shapes, labels other than 0 and 1, scores that are not finite, or no class
            with both values.

    Memory: blocks of whole classes of up to 4 M scores, some 400 MB.

    Notes: computed in float64. Equal scores share their rank: the order of samples is no matter.

    Example:
        >>> scores = torch.tensor([[0.9, 0.2], [0.1, 0.3], [0.8, 0.1]])
        >>> multilabel(scores, torch.tensor([[1, 1], [0, 1], [1, 1]]))["skipped"]
        ['1']
    """
    _check("multilabel", scores, targets)
    names = [str(c) for c in range(scores.shape[1])] if names is None else list(names)
    if len(names) != scores.shape[1]:
        raise ValueError(
            f"multilabel: names must have one for each of C={scores.shape[1]} classes, "
            f"got {len(names)}."
        )
    positives = (targets != 0).sum(0)
    used = (positives > 0) & (positives < len(targets))
    if not used.any():
        raise ValueError(
            "multilabel: targets must hold a class with both 0 and 1, got only classes of one "
            f"value ({int((positives == 0).sum())} without a positive). Pass more samples."
        )
    ap, auc = average_precision(scores, targets), roc_auc(scores, targets)
    scored = [name for name, use in zip(names, used.tolist(), strict=True) if use]
    return {
        "map": ap[used].mean().item(),
        "auc": auc[used].mean().item(),
        "average_precision": dict(zip(scored, ap[used].tolist(), strict=True)),
        "roc_auc": dict(zip(scored, auc[used].tolist(), strict=True)),
        "skipped": [name for name, use in zip(names, used.tolist(), strict=True) if not use],
    }


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """AP of each class: the mean over its positives of the precision at their scores.

    Without interpolation; samples of equal score are one threshold, as in scikit-learn.

    Args:
        scores: (N, C) floating point, finite. targets: (N, C), 0 or 1.

    Returns:
        (C,) float64; NaN for classes without a positive.

    Raises:
        ValueError: wrong shapes, labels other than 0 and 1, scores that are not finite.

    Example:
        >>> scores = torch.tensor([[0.9], [0.8], [0.7]])
        >>> average_precision(scores, torch.tensor([[1], [0], [1]]))  # (1/1 + 2/3) / 2
        tensor([0.8333], dtype=torch.float64)
    """
    _check("average_precision", scores, targets)
    return _by_class(ap_of_rows, scores, targets)


def roc_auc(scores: Tensor, targets: Tensor) -> Tensor:
    """AUC of each class: how often a positive scores above a negative, equal scores counting half.

    Args:
        scores: (N, C) floating point, finite. targets: (N, C), 0 or 1.

    Returns:
        (C,) float64; NaN for classes whose labels are all equal.

    Raises:
        ValueError: wrong shapes, labels other than 0 and 1, scores that are not finite.

    Example:
        >>> scores = torch.tensor([[0.9], [0.8], [0.8]])
        >>> roc_auc(scores, torch.tensor([[1], [0], [1]]))  # one pair right, one tied
        tensor([0.7500], dtype=torch.float64)
    """
    _check("roc_auc", scores, targets)
    return _by_class(_auc_of_rows, scores, targets)


def ranked(scores: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row of relevant (R, N) from high to low score, with the bounds of the ties.

    Returns:
        relevant (R, N) sorted; first and last (R, N) int64, the places, from 0, of the first and
        the last sample whose score is the one at this place.
    """
    scores, order = scores.sort(1, descending=True)
    change = scores[:, 1:] != scores[:, :-1]
    edge = change.new_ones(len(scores), 1)
    place = torch.arange(scores.shape[1], device=scores.device)
    first = torch.where(torch.cat((edge, change), 1), place, 0).cummax(1).values
    end = torch.where(torch.cat((change, edge), 1), place, scores.shape[1])
    last = end.flip(1).cummin(1).values.flip(1)
    return relevant.gather(1, order), first, last


def ap_of_rows(scores: Tensor, relevant: Tensor) -> Tensor:
    """AP (R,) of each row of scores (R, N) with relevant (R, N) bool; NaN without a positive."""
    relevant, _, last = ranked(scores, relevant)
    hits = relevant.cumsum(1).gather(1, last)
    precision = hits.double() / (last + 1)
    return (precision * relevant).sum(1) / relevant.sum(1)


def _auc_of_rows(scores: Tensor, relevant: Tensor) -> Tensor:
    """Mann and Whitney's statistic, ties averaged: 1 - (sum of ranks - its minimum) / PQ."""
    relevant, first, last = ranked(scores, relevant)
    positives = relevant.sum(1).double()
    ranks = ((first + last).double() / 2 * relevant).sum(1)  # from 0, high scores first
    pairs = positives * (relevant.shape[1] - positives)
    return 1 - (ranks - positives * (positives - 1) / 2) / pairs


def _by_class(rows: Callable[[Tensor, Tensor], Tensor], scores: Tensor, targets: Tensor) -> Tensor:
    step = max(1, _BLOCK // len(scores))
    blocks = zip(scores.T.split(step), (targets != 0).T.split(step), strict=True)
    return torch.cat([rows(s, t) for s, t in blocks])


def _check(caller: str, scores: Tensor, targets: Tensor) -> None:
    if scores.ndim != 2 or not scores.is_floating_point() or scores.numel() == 0:
        raise ValueError(
            f"{caller}: scores must be floating point (N, C) with N, C >= 1, "
            f"got {scores.dtype} {tuple(scores.shape)}."
        )
    if targets.shape != scores.shape:
        raise ValueError(
            f"{caller}: targets must have scores' shape {tuple(scores.shape)}, "
            f"got {tuple(targets.shape)}. Pass one column of 0 and 1 for each class."
        )
    wrong = targets[(targets != 0) & (targets != 1)]
    if len(wrong):
        raise ValueError(
            f"{caller}: targets must be 0 or 1, got {wrong[0].item()}. "
            "Set uncertain labels to one of them, or drop these samples."
        )
    if not scores.isfinite().all():
        raise ValueError(
            f"{caller}: scores must be finite, got NaN or infinity in "
            f"{int((~scores.isfinite().all(1)).sum())} of {len(scores)} rows."
        )
