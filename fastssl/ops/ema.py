"""Moving averages of many tensors in one call: a = a + w (v - a)."""

import torch
from torch import Tensor

from fastssl.ops.contrastive import lib, on_cuda


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill their stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def ema_ref(averages: list[Tensor], values: list[Tensor], weight: Tensor) -> None:
    """Pair by pair in at least fp32, rounded once into the averages' dtype."""
    for a, v in zip(averages, values, strict=True):
        dtype = torch.promote_types(torch.promote_types(a.dtype, v.dtype), torch.float32)
        a.copy_(torch.lerp(a.to(dtype), v.to(dtype), weight.to(a.device, dtype)))


# A weight on the host is read there; one on the device is not waited for.
lib.define("ema_(Tensor(a!)[] averages, Tensor[] values, Tensor weight) -> ()")
lib.impl("ema_", ema_ref, "CompositeExplicitAutograd")
torch.library.register_fake("fastssl::ema_", lambda averages, values, weight: None, lib=lib)
on_cuda("ema", "ema_", ema_ref, "goes tensor by tensor")
