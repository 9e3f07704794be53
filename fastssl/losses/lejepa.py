"""LeJEPA: SIGReg as a module, with invariance between views, and by the names others give them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl.dist import resolve_levels
from fastssl.losses.ranks import check_group, check_initialized, described, global_mean, group_of
from fastssl.ops import sigreg


class SIGReg(nn.Module):
    """Distance of features from N(0, target_std^2 I) along other random directions every step.

    loss = mean over slices, and views, of the statistic of `fastssl.ops.sigreg`.

    Args:
        num_slices, knots, t_max, target_std, clip, reduction, group: as in `fastssl.ops.sigreg`.
        pool_views: all rows of z are one sample; else every view is one. The part of the statistic
            that is not noise is then V times as large, and its weight wants to be smaller.
        seed: of the directions, with the step.

    Shapes: z (..., N, D), mask (..., N) bool, directions (D, S). Returns a float32 scalar.

    Raises: as `fastssl.ops.sigreg`.

    Memory: as `fastssl.ops.sigreg`, and the buffer `step`.

    Notes: `step` counts the forwards in training mode, on the device and in the state_dict: a run
        that goes on draws what it would have drawn. In eval mode it stands still: equal z, equal
        values. Ranks must call equally often, since none asks for another's step. lightly's
        state_dict loads as well: its knots, which are arguments here, are dropped, and the step
        is 0.

    Example:
        >>> loss = SIGReg(num_slices=64)
        >>> loss(torch.randn(2, 256, 16)).shape  # views, N, D
        torch.Size([])

    Paper: LeJEPA, arXiv:2511.08544.
    """

    def __init__(
        self,
        num_slices: int = 1024,
        knots: int = 17,
        t_max: float = 3.0,
        *,
        pool_views: bool = False,
        target_std: float = 1.0,
        clip: float | None = None,
        reduction: str = "mean",
        seed: int = 0,
        group=None,
    ):
        super().__init__()
        check_group("SIGReg", group)
        self.num_slices, self.knots, self.t_max = num_slices, knots, t_max
        self.pool_views, self.target_std, self.clip = pool_views, target_std, clip
        self.reduction, self.seed, self.group = reduction, seed, group
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # lightly's holds the knots, which are arguments here, and counts no steps.
        knots = [state_dict.pop(prefix + name, None) for name in ("t", "phi", "weights")]
        if all(x is not None for x in knots):
            state_dict.setdefault(prefix + "step", torch.zeros_like(self.step))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        pooled = ", pool_views=True" if self.pool_views else ""
        text = f"num_slices={self.num_slices}, knots={self.knots}, t_max={self.t_max}{pooled}"
        return described(text, self.group)

    def forward(
        self, z: Tensor, mask: Tensor | None = None, directions: Tensor | None = None
    ) -> Tensor:
        if self.pool_views and z.dim() > 2:
            z, mask = z.flatten(0, -2), None if mask is None else mask.flatten()
        loss = sigreg(
            z, num_slices=self.num_slices, knots=self.knots, t_max=self.t_max,
            target_std=self.target_std, seed=self.seed, step=self.step, directions=directions,
            mask=mask, clip=self.clip, reduction=self.reduction, group=self.group,
        )  # fmt: skip
        if self.training:
            self.step += 1
        return loss


class LeJEPALoss(nn.Module):
    """Views attract each other, SIGReg spreads each; drop-in for lightly's LeJEPALoss.

    loss = lambda SIGReg(z) + (1 - lambda) mean (c - z)^2, z the projections of all views, c the
    mean of a sample's global views, the mean over views, samples and dimensions.

    Args:
        lambda_param: lambda, in [0, 1].
        gather_distributed: False: group=LOCAL. True: an error, not a silent loss of one process,
            where torch.distributed is not initialised.
        sigreg_knots, sigreg_t_max, sigreg_num_vectors: T, the last knot and S of SIGReg.
        mixing: "convex", or "additive": lambda SIGReg + mean (c - z)^2, lambda >= 0. Ours.
        centre: "global", or "all": c is the mean of all of a sample's views. Ours.
        pool_views, seed: as in `SIGReg`. Ours.
        group: whose ranks' rows are one batch, as in `fastssl.ops.sigreg`. Ours.

    Shapes: global_proj (Vg, N, D), local_proj (Vl, N, D), or lists of (N, D); local_proj may be
        left out. Returns a float32 scalar. `terms` gives the mean and SIGReg apart.

    Raises:
        ValueError: lambda_param out of range, unknown mixing or centre, views of other shapes, a
            gather_distributed that contradicts group; and as `fastssl.ops.sigreg`.

    Memory: O(V N D), and as `fastssl.ops.sigreg`.

    Notes: directions are ours, and differ from lightly's; given its directions values are equal.
        Over several ranks both terms are of the rows of all; lightly's invariance is of a rank's
        own rows, and by default so is its SIGReg.

    Example:
        >>> z = torch.randn(8, 32, 16)
        >>> LeJEPALoss(sigreg_num_vectors=64)(local_proj=z[2:], global_proj=z[:2]).shape
        torch.Size([])

    Paper: LeJEPA, arXiv:2511.08544.
    """

    def __init__(
        self,
        lambda_param: float = 0.05,
        gather_distributed: bool | None = None,
        sigreg_knots: int = 17,
        sigreg_t_max: float = 3.0,
        sigreg_num_vectors: int = 1024,
        *,
        mixing: str = "convex",
        centre: str = "global",
        pool_views: bool = False,
        seed: int = 0,
        group=None,
    ):
        super().__init__()
        name = "LeJEPALoss"
        for label, value, choices in (
            ("mixing", mixing, ("convex", "additive")),
            ("centre", centre, ("global", "all")),
        ):
            if value not in choices:
                one, other = choices
                raise ValueError(f'{name}: {label} must be "{one}" or "{other}", got {value!r}.')
        most = 1 if mixing == "convex" else math.inf
        if not 0 <= lambda_param <= most or lambda_param == math.inf:
            rule = "lie in [0, 1]" if mixing == "convex" else "be a number >= 0"
            raise ValueError(
                f"{name}: lambda_param must {rule} where mixing is {mixing!r}, got {lambda_param}. "
                "Typical: 0.02 to 0.1."
            )
        self.group = group_of(name, gather_distributed, group)
        self.gather_distributed = gather_distributed
        self.lambda_param, self.mixing, self.centre = lambda_param, mixing, centre
        self.sigreg = SIGReg(
            sigreg_num_vectors, sigreg_knots, sigreg_t_max, pool_views=pool_views, seed=seed,
            group=self.group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"lambda_param={self.lambda_param}, mixing={self.mixing!r}, centre={self.centre!r}"

    def terms(
        self,
        *,
        local_proj: Tensor | Sequence[Tensor] | None = None,
        global_proj: Tensor | Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The invariance and SIGReg, not weighted."""
        check_initialized("LeJEPALoss", self.gather_distributed)
        seen = every = _stacked("global_proj", global_proj)
        if local_proj is not None:
            local_proj = _stacked("local_proj", local_proj)
            if local_proj.shape[1:] != seen.shape[1:]:
                raise ValueError(
                    "LeJEPALoss: local_proj must have global_proj's samples and width "
                    f"{tuple(seen.shape[1:])}, got {tuple(local_proj.shape)}."
                )
            every = torch.cat([seen, local_proj])
        spread = self.sigreg(every)  # first: on unequal ranks it raises the same on all
        every, seen = (x.to(spread.dtype) for x in (every, seen))
        centre = (every if self.centre == "all" else seen).mean(0)
        squares = (centre - every).square().sum()
        count = squares.new_full((), every.numel())
        return global_mean(squares, count, resolve_levels("LeJEPALoss", self.group)), spread

    def forward(
        self,
        *,
        local_proj: Tensor | Sequence[Tensor] | None = None,
        global_proj: Tensor | Sequence[Tensor],
    ) -> Tensor:
        invariance, spread = self.terms(local_proj=local_proj, global_proj=global_proj)
        rest = 1 - self.lambda_param if self.mixing == "convex" else 1
        return self.lambda_param * spread + rest * invariance


