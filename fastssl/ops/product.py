"""Products of whole matrices in float32, by a wider kernel than the library's where we have one."""

import torch
from torch import Tensor

from fastssl.extension import wider_than_mkl
from fastssl.ops.contrastive import lib


def _narrow() -> dict[torch.dtype, bool]:
    """Of 16-bit dtypes, whether torch's library multiplies them on this CPU; what it does instead
    takes up to 50 times as long as float32."""
    found = dict.fromkeys((torch.bfloat16, torch.float16), False)
    if torch.backends.mkldnn.is_available():
        found[torch.bfloat16] = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        found[torch.float16] = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return found


NARROW_PRODUCTS = _narrow()


def multiplied(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype for products that are asked for in dtype: float32 where x's CPU has none of it."""
    slow = x.device.type == "cpu" and not NARROW_PRODUCTS.get(dtype, True)
    return torch.float32 if slow else dtype


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
