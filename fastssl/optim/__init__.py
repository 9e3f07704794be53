"""Optimizers, with states of 8 or 32 bits, and parameter groups."""

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
from .timm import register_timm

__all__ = [
    "LAMB",
    "LARS",
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
    "memory_report",
    "param_groups",
    "param_groups_layer_decay",
    "register_timm",
]