def _stacked(label: str, views: Tensor | Sequence[Tensor]) -> Tensor:
    """(V, N, D)."""
    if not isinstance(views, Tensor):
        shapes = {tuple(x.shape) for x in views}
        if len(shapes) != 1:
            got = " and ".join(map(str, sorted(shapes))) or "none"
            raise ValueError(f"LeJEPALoss: {label} must be views (N, D) of one shape, got {got}.")
        views = torch.stack(list(views))
    if views.dim() != 3 or not len(views):
        raise ValueError(
            f"LeJEPALoss: {label} must be (V, N, D) with at least one view, or a list of (N, D), "
            f"got {tuple(views.shape)}."
        )
    return views


@dataclass(frozen=True)
class EppsPulley:
    """The test that SIGReg makes of each slice, in the words of the lejepa package: a description,
    for `SlicingUnivariateTest`.

    Args:
        t_max: > 0, the last knot.
        n_points: odd, >= 3, knots on [0, t_max].
    """

    t_max: float = 3.0
    n_points: int = 17


class SlicingUnivariateTest(SIGReg):
    """SIGReg by the call that the lejepa package has published.

    Args:
        univariate_test: an `EppsPulley`; of its tests the one that SIGReg is.
        num_slices: S.
        reduction: "mean", "sum", or None for (..., S).
        sampler: "gaussian", the only one.
        clip_value: statistics below this count as 0.

    Shapes: x (..., N, D). Returns a float32 scalar, or (..., S).

    Raises:
        TypeError: another test. ValueError: another sampler; and as `fastssl.ops.sigreg`.

    Memory: as `fastssl.ops.sigreg`.

    Notes: other directions than that package draws; over several ranks all of them, without its
        reading of a step on the host. In eval mode the directions stay, where its step moves on.

    Example:
        >>> loss = SlicingUnivariateTest(univariate_test=EppsPulley(n_points=17), num_slices=64)
        >>> loss(torch.randn(256, 16)).shape
        torch.Size([])

    Paper: LeJEPA, arXiv:2511.08544.
    """

    def __init__(
        self,
        univariate_test: EppsPulley,
        num_slices: int,
        reduction: str | None = "mean",
        sampler: str = "gaussian",
        clip_value: float | None = None,
    ):
        if not isinstance(univariate_test, EppsPulley):
            raise TypeError(
                "SlicingUnivariateTest: univariate_test must be fastssl.losses.EppsPulley(), got "
                f"{type(univariate_test).__name__}. Other tests are not offered."
            )
        if sampler != "gaussian":
            raise ValueError(f'SlicingUnivariateTest: sampler must be "gaussian", got {sampler!r}.')
        super().__init__(
            num_slices, univariate_test.n_points, univariate_test.t_max, clip=clip_value,
            reduction="none" if reduction is None else reduction,
        )  # fmt: skip
