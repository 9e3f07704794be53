"""Products of whole matrices in float32, by a wider kernel than the library's where we have one."""

import torch
from torch import Tensor

from fastssl.extension import wider_than_mkl
from fastssl.ops.contrastive import lib


def product_ref_(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=int(add))


lib.define("product_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()")
lib.impl("product_", product_ref_, "CompositeExplicitAutograd")


def is_wider(x: Tensor) -> bool:
    """Whether float32 products on x's device are faster here than the library's."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and wider_than_mkl()


def product_(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """out (m, n), of contiguous rows, becomes a b, or out + a b. Without a gradient.

    a (m, k) and b (k, n), copied unless contiguous by rows or by columns, are both float32 or
    bfloat16 and out is float32; or all are float64. Deterministic; our own products are the same
    to the bit on any number of threads.
    """
    cpu = out.device.type == "cpu" and out.dtype == torch.float32
    if cpu and not torch.compiler.is_compiling():
        torch.ops.fastssl.product_(out, a, b, add)
    else:
        product_ref_(out, a, b, add)
    return out


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, as `product_`."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return product_(a.new_empty((len(a), b.shape[1]), dtype=dtype), a, b)
