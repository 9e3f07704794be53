"""Losses as modules: drop-ins with other libraries' signatures, and ours for home-made loops.

`fastssl.losses.pml` and `fastssl.losses.dinov2` hold the names of pytorch-metric-learning and of
DINOv2 and v3, some of which are taken here.
"""

from fastssl.losses import dinov2, pml
from fastssl.losses.clip import ClipLoss, SigLipLoss
from fastssl.losses.lejepa import EppsPulley, LeJEPALoss, SIGReg, SlicingUnivariateTest
from fastssl.losses.ntxent import DCLLoss, DCLWLoss, NTXentLoss
from fastssl.losses.own import InfoNCELoss, QueueNCELoss
from fastssl.losses.prototypes import DINOLoss, IBOTPatchLoss, SwaVLoss, power_law_marginal
from fastssl.losses.spread import BarlowTwinsLoss, KoLeoLoss, VICRegLoss
from fastssl.losses.supcon import SupConLoss

__all__ = [
    "BarlowTwinsLoss",
    "ClipLoss",
    "DCLLoss",
    "DCLWLoss",
    "DINOLoss",
    "EppsPulley",
    "IBOTPatchLoss",
    "InfoNCELoss",
    "KoLeoLoss",
    "LeJEPALoss",
    "NTXentLoss",
    "QueueNCELoss",
    "SIGReg",
    "SigLipLoss",
    "SlicingUnivariateTest",
    "SupConLoss",
    "SwaVLoss",
    "VICRegLoss",
    "dinov2",
    "pml",
    "power_law_marginal",
]
