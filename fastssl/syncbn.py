"""Batch normalisation over the batches of all ranks. Import it as `fastssl.dist.SyncBatchNorm`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from fastssl.autograd import once_differentiable
from fastssl.dist import agree, all_sum, host_may_wait, resolve_levels


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x (B, C, ...) by channel, (C,) each, in fp32 or fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    zero, one = x.new_zeros(x.shape[1], dtype=wide), x.new_ones(x.shape[1], dtype=wide)
    if x.numel() == 0:
        return zero, zero
    if torch.compiler.is_compiling():  # fused there; alone it is slow on the CPU
        var, mean = torch.var_mean(x.to(wide), [0, *range(2, x.dim())], correction=0)
        return mean, var
    return torch.batch_norm_update_stats(x, zero, one, 0.0)  # the running ones stay as they are


def _sums(dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of dy and of dy * xhat, by channel: the gradients of bias and weight where both stand."""
    if x.numel() == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean)
    one = torch.ones_like(mean)
    _, dots, sums = torch.ops.aten.native_batch_norm_backward(
        dy, x, one, mean, var, None, None, False, eps, [False, True, True]
    )
    return sums, dots


class _Normalize(torch.autograd.Function):
    """x (B, C, ...) normalised; its count (1,), mean and biased variance (C,) over all ranks."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, levels):
        C = x.shape[1]
        own_mean, own_var = _moments(x)
        wide, m = own_mean.dtype, own_mean.double()
        # In fp64 squares of fp32 means leave enough of the variance when they are subtracted.
        own = torch.cat([m.new_ones(1), m, m.square() + own_var]) * (x.numel() // C)
        count, total, squares = all_sum(own, levels).split([1, C, C])
        some = count.clamp_min(1)
        mean = total / some
        var = (squares / some - mean.square()).clamp_min(0).to(wide)
        mean = mean.to(wide)
        ctx.save_for_backward(x, weight, mean, var, some)
        ctx.eps, ctx.levels = eps, levels
        ctx.mark_non_differentiable(count, mean, var)
        affine = (None if p is None else p.to(wide) for p in (weight, bias))
        y = F.batch_norm(x, mean, var, *affine, eps=eps)
        return y, count, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, weight, mean, var, count = ctx.saved_tensors
        sums, dots = _sums(dy, x, mean, var, ctx.eps)
        dx = None
        if ctx.needs_input_grad[0]:
            means = all_sum(torch.cat([sums, dots]), ctx.levels) / count
            dy_mean, dot_mean = means.to(mean.dtype).chunk(2)
            inverse = (var + ctx.eps).rsqrt()
            slope = inverse if weight is None else inverse * weight
            terms = mean, -slope * inverse * dot_mean, -slope * dy_mean, slope
            mean, along, level, slope = (t.view(-1, *[1] * (x.dim() - 2)) for t in terms)
            # The mean comes off before anything is multiplied: it may be far larger than the rest.
            dx = (x - mean).mul_(along).add_(level).addcmul_(dy, slope).to(x.dtype)
        need_weight, need_bias = ctx.needs_input_grad[1:3]
        return (
            dx,
            dots.to(weight.dtype) if need_weight else None,
            sums.to(weight.dtype) if need_bias else None,
            None,
            None,
        )


class SyncBatchNorm(_BatchNorm):
    """BatchNorm1d, 2d and 3d over the batches of all ranks, on the CPU and on GPUs.

    y = (x - E[x]) / sqrt(Var[x] + eps) * weight + bias, E and Var by channel over the elements of
    all ranks in training; in eval mode, and in one process, as torch's BatchNorm.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, options: as in
            torch's BatchNorm and SyncBatchNorm (the latter's process_group is called group here).
        group: whose ranks' batches are one: None (all processes, once torch.distributed is
            initialised), fastssl.LOCAL, a process group, or a DeviceMesh of one or two dimensions.

    Shapes: x (B, C, ...), contiguous or channels-last; B of each rank its own, also 0. Returns
        x's shape, dtype and layout.

    Raises:
        ValueError: x of other than C channels; in training one element a channel over all ranks
            (not found under torch.compile, where nothing waits for the device); on all ranks, if
            they differ in C or dtype at the first call. RuntimeError: a rank has failed.

    Memory: x is kept for the backward; its gradient is formed in fp32.

    Notes: the forward all-reduces one vector (count, sums, sums of squares: 8 (2 C + 1) bytes), the
        backward another (sums of dy and of dy * xhat: 8 C bytes, 16 C for fp64 input); of both
        2 (W - 1) / W times as much leaves each rank. Moments are taken in fp32 (fp64 input: fp64)
        around each rank's own mean and added up in fp64. No wait for the GPU, also where momentum
        is None, but at the first call. Gradients are those of the sum of all ranks' objectives:
        after DistributedDataParallel's mean parameter gradients equal those of one process.

    Example:
        >>> norm = SyncBatchNorm(16)
        >>> norm(torch.randn(8, 16, 4, 4)).shape
        torch.Size([8, 16, 4, 4])

    Paper: batch normalization, arXiv:1502.03167.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        group=None,
        device=None,
        dtype=None,
        **options,
    ):
        options |= {"device": device, "dtype": dtype}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self.group = group
        self._agreed = False

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"SyncBatchNorm: x must be (B, C, ...) with C = num_features = "
                f"{self.num_features}, got {tuple(x.shape)}."
            )

    def forward(self, x: Tensor) -> Tensor:
        levels = resolve_levels("SyncBatchNorm", self.group) if self.training else ()
        if not levels:
            return super().forward(x)
        self._check_input_dim(x)
        if host_may_wait(x) and not self._agreed:
            same = {"num_features": self.num_features, "the dtype": x.dtype}
            agree("SyncBatchNorm", levels, (), x, **same)
            self._agreed = True
        y, count, mean, var = _Normalize.apply(x, self.weight, self.bias, self.eps, levels)
        # Where there is one element in all every rank asks; a rank with two need not wait for it.
        if x.numel() < 2 * self.num_features and host_may_wait(x) and count == 1:
            raise ValueError(
                "SyncBatchNorm: expected more than 1 value per channel when training, got input "
                f"size {tuple(x.shape)} on this rank and 1 value over all ranks."
            )
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            share = count.clamp_max(1)  # 0 where the batches of all ranks are empty
            if self.momentum is None:
                share = share / self.num_batches_tracked
            else:
                share = share * self.momentum
            unbiased = var * (count / (count - 1).clamp_min(1))
            self.running_mean.mul_(1 - share).add_(share * mean)
            self.running_var.mul_(1 - share).add_(share * unbiased)
        return y

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, group=None) -> nn.Module:
        """module with each BatchNorm in it, torch's SyncBatchNorm too, replaced by this one.

        Parameters, buffers and the training flag are the old ones', shared, not copied. A module
        that is itself a BatchNorm is not changed: its replacement is returned.

        Raises:
            TypeError: a BatchNorm with a forward of its own, whose work would be lost.
        """
        if isinstance(module, _BatchNorm):
            lazy = isinstance(module, LazyModuleMixin)  # knows no C yet
            if type(module).forward not in _FORWARDS or lazy:
                raise TypeError(
                    f"convert_sync_batchnorm: {type(module).__name__} is more than a BatchNorm. "
                    "Replace it by one and what it does besides; run a lazy one once before."
                )
            new = cls(
                module.num_features, module.eps, module.momentum, module.affine,
                module.track_running_stats, group, device="meta",
            )  # fmt: skip
            new._parameters |= module._parameters
            new._buffers |= module._buffers
            return new.train(module.training)
        for name, child in module._modules.items():  # named_children() leaves out repeated ones
            if child is not None:
                module._modules[name] = cls.convert_sync_batchnorm(child, group)
        return module


_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)
