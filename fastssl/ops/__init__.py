"""Functions on tensors, each with a CPU and a GPU kernel."""

from fastssl.ops.contrastive import contrastive_lse, info_nce

__all__ = ["contrastive_lse", "info_nce"]
