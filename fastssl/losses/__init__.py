"""Losses as modules: drop-ins with other libraries' signatures, and ours for home-made loops."""

from fastssl.losses.clip import ClipLoss, SigLipLoss
from fastssl.losses.ntxent import DCLLoss, DCLWLoss, NTXentLoss
from fastssl.losses.own import InfoNCELoss, QueueNCELoss
from fastssl.losses.supcon import SupConLoss

__all__ = [
    "ClipLoss",
    "DCLLoss",
    "DCLWLoss",
    "InfoNCELoss",
    "NTXentLoss",
    "QueueNCELoss",
    "SigLipLoss",
    "SupConLoss",
]
