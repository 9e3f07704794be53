"""Weighted nearest-neighbour classification on frozen features: no training, few settings."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import check_split, check_splits, top1_percent

Votes = Literal["softmax", "distance", "uniform"]
Metric = Literal["cosine", "l2"]


def knn(
    train_h: Tensor,
    train_y: Tensor,
    test_h: Tensor,
    test_y: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    votes: Votes = "softmax",
    metric: Metric = "cosine",
) -> dict:
    """Top-1 accuracy of the k nearest training images, for every k.

        score(class) = sum of votes of those of the k neighbours that are in the class
        vote = exp(s / temperature)  "softmax",  1 / distance  "distance",  1  "uniform"
        cosine:  s = cos, distance = 1 - cos;   l2:  s = -d^2 / 2, distance = d = |h - h'|

    Args:
        train_h, test_h: (N, D) and (M, D) features, floating point.
        train_y, test_y: (N,) and (M,) integer labels >= 0.
        ks: numbers of neighbours; those above N become N.
        temperature: of "softmax" votes, > 0. Small: the nearest neighbour decides.
        votes: how neighbours are weighted. Among equal scores the lowest class wins.
        metric: "cosine", or "l2" between features as they are; of features of unit length both
            give the same neighbours and "softmax" votes.

    Returns:
        `top1_percent` by k and the `protocol` that gave it.

    Raises:
        ValueError: for wrong shapes, labels, an empty split, values that are not finite, a class
            that the training split lacks, k < 1, temperature <= 0, unknown votes or metric.

    Memory: one block of at most 1024 x 16384 similarities, so N is not bounded by N * M.

    Example:
        >>> h, y = torch.eye(4).repeat(9, 1), torch.arange(4).repeat(9)
        >>> knn(h, y, h, y, ks=(5,))["top1_percent"]
        {'knn-5': 100.0}

    Paper: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
    arXiv 1805.01978; settings as in DINO, arXiv 2104.14294.
    """
    num_classes = check_splits("knn", train_h, train_y, test_h, test_y)
    _check_votes("knn", ks, temperature, votes, metric)
    ks = sorted({min(k, len(train_h)) for k in ks})
    similarity, index = nearest(test_h, train_h, ks[-1], metric)
    weights = _weights(similarity, temperature, votes, metric)
    top1 = _top1(weights, train_y[index], test_y, ks, num_classes)
    top1 = {f"knn-{k}": value for k, value in top1.items()}
    return {"top1_percent": top1, "protocol": _protocol(ks, temperature, votes, metric)}


def knn_leave_one_out(
    h: Tensor,
    y: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    votes: Votes = "softmax",
    metric: Metric = "cosine",
) -> dict:
    """Top-1 accuracy of the k nearest other images of one split, for every k; votes as in `knn`.

    For data without a test split, and for choosing settings on the training split alone.

    Args:
        h: (N, D) features, floating point, N >= 2. y: (N,) integer labels >= 0.
        ks: numbers of neighbours; those above N - 1 become N - 1.
        temperature, votes, metric: as in `knn`.

    Returns:
        `top1_percent` by k and the `protocol`, with the number of images that are alone in their
        class; none of these can be right.

    Raises:
        ValueError: for wrong shapes, labels, fewer than two images, values that are not finite,
            k < 1, temperature <= 0, unknown votes or metric.

    Memory: as `knn`.

    Example:
        >>> h, y = torch.eye(4).repeat(9, 1), torch.arange(4).repeat(9)
        >>> knn_leave_one_out(h, y, ks=(5,))["top1_percent"]
        {'knn-loo-5': 100.0}
    """
    check_split("knn_leave_one_out", "train", h, y)
    _check_votes("knn_leave_one_out", ks, temperature, votes, metric)
    if len(h) < 2:
        raise ValueError("knn_leave_one_out: h must have at least two rows, got 1.")
    ks = sorted({min(k, len(h) - 1) for k in ks})
    similarity, index = nearest(h, h, ks[-1] + 1, metric)
    own = index == torch.arange(len(h), device=h.device)[:, None]
    own[:, -1] |= ~own.any(1)  # pushed out by its copies: then one neighbour too many was found
    similarity, index = (found[~own].view(len(h), ks[-1]) for found in (similarity, index))
    weights = _weights(similarity, temperature, votes, metric)
    top1 = _top1(weights, y[index], y, ks, int(y.max()) + 1)
    protocol = _protocol(ks, temperature, votes, metric)
    protocol |= {"leave_one_out": True, "alone_in_class": int((y.bincount() == 1).sum())}
    return {
        "top1_percent": {f"knn-loo-{k}": value for k, value in top1.items()},
        "protocol": protocol,
    }


def _check_votes(
    caller: str, ks: Sequence[int], temperature: float, votes: str, metric: str
) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"{caller}: ks must be numbers >= 1, got {tuple(ks)}.")
    if not temperature > 0:
        raise ValueError(f"{caller}: temperature must be > 0, got {temperature}.")
    for name, value, known in (("votes", votes, Votes), ("metric", metric, Metric)):
        if value not in get_args(known):
            names = ", ".join(map(repr, get_args(known)))
            raise ValueError(f"{caller}: {name} must be one of {names}, got {value!r}.")


def _weights(similarity: Tensor, temperature: float, votes: str, metric: str) -> Tensor:
    """Vote of each neighbour, like similarity (M, k), whose first column is the largest."""
    if votes == "uniform":
        return torch.ones_like(similarity)
    if votes == "distance":  # an equal feature has a distance of rounding alone
        distance = 1 - similarity if metric == "cosine" else (-2 * similarity).clamp_min(0).sqrt()
        return 1 / distance.clamp_min(torch.finfo(similarity.dtype).eps)
    # Over the largest, which changes no winner: exp(1 / temperature) alone may overflow.
    return ((similarity - similarity[:, :1]) / temperature).exp()


def _top1(
    weights: Tensor, neighbour_y: Tensor, y: Tensor, ks: Sequence[int], num_classes: int
) -> dict[int, float]:
    top1 = {}
    for k in ks:
        score = weights.new_zeros(len(y), num_classes)
        score.scatter_add_(1, neighbour_y[:, :k], weights[:, :k])
        top1[k] = top1_percent(score.argmax(1), y)
    return top1


def _protocol(ks: Sequence[int], temperature: float, votes: str, metric: str) -> dict:
    protocol = {"k": ks, "similarity": "cosine" if metric == "cosine" else "-|h - h'|^2 / 2"}
    if votes == "softmax":
        return protocol | {"temperature": temperature, "votes": "exp(similarity / temperature)"}
    if votes == "uniform":
        return protocol | {"votes": "1"}
    return protocol | {"votes": "1 / (1 - similarity)" if metric == "cosine" else "1 / |h - h'|"}


def nearest(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: Metric = "cosine",
    block: tuple[int, int] = (1024, 16384),
) -> tuple[Tensor, Tensor]:
    """The k most similar keys for each query, the most similar first.

    Args:
        queries: (M, D). keys: (N, D). k: 1 <= k <= N.
        metric: "cosine", or "l2" for -|q - k|^2 / 2.
        block: queries and keys per product.

    Returns:
        similarity (M, k) and index of the key (M, k), int64.
    """
    if metric == "cosine":
        queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    else:  # about their middle, which changes no distance and keeps the digits of small ones
        queries, keys = queries - keys.mean(0), keys - keys.mean(0)
    half = keys.square().sum(1) / 2
    similarity, index = [], []
    for q in queries.split(block[0]):
        best = q.new_empty(len(q), 0)
        best_index = torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
        for start in range(0, len(keys), block[1]):
            columns = slice(start, start + block[1])
            s = q @ keys[columns].T  # (rows, columns)
            if metric == "l2":
                s = s - half[columns] - q.square().sum(1, keepdim=True) / 2
            s, i = s.topk(min(k, s.shape[1]), dim=1)
            best, best_index = torch.cat((best, s), 1), torch.cat((best_index, i + start), 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            best_index = best_index.gather(1, order)
        similarity.append(best)
        index.append(best_index)
    return torch.cat(similarity), torch.cat(index)
