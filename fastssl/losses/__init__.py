"""Losses as modules: drop-ins with other libraries' signatures, and ours for home-made loops.

`fastssl.losses.pml` holds the names of pytorch-metric-learning, two of which are taken here.
"""

from fastssl.losses import pml
from fastssl.losses.clip import ClipLoss, SigLipLoss
from fastssl.losses.lejepa import EppsPulley, LeJEPALoss, SIGReg, SlicingUnivariateTest
from fastssl.losses.ntxent import DCLLoss, DCLWLoss, NTXentLoss
from fastssl.losses.own import InfoNCELoss, QueueNCELoss
from fastssl.losses.spread import BarlowTwinsLoss, KoLeoLoss, VICRegLoss
from fastssl.losses.supcon import SupConLoss

__all__ = [
    "BarlowTwinsLoss",
    "ClipLoss",
    "DCLLoss",
    "DCLWLoss",
    "EppsPulley",
    "InfoNCELoss",
    "KoLeoLoss",
    "LeJEPALoss",
    "NTXentLoss",
    "QueueNCELoss",
    "SIGReg",
    "SigLipLoss",
    "SlicingUnivariateTest",
    "SupConLoss",
    "VICRegLoss",
    "pml",
]
