"""Optimizers and parameter groups."""

from .groups import param_groups
from .lars import LARS

__all__ = ["LARS", "param_groups"]
