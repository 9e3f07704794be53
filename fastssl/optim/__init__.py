"""Optimizers, with states of 8 or 32 bits, SAM around them, moving averages, parameter groups."""

from .ema import EMA, cosine_momentum, warmup_momentum
from .groups import param_groups, param_groups_layer_decay
from .memory import memory_report
from .overrides import StableEmbedding
from .rules import (
    LAMB,
    LARS,
    Adagrad8bit,
    Adam8bit,
    AdamW8bit,
    AdEMAMix8bit,
    LAMB8bit,
    LARS8bit,
    Lion,
    Lion8bit,
    RMSprop8bit,
    SGD8bit,
)
from .sam import SAM, replay
from .timm import register_timm

__all__ = [
    "EMA",
    "LAMB",
    "LARS",
    "SAM",
    "AdEMAMix8bit",
    "Adagrad8bit",
    "Adam8bit",
    "AdamW8bit",
    "LAMB8bit",
    "LARS8bit",
    "Lion",
    "Lion8bit",
    "RMSprop8bit",
    "SGD8bit",
    "StableEmbedding",
    "cosine_momentum",
    "memory_report",
    "param_groups",
    "param_groups_layer_decay",
    "register_timm",
    "replay",
    "warmup_momentum",
]
