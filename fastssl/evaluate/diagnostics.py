"""What the features look like without labels: effective rank and spread."""

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


def diagnostics(train_h: Tensor, max_rows: int = 25_600) -> dict:
    """RankMe and spread of the first `max_rows` features of train_h (N, D)."""
    h = train_h[:max_rows]
    return {
        "rankme": rankme(h),
        "feature_std": feature_std(h),
        "protocol": {"rows": len(h), "width": h.shape[1], "centred": False},
    }
