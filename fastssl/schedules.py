"""What changes in the course of training: learning rates, weight decay, momenta, temperatures.

Functions of the progress, the share done in [0, 1]; outside it they keep their first and last
value. `batch.step / batch.total_steps` is one, `batch.epoch / 30` that of the first thirty epochs.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence


def cosine(progress: float, start: float, end: float) -> float:
    """From `start` to `end` by half a cosine.

        end + (start - end) (1 + cos(pi progress)) / 2

    Example:
        >>> from fastssl import schedules
        >>> [schedules.cosine(p, 1.0, 0.0) for p in (0, 0.5, 1)]
        [1.0, 0.5, 0.0]

    Paper: SGDR, arXiv 1608.03983; for a teacher's momentum BYOL, arXiv 2006.07733.
    """
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * _clamp(progress)))


def linear(progress: float, start: float, end: float) -> float:
    """From `start` to `end` in a straight line.

    Example:
        >>> from fastssl import schedules
        >>> [schedules.linear(epoch / 30, 0.0, 1.0) for epoch in (0, 15, 30, 99)]
        [0.0, 0.5, 1.0, 1.0]
    """
    progress = _clamp(progress)
    return start * (1 - progress) + end * progress


def constant(progress: float, start: float, end: float) -> float:
    """`start`; takes the arguments of the others."""
    return start


def steps(progress: float, start: float, at: Sequence[float], factor: float = 0.1) -> float:
    """`start`, times `factor` from each of the rising numbers in `at` on.

    Example:
        >>> from fastssl import schedules
        >>> [schedules.steps(p, 8.0, at=(0.6, 0.8), factor=0.5) for p in (0.5, 0.6, 0.9)]
        [8.0, 4.0, 2.0]
    """
    return start * factor ** bisect_right(at, _clamp(progress))


def warmup(step: int, count: float) -> float:
    """The share of a rate in the first `count` steps: step `step`, from 0, has (step + 1) / count.

    Example:
        >>> from fastssl import schedules
        >>> [schedules.warmup(step, 4) for step in (0, 1, 3, 9)]
        [0.25, 0.5, 1.0, 1.0]
    """
    return min(1.0, (step + 1) / count) if count > 0 else 1.0


def _clamp(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)
