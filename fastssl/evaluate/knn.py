"""Weighted nearest-neighbour classification on frozen features: no training, few settings."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import check_splits, top1_percent


def knn(
    train_h: Tensor,
    train_y: Tensor,
    test_h: Tensor,
    test_y: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict:
    """Top-1 accuracy of the k nearest training images, for every k.

        score(class) = sum of exp(cosine / temperature) over those of the k neighbours in the class

    Args:
        train_h, test_h: (N, D) and (M, D) features, floating point.
        train_y, test_y: (N,) and (M,) integer labels >= 0.
        ks: numbers of neighbours; those above N become N.
        temperature: of the votes, > 0. Small: the nearest neighbour decides.

    Returns:
        `top1_percent` by k and the `protocol` that gave it.

    Raises:
        ValueError: for wrong shapes, labels, an empty split, values that are not finite, a class
            that the training split lacks, k < 1 or temperature <= 0.

    Memory: one block of at most 1024 x 16384 similarities, so N is not bounded by N * M.

    Example:
        >>> h, y = torch.eye(4).repeat(9, 1), torch.arange(4).repeat(9)
        >>> knn(h, y, h, y, ks=(5,))["top1_percent"]
        {'knn-5': 100.0}

    Paper: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
    arXiv 1805.01978; settings as in DINO, arXiv 2104.14294.
    """
    num_classes = check_splits("knn", train_h, train_y, test_h, test_y)
    if not ks or min(ks) < 1:
        raise ValueError(f"knn: ks must be numbers >= 1, got {tuple(ks)}.")
    if not temperature > 0:
        raise ValueError(f"knn: temperature must be > 0, got {temperature}.")
    ks = sorted({min(k, len(train_h)) for k in ks})
    similarity, index = nearest(test_h, train_h, ks[-1])
    votes = (similarity / temperature).exp()
    neighbour_y = train_y[index]
    top1 = {}
    for k in ks:
        score = votes.new_zeros(len(test_h), num_classes)
        score.scatter_add_(1, neighbour_y[:, :k], votes[:, :k])
        top1[f"knn-{k}"] = top1_percent(score.argmax(1), test_y)
    protocol = {"k": ks, "temperature": temperature, "similarity": "cosine"}
    protocol["votes"] = "exp(similarity / temperature)"
    return {"top1_percent": top1, "protocol": protocol}


def nearest(
    queries: Tensor, keys: Tensor, k: int, block: tuple[int, int] = (1024, 16384)
) -> tuple[Tensor, Tensor]:
    """The k keys of largest cosine similarity for each query, largest first.

    Args:
        queries: (M, D). keys: (N, D). k: 1 <= k <= N.
        block: queries and keys per product.

    Returns:
        similarity (M, k) and index of the key (M, k), int64.
    """
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    similarity, index = [], []
    for q in queries.split(block[0]):
        best = q.new_empty(len(q), 0)
        best_index = torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
        for start in range(0, len(keys), block[1]):
            s = q @ keys[start : start + block[1]].T  # (rows, columns)
            s, i = s.topk(min(k, s.shape[1]), dim=1)
            best, best_index = torch.cat((best, s), 1), torch.cat((best_index, i + start), 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            best_index = best_index.gather(1, order)
        similarity.append(best)
        index.append(best_index)
    return torch.cat(similarity), torch.cat(index)
