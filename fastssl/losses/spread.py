"""lightly's losses that spread features: their arguments, names, defaults and values."""

import torch
from torch import Tensor, nn

from fastssl.losses.ranks import check_group, check_initialized, described, group_of
from fastssl.ops import barlow_twins, koleo, vicreg


class KoLeoLoss(nn.Module):
    """KoLeo, which pushes each row away from its nearest; drop-in for lightly's KoLeoLoss.

    loss = -mean_i log(d_i + eps), d_i = ||y_i - y_j + eps||_p, y = x / |x|, j the other row of
    largest <y_i, y_j>.

    Args:
        p: >= 1, the norm of the distance.
        eps: > 0; also the least length that a row is divided by.
        topk: the number of nearest rows, over which the mean is taken, as in DINOv3. Ours.
        group: whose ranks' rows are one batch, as in `fastssl.ops.koleo`. Ours.

    Shapes: x (N, D). Returns a float32 scalar.

    Raises: as `fastssl.ops.koleo`.

    Memory: O(N D); the N x N cosines are never stored.

    Notes: over several ranks the nearest of the rows of all, lightly's of a rank's own, as here
        with group=fastssl.LOCAL. One row has loss 0, where lightly's is its own nearest.

    Example:
        >>> KoLeoLoss()(torch.randn(8, 16)).shape
        torch.Size([])

    Paper: spreading vectors for similarity search, arXiv:1806.03198.
    """

    def __init__(self, p: float = 2, eps: float = 1e-8, *, topk: int = 1, group=None):
        super().__init__()
        check_group("KoLeoLoss", group)
        self.p, self.eps, self.topk, self.group = p, eps, topk, group

    def extra_repr(self) -> str:
        topk = "" if self.topk == 1 else f", topk={self.topk}"
        return described(f"p={self.p}, eps={self.eps}{topk}", self.group)

    def forward(self, x: Tensor) -> Tensor:
        return koleo(x, eps=self.eps, p=self.p, topk=self.topk, group=self.group)


class VICRegLoss(nn.Module):
    """Variance, invariance and covariance of two views; drop-in for lightly's VICRegLoss.

    loss = lambda mean (z_a - z_b)^2 + sum over z of both views of
    mu / (2 D) sum_i max(0, 1 - sqrt(V_ii + eps)) + nu / D sum_{i != j} V_ij^2,
    V = X^T X / (N - 1), X = z less its mean.

    Args:
        lambda_param, mu_param, nu_param: factors of invariance, variance and covariance.
        gather_distributed: False: group=LOCAL. True: an error, not a silent loss of one process,
            where torch.distributed is not initialised.
        eps: > 0, added to the variance under the root.
        group: whose ranks' rows are one batch, as in `fastssl.ops.vicreg`. Ours.

    Shapes: z_a and z_b (N, ..., D), N >= 2 over all ranks; the mean is taken over the positions
        between. Returns a float32 scalar.

    Raises:
        ValueError: a gather_distributed that contradicts group; and as `fastssl.ops.vicreg`.

    Memory: min(N, D)^2 numbers for each view and position.

    Notes: over several ranks all three terms are of the rows of all; lightly's invariance is of a
        rank's own rows, and by default it does not gather.

    Example:
        >>> z_a, z_b = torch.randn(2, 8, 16).unbind()
        >>> VICRegLoss()(z_a, z_b).shape
        torch.Size([])

    Paper: VICReg, arXiv:2105.04906; over positions VICRegL, arXiv:2210.01571.
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool | None = None,
        eps: float = 1e-4,
        *,
        group=None,
    ):
        super().__init__()
        self.group = group_of("VICRegLoss", gather_distributed, group)
        self.gather_distributed = gather_distributed
        self.lambda_param, self.mu_param, self.nu_param = lambda_param, mu_param, nu_param
        self.eps = eps

    def extra_repr(self) -> str:
        factors = f"{self.lambda_param}, {self.mu_param}, {self.nu_param}, eps={self.eps}"
        return described(factors, self.group)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        check_initialized("VICRegLoss", self.gather_distributed)
        options = {
            "sim": self.lambda_param, "std": self.mu_param, "cov": self.nu_param, "eps": self.eps,
            "group": self.group,
        }  # fmt: skip
        if z_a.dim() < 3 or z_a.shape != z_b.shape:
            return vicreg(z_a, z_b, **options)
        positions = (z.flatten(1, -2).unbind(1) for z in (z_a, z_b))
        return torch.stack(
            [vicreg(a, b, **options) for a, b in zip(*positions, strict=True)]
        ).mean()


class BarlowTwinsLoss(nn.Module):
    """Cross-correlation of two views against the identity; drop-in for lightly's BarlowTwinsLoss.

    loss = sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2, C = X_a^T X_b / N, X the views
    normalised by column.

    Args:
        lambda_param: the factor of what is off the diagonal.
        gather_distributed: False: group=LOCAL. True: an error, not a silent loss of one process,
            where torch.distributed is not initialised.
        normalization: "batch_norm", "local_batch_norm" or "local_std", as in
            `fastssl.ops.barlow_twins`. Ours.
        group: whose ranks' rows are one batch, as in `fastssl.ops.barlow_twins`. Ours.

    Shapes: z_a and z_b (N, D), N >= 2 over all ranks. Returns a float32 scalar.

    Raises:
        ValueError: a gather_distributed that contradicts group; and as `fastssl.ops.barlow_twins`.

    Memory: 2 min(N, D)^2 numbers.

    Notes: over several ranks columns are normalised by the rows of all, in lightly by a rank's own,
        as here with normalization="local_batch_norm"; by default lightly does not gather.

    Example:
        >>> z_a, z_b = torch.randn(2, 8, 16).unbind()
        >>> BarlowTwinsLoss()(z_a, z_b).shape
        torch.Size([])

    Paper: Barlow Twins, arXiv:2103.03230.
    """

    def __init__(
        self,
        lambda_param: float = 5e-3,
        gather_distributed: bool | None = None,
        *,
        normalization: str = "batch_norm",
        group=None,
    ):
        super().__init__()
        self.group = group_of("BarlowTwinsLoss", gather_distributed, group)
        self.gather_distributed = gather_distributed
        self.lambda_param, self.normalization = lambda_param, normalization

    def extra_repr(self) -> str:
        text = f"lambda_param={self.lambda_param}, normalization={self.normalization!r}"
        return described(text, self.group)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        check_initialized("BarlowTwinsLoss", self.gather_distributed)
        return barlow_twins(
            z_a, z_b, off_diagonal=self.lambda_param, normalization=self.normalization,
            group=self.group,
        )  # fmt: skip
