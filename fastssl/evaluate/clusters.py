"""k-means of the features, and how well its clusters agree with the labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import check_split


def clusters(h: Tensor, y: Tensor, k: int | None = None, seed: int = 0, restarts: int = 5) -> dict:
    """Agreement of the labels with k-means of the features on the unit sphere.

        nmi = 2 I(cluster, class) / (H(cluster) + H(class))
        ari = (pairs together in both - expected) / (largest possible - expected)

    Labels choose nothing: of the restarts the one of least inertia is scored.

    Args:
        h: (N, D) features, floating point. y: (N,) integer labels >= 0.
        k: number of clusters, 1 <= k <= N; by default the number of classes.
        seed, restarts: of the k-means++ seeding; restarts >= 1.

    Returns:
        `nmi`, at most 1, and `ari`, at most 1 and about 0 by chance, and the `protocol`.

    Raises:
        ValueError: for wrong shapes, labels, an empty split, values that are not finite, or k or
            restarts out of range.

    Memory: 8192 x k distances.

    Example:
        >>> h, y = torch.eye(4).repeat(9, 1), torch.arange(4).repeat(9)
        >>> clusters(h, y)["nmi"]
        1.0
    """
    check_split("clusters", "train", h, y)
    k = len(y.unique()) if k is None else k
    if not 1 <= k <= len(h) or restarts < 1:
        raise ValueError(
            f"clusters: k must be in [1, {len(h)}] and restarts >= 1, got {k} and {restarts}."
        )
    generator = torch.Generator().manual_seed(seed)
    h = F.normalize(h, dim=1)
    runs = [kmeans(h, seeds(h, k, generator)) for _ in range(restarts)]
    assigned, inertia = min(runs, key=lambda run: run[1])
    nmi, ari = agreement(assigned, y)
    protocol = {"k": k, "seed": seed, "restarts": restarts, "features": "unit length"}
    protocol |= {"seeding": "k-means++", "inertia": inertia}
    return {"nmi": nmi, "ari": ari, "protocol": protocol}


def seeds(h: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k rows of h (N, D), each drawn in proportion to its squared distance from those before."""
    chosen = [int(torch.randint(len(h), (1,), generator=generator))]
    distance = torch.full((len(h),), torch.inf, dtype=torch.float64, device=h.device)
    while len(chosen) < k:
        distance = distance.minimum((h - h[chosen[-1]]).square().sum(1).double())
        total = distance.cumsum(0)
        point = torch.rand(1, generator=generator, dtype=torch.float64).to(h.device) * total[-1]
        chosen.append(min(int(torch.searchsorted(total, point, right=True)), len(h) - 1))
    return h[chosen]


def kmeans(h: Tensor, centres: Tensor, max_iter: int = 100) -> tuple[Tensor, float]:
    """Lloyd's iterations from centres (k, D) until no row of h (N, D) changes its cluster.

    Returns:
        The cluster of each row, (N,) int64, and the sum of squared distances to the centres. A
        centre without rows stays where it is.
    """
    assigned = None
    for _ in range(max_iter):
        before, assigned = assigned, _closest(h, centres)
        if before is not None and torch.equal(before, assigned):
            break
        count = assigned.bincount(minlength=len(centres))[:, None]
        mean = torch.zeros_like(centres).index_add_(0, assigned, h) / count.clamp_min(1)
        centres = torch.where(count > 0, mean, centres)
    return assigned, (h - centres[assigned]).double().square().sum().item()


def _closest(h: Tensor, centres: Tensor) -> Tensor:
    half = centres.square().sum(1) / 2  # |h - c|^2 / 2 = |h|^2 / 2 - (h c - |c|^2 / 2)
    return torch.cat([(rows @ centres.T - half).argmax(1) for rows in h.split(8192)])


def agreement(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Normalised mutual information and adjusted Rand index of two partitions (N,) int64 >= 0."""
    a, b = (part.unique(return_inverse=True)[1] for part in (a, b))
    width = int(b.max()) + 1
    table = (a * width + b).bincount(minlength=(int(a.max()) + 1) * width).view(-1, width).double()
    rows, columns, n = table.sum(1), table.sum(0), len(a)

    def entropy(counts: Tensor) -> Tensor:
        return -torch.special.xlogy(counts / n, counts / n).sum()

    def pairs(counts: Tensor) -> Tensor:
        return (counts * (counts - 1)).sum() / 2

    alone = entropy(rows) + entropy(columns)
    nmi = 2 * (alone - entropy(table)) / alone if alone > 0 else torch.ones(())
    expected = pairs(rows) * pairs(columns) / max(n * (n - 1) / 2, 1)
    most = (pairs(rows) + pairs(columns)) / 2
    ari = (pairs(table) - expected) / (most - expected) if most != expected else torch.ones(())
    return nmi.clamp(0, 1).item(), ari.item()
