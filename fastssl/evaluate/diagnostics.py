"""What the features look like: effective rank, spread, alignment and uniformity."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rankme(h: Tensor, eps: float = 1e-7) -> float:
    """Effective rank of the features: exp(-sum p log p), p = singular values / their sum + eps.

    1 means that all features lie on one line (collapse), min(N, D) that they use all directions
    alike. It compares trained networks of one width; random weights may score higher than trained
    ones, so it is no measure of progress.

    Args:
        h: (N, D) features, not centred; N of 10 D or more for a stable value.

    Paper: Garrido et al., "RankMe", arXiv 2210.02885.
    """
    singular = torch.linalg.svdvals(h.double())
    p = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny) + eps
    return (-(p * p.log()).sum()).exp().item()


def feature_std(h: Tensor) -> float:
    """Mean over dimensions of the deviation of h (N, D) / |h|, times sqrt(D).

    Close to 1 for directions spread over the sphere, 0 when every image has the same features.

    Paper: Chen and He, "SimSiam", arXiv 2011.10566.
    """
    return (F.normalize(h, dim=1).std(0, correction=0).mean() * h.shape[1] ** 0.5).item()


def alignment(x: Tensor, y: Tensor, alpha: float = 2.0) -> float:
    """Mean of |x - y|^alpha over the positive pairs (x_i, y_i), on the unit sphere; 0 is best.

    Args:
        x, y: (N, D) features of two views of the same N images, N >= 1, floating point.
        alpha: > 0.

    Raises:
        ValueError: for shapes that differ or no pair.

    Example:
        >>> round(alignment(torch.eye(2), torch.eye(2).flip(0)), 6)  # right angles
        2.0

    Paper: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and
    Uniformity on the Hypersphere", arXiv 2005.10242.
    """
    if x.shape != y.shape or x.ndim != 2 or len(x) == 0:
        raise ValueError(
            f"alignment: x and y must be (N, D) of one shape with N >= 1, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    x, y = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)
    return (x - y).norm(dim=1).pow(alpha).mean().item()


def class_alignment(h: Tensor, y: Tensor) -> float:
    """`alignment` with alpha = 2 where any two images of one class are a positive pair.

        2 sum_c (n_c sum_{i in c} |h_i|^2 - |sum_{i in c} h_i|^2) / sum_c n_c (n_c - 1)

    Args:
        h: (N, D) features, floating point.
        y: (N,) integer labels; images with a negative one are left out.

    Returns:
        In [0, 4]; NaN if no class has two images.

    Example:
        >>> class_alignment(torch.eye(4), torch.tensor([0, 0, 1, -1]))
        2.0
    """
    h, y = F.normalize(h[y >= 0].double(), dim=1), y[y >= 0]
    counts = y.bincount().double()
    sums = h.new_zeros(len(counts), h.shape[1]).index_add_(0, y, h)
    squared = counts.new_zeros(len(counts)).index_add_(0, y, h.square().sum(1))
    total = (counts * squared - sums.square().sum(1)).clamp_min(0).sum()
    return (2 * total / (counts * (counts - 1)).sum()).item()


def uniformity(h: Tensor, t: float = 2.0, block: int = 1024) -> float:
    """log of the mean over pairs i < j of exp(-t |h_i - h_j|^2), on the unit sphere.

    0 when all features are alike; for t = 2 about -4 + 8 / D, near -4, spread over a wide sphere.

    Args:
        h: (N, D) features, N >= 2, floating point. t: > 0. block: rows of one product.

    Raises:
        ValueError: for a wrong shape or fewer than two rows.

    Memory: block x N distances.

    Example:
        >>> round(uniformity(torch.eye(3)), 6)  # all pairs at right angles: -2 * 2
        -4.0

    Paper: Wang and Isola, arXiv 2005.10242.
    """
    if h.ndim != 2 or len(h) < 2:
        raise ValueError(f"uniformity: h must be (N, D) with N >= 2, got {tuple(h.shape)}.")
    h = F.normalize(h.double(), dim=1)
    norms = h.square().sum(1)  # 1, but 0 for a row of zeros
    total = h.new_zeros(())
    for start in range(0, len(h), block):
        rows = h[start : start + block]
        squared = norms[start : start + block, None] + norms[start:] - 2 * rows @ h[start:].T
        total += squared.clamp_min_(0).mul_(-t).exp_().triu_(1).sum()  # i < j
    return (2 * total / (len(h) * (len(h) - 1))).log().item()


def diagnostics(
    train_h: Tensor,
    train_y: Tensor | None = None,
    max_rows: int = 25_600,
    max_pair_rows: int = 8192,
) -> dict:
    """RankMe, spread, uniformity of train_h (N, D); class alignment where labels (N,) give pairs.

    Of more than `max_rows` features (`max_pair_rows` for uniformity, which compares all pairs) as
    many are taken at equal steps: sources often come class by class.
    """
    h, pair_h = _thin(train_h, max_rows), _thin(train_h, max_pair_rows)
    result = {"rankme": rankme(h), "feature_std": feature_std(h), "uniformity": uniformity(pair_h)}
    if train_y is not None:
        aligned = class_alignment(h, _thin(train_y, max_rows))
        result |= {} if math.isnan(aligned) else {"class_alignment": aligned}
    protocol = {"rows": len(h), "pair_rows": len(pair_h), "width": h.shape[1], "centred": False}
    return result | {"protocol": protocol}


def _thin(rows: Tensor, count: int) -> Tensor:
    count = min(count, len(rows))
    return rows[torch.arange(count) * len(rows) // count]
