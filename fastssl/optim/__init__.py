"""Optimizers, with states of 8 or 32 bits, SAM around them, moving averages, parameter groups."""

from .ema import EMA, cosine_momentum, warmup_momentum
from .groups import param_groups
from .memory import memory_report
from .rules import (
    LAMB,
    LARS,
    Adagrad8bit,
    Adam8bit,
    AdamW8bit,
    LAMB8bit,
    LARS8bit,
    Lion,
    Lion8bit,
    RMSprop8bit,
    SGD8bit,
)
from .sam import SAM, replay

__all__ = [
    "EMA",
    "LAMB",
    "LARS",
    "Adagrad8bit",
    "Adam8bit",
    "AdamW8bit",
    "LAMB8bit",
    "LARS8bit",
    "Lion",
    "Lion8bit",
    "RMSprop8bit",
    "SAM",
    "SGD8bit",
    "cosine_momentum",
    "memory_report",
    "param_groups",
    "replay",
    "warmup_momentum",
]
