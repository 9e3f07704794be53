"""Several labels for each image: average precision and area under the ROC curve of every class."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import check_splits, standardise
from .linear import L2_GRID, fit_logistic, held_out

_BLOCK = 1 << 22  # scores ranked at once; bounds the memory


def multilabel(scores: Tensor, targets: Tensor, names: Sequence[str] | None = None) -> dict:
    """Mean average precision and mean ROC-AUC over the classes that can be scored.

        mAP = mean_c AP_c,  mAUC = mean_c AUC_c  over classes with both a positive and a negative
        weighted: the mean by number of positives;  micro: all (image, class) pairs as one ranking

    Args:
        scores: (N, C) floating point, finite; higher is more likely. Logits or probabilities.
        targets: (N, C), 0 or 1, of any dtype.
        names: of the classes; by default their numbers.

    Returns:
        `map` and `auc` in [0, 1], `map_micro`, `map_weighted`, `auc_micro`, `auc_weighted`, each
        class's as `average_precision` and `roc_auc`, and `skipped`, the classes whose labels are
        all 0 or all 1: no score can rank them, and only micro averages take them in.

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
    check_targets("multilabel", scores, targets)
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
    weight = positives[used].double() / positives[used].sum()
    pairs = scores.reshape(1, -1), (targets != 0).reshape(1, -1)
    return {
        "map": ap[used].mean().item(),
        "map_weighted": (weight * ap[used]).sum().item(),
        "map_micro": ap_of_rows(*pairs).item(),
        "auc": auc[used].mean().item(),
        "auc_weighted": (weight * auc[used]).sum().item(),
        "auc_micro": _auc_of_rows(*pairs).item(),
        "average_precision": dict(zip(scored, ap[used].tolist(), strict=True)),
        "roc_auc": dict(zip(scored, auc[used].tolist(), strict=True)),
        "skipped": [name for name, use in zip(names, used.tolist(), strict=True) if not use],
    }


def multilabel_probe(
    train_h: Tensor,
    train_y: Tensor,
    test_h: Tensor,
    test_y: Tensor,
    names: Sequence[str] | None = None,
    l2_grid: Sequence[float] = L2_GRID,
) -> dict:
    """Metrics of one logistic regression for each class against the rest, on frozen features.

    The L2 strength, one for all classes, is that of the best mAP on a random tenth of the training
    split (the strongest among equals); the classifiers are then fitted on all of it.

    Args:
        train_h, test_h: (N, D) and (M, D) features, floating point.
        train_y, test_y: (N, C) and (M, C) of 0 and 1; or (N,) and (M,) integer labels >= 0, each
            class then against the others.
        names: of the classes; by default their numbers.
        l2_grid: candidates for l2 in `fit_logistic`.

    Returns:
        `percent`: averages of AP and AUC, and top-1, variable top-k and ASMA of `label_sets`;
        `classes` with each class's `average_precision` and `roc_auc`; `skipped`; the `protocol`.

    Raises:
        ValueError: wrong shapes, labels other than 0 and 1, fewer than 10 training samples, or no
            class with both values in the test split.

    Example:
        >>> h = torch.eye(4).repeat(9, 1)
        >>> multilabel_probe(h, h.long(), h, h.long())["percent"]["map"]
        100.0
    """
    if train_y.ndim == 1 and test_y.ndim == 1:
        num_classes = check_splits("multilabel", train_h, train_y, test_h, test_y)
        train_y, test_y = (F.one_hot(y, num_classes) for y in (train_y, test_y))
    if len(train_h) < 10 or train_y.shape[1:] != test_y.shape[1:]:
        raise ValueError(
            "multilabel: train_y and test_y must have the same classes and train_h 10 rows or "
            f"more, got {tuple(train_y.shape)} and {tuple(test_y.shape)}."
        )
    check_targets("multilabel", train_h.new_zeros(train_y.shape), train_y)
    num_classes = train_y.shape[1]
    held = held_out(torch.zeros(len(train_y), dtype=torch.int64))
    fit_h, held_h = standardise(train_h[~held], train_h[~held], train_h[held])
    weights, selection = None, {}
    for l2 in sorted(l2_grid, reverse=True):
        weights = fit_logistic(fit_h, train_y[~held], num_classes, l2, weights)
        ap = average_precision(held_h @ weights[0] + weights[1], train_y[held])
        selection[l2] = ap.nanmean().nan_to_num().item()
    l2 = max(selection, key=selection.get)
    fit_h, last_h = standardise(train_h, train_h, test_h)
    weight, bias = fit_logistic(fit_h, train_y, num_classes, l2)
    scores = last_h @ weight + bias
    found = multilabel(scores, test_y, names)
    percent = {key: 100 * value for key, value in found.items() if isinstance(value, float)}
    sets = label_sets(scores, test_y)
    percent |= {key: sets[key] for key in ("real", "variable_top_k", "exact_match", "asma")}
    return {
        "percent": percent,
        "classes": {key: found[key] for key in ("average_precision", "roc_auc")},
        "skipped": found["skipped"],
        "protocol": {
            "classifier": "one logistic regression a class, L-BFGS with strong Wolfe line search",
            "objective": "sum over classes of mean binary cross-entropy + l2/2 * |weights|^2",
            "standardised": "with mean and standard deviation of the samples fitted on",
            "l2_grid": sorted(l2_grid, reverse=True),
            "l2": l2,
            "l2_chosen_on": f"{int(held.sum())} of the {len(held)} training samples, held out: mAP",
            "held_out_map": {f"{key:g}": value for key, value in selection.items()},
            "refitted_on": len(held),
            "asma_subgroups": sets["subgroups"],
        },
    }


