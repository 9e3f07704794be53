"""Functions on tensors, each with a CPU and a GPU kernel or on library products."""

from fastssl.ops.barlow import barlow_twins
from fastssl.ops.contrastive import contrastive_lse
from fastssl.ops.info_nce import info_nce
from fastssl.ops.linear_prototypes import linear_prototype_cross_entropy
from fastssl.ops.neighbours import koleo, topk_cosine
from fastssl.ops.prototype_loss import prototype_cross_entropy
from fastssl.ops.prototypes import (
    effective_prototypes,
    prototype_usage,
    sinkhorn,
    sinkhorn_bias,
)
from fastssl.ops.queue import queue_nce
from fastssl.ops.siglip import siglip
from fastssl.ops.sigreg import sigreg, sigreg_directions
from fastssl.ops.sliced import sliced_moments, visreg
from fastssl.ops.supcon import sup_con
from fastssl.ops.transport import optimal_transport
from fastssl.ops.vicreg import vicreg

__all__ = [
    "barlow_twins",
    "contrastive_lse",
    "effective_prototypes",
    "info_nce",
    "koleo",
    "linear_prototype_cross_entropy",
    "optimal_transport",
    "prototype_cross_entropy",
    "prototype_usage",
    "queue_nce",
    "siglip",
    "sigreg",
    "sigreg_directions",
    "sinkhorn",
    "sinkhorn_bias",
    "sliced_moments",
    "sup_con",
    "topk_cosine",
    "vicreg",
    "visreg",
]
