"""Where a classifier is right and what its confidence is worth: groups, shifts, calibration."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def group_report(correct: Tensor, groups: Tensor, names: Sequence[str] | None = None) -> dict:
    """Accuracy by group, the worst group, and the gap between best and worst.

    Groups are whatever the user supplies: subpopulations, sites, corruptions, shifted test sets.

    Args:
        correct: (N,) whether each prediction was right; bool or 0 and 1.
        groups: (N,) integers >= 0.
        names: of the groups, by number; by default the numbers.

    Returns:
        `top1_percent` of all samples, `group_mean_percent` (each group alike), `worst_group`,
        `worst_group_percent`, `gap_percent`, `ratio` (worst / best), and for each group that occurs
        its `top1_percent`, number `n` and `ci95_percent`, Wilson's interval.

    Raises:
        ValueError: wrong shapes, no sample, values other than 0 and 1, a group without a name.

    Notes: with few samples in a group look at its interval: among many groups the worst is partly
        the unluckiest.

    Example:
        >>> report = group_report(torch.tensor([1, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))
        >>> report["worst_group"], report["worst_group_percent"]
        ('1', 50.0)
    """
    if correct.ndim != 1 or len(correct) == 0:
        raise ValueError(f"group_report: correct must be (N,), N >= 1, got {tuple(correct.shape)}.")
    if not ((correct == 0) | (correct == 1)).all():
        raise ValueError(
            "group_report: correct must be 0 or 1, got other values. Pass predicted == y."
        )
    if groups.shape != correct.shape or groups.is_floating_point() or (groups < 0).any():
        raise ValueError(
            f"group_report: groups must be integers >= 0, one for each of {len(correct)} samples, "
            f"got {groups.dtype} {tuple(groups.shape)}."
        )
    if names is not None and int(groups.max()) >= len(names):
        raise ValueError(
            f"group_report: names must have one for each group, got {len(names)} and group "
            f"{int(groups.max())}."
        )
    found = {}
    for g in groups.unique().tolist():
        inside = correct[groups == g].double()
        found[str(g) if names is None else names[g]] = {
            "top1_percent": 100 * inside.mean().item(),
            "ci95_percent": _wilson(inside.mean().item(), len(inside)),
            "n": len(inside),
        }
    accuracy = {name: group["top1_percent"] for name, group in found.items()}
    worst, best = min(accuracy, key=accuracy.get), max(accuracy.values())
    return {
        "top1_percent": 100 * correct.double().mean().item(),
        "group_mean_percent": sum(accuracy.values()) / len(accuracy),
        "worst_group": worst,
        "worst_group_percent": accuracy[worst],
        "gap_percent": best - accuracy[worst],
        "ratio": accuracy[worst] / best if best else 1.0,
        "groups": found,
    }


def calibration_error(probabilities: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error: how far confidence is from accuracy, over bins of confidence.

        ECE = sum_b n_b / N |accuracy_b - confidence_b|,  bin b = ((b - 1) / bins, b / bins]

    Args:
        probabilities: (N, C), rows that sum to 1; the confidence is their largest.
        y: (N,) integer labels in [0, C).
        bins: number of bins of equal width, >= 1.

    Returns:
        In [0, 1]; 0 is calibrated.

    Raises:
        ValueError: wrong shapes, no sample, rows that are no probabilities, labels out of range.

    Notes: it depends on `bins` and comes out too large in small samples: compare networks on the
        same images with the same bins.

    Example:
        >>> p = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
        >>> calibration_error(p, torch.tensor([0, 1]))  # right half the time
        0.25

    Paper: Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599.
    """
    if probabilities.ndim != 2 or not probabilities.is_floating_point() or len(probabilities) == 0:
        raise ValueError(
            f"calibration_error: probabilities must be floating point (N, C), N >= 1, "
            f"got {probabilities.dtype} {tuple(probabilities.shape)}."
        )
    p = probabilities.double()
    tolerance = 2 * torch.finfo(probabilities.dtype).eps * p.shape[1] + 1e-6
    if not ((p >= 0).all() and ((p.sum(1) - 1).abs() < tolerance).all()):
        raise ValueError(
            "calibration_error: probabilities must be >= 0 with rows that sum to 1, got other "
            "values. Pass logits.softmax(1)."
        )
    if y.shape != p.shape[:1] or y.is_floating_point() or ((y < 0) | (y >= p.shape[1])).any():
        raise ValueError(
            f"calibration_error: y must be ({len(p)},) integers in [0, {p.shape[1]}), "
            f"got {y.dtype} {tuple(y.shape)}."
        )
    if bins < 1:
        raise ValueError(f"calibration_error: bins must be >= 1, got {bins}.")
    confidence, predicted = p.max(1)
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    excess = (predicted == y).double() - confidence
    return p.new_zeros(bins).index_add_(0, number, excess).abs().sum().item() / len(p)


def _wilson(share: float, n: int, z: float = 1.959964) -> list[float]:
    """95 % interval, in percent, of a share seen in n samples; of sense at 0 and 1 too."""
    centre, scale = share + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [100 * (centre - half) / scale, 100 * (centre + half) / scale]