def label_sets(scores: Tensor, targets: Tensor, weights: str = "uniform", n_min: int = 20) -> dict:
    """Accuracies that do not punish a valid label for being the second one.

        real            mean_i 1[argmax_c s_ic in Y_i]
        variable_top_k  mean_i |top-k_i of s_i and Y_i| / k_i,  k_i = |Y_i|
        exact_match     mean_i 1[top-k_i of s_i = Y_i]
        asma            variable_top_k of each subgroup |Y| = 1, 2, 3, ..., then their mean

    Args:
        scores: (N, C) floating point, finite. targets: (N, C), 0 or 1: the valid labels Y_i.
        weights: of the subgroups in asma: "uniform", or "size", which gives `variable_top_k`.
        n_min: subgroups of fewer images are left out of a uniform asma, unless all are.

    Returns:
        The four in percent, `multi_label_percent` (images with several), `no_label`, the number of
        images without any, which are left out, and `subgroups`: number and percent by |Y|.

    Raises:
        ValueError: wrong shapes, labels other than 0 and 1, no image with a label.

    Notes: among equal scores the lowest class comes first. How the paper weights its subgroups is
        not published in the abstract this follows; the default counts each alike.

    Example:
        >>> label_sets(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0, 1, 1]]))["variable_top_k"]
        50.0

    Paper: ReaL: Beyer et al., "Are we done with ImageNet?", arXiv 2006.07159; subgroups by number
    of labels as in the multi-label re-assessment of ImageNet.
    """
    check_targets("label_sets", scores, targets)
    if weights not in ("uniform", "size"):
        raise ValueError(f'label_sets: weights must be "uniform" or "size", got {weights!r}.')
    some = (targets != 0).any(1)
    if not some.any():
        raise ValueError("label_sets: targets must hold a label, got none on any image.")
    relevant = (targets != 0)[some]
    order = scores[some].argsort(dim=1, descending=True, stable=True)
    relevant = relevant.gather(1, order)
    k = relevant.sum(1)
    inside = torch.arange(relevant.shape[1], device=k.device) < k[:, None]
    share = (relevant & inside).sum(1).double() / k
    groups = {int(n): share[k == n] for n in k.unique()}
    counted = [g for g in groups.values() if len(g) >= n_min] or list(groups.values())
    uniform = sum(g.mean().item() for g in counted) / len(counted)
    return {
        "real": 100 * relevant[:, 0].double().mean().item(),
        "variable_top_k": 100 * share.mean().item(),
        "exact_match": 100 * (share == 1).double().mean().item(),
        "asma": 100 * (uniform if weights == "uniform" else share.mean().item()),
        "multi_label_percent": 100 * (k > 1).double().mean().item(),
        "no_label": int((~some).sum()),
        "subgroups": {
            str(n): {"n": len(g), "percent": 100 * g.mean().item()} for n, g in groups.items()
        },
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
    check_targets("average_precision", scores, targets)
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
    check_targets("roc_auc", scores, targets)
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


def check_targets(caller: str, scores: Tensor, targets: Tensor) -> None:
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
