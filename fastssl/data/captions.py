"""Captions: which data have them, and the one of an image for a step."""

import re

import torch
from torch import Tensor

from ..random import CAPTIONS, words

_ENDS = {"line": re.compile(r"\s*\n\s*"), "sentence": re.compile(r"\s*\n\s*|(?<=[.!?;])\s+")}
"""What stands between two captions of an image."""


def check_captions(source, method: str) -> None:
    """Refuse data without captions.

    Raises:
        ValueError: `source` has none, or none of the first hundred images has.
    """
    captions = getattr(source, "captions", None)
    if captions is None or not any(captions(torch.arange(min(100, len(source))))):
        raise ValueError(
            f"pretrain: data must have captions, which {method} reads, got {source.name!r}, which "
            "has none. Use a .csv or .tsv list with a column `caption`, shards with .txt files, "
            "or shapes."
        )


def draw_captions(source, index: Tensor, part: str, *, seed: int, epoch: int) -> list[str]:
    """One caption of each sample, where it has several another one in other epochs.

    Args:
        source: with `captions(index)`.
        index: (B,) int64 on the CPU, as the order of an epoch gives it.
        part: what of a text is one caption, "line" or "sentence".
    """
    texts = source.captions(index % len(source))
    numbers = words(seed, CAPTIONS, epoch, index, 0, 1)[:, 0].tolist()
    chosen = []
    for text, number in zip(texts, numbers, strict=True):
        several = [piece for piece in _ENDS[part].split(text.strip()) if piece]
        chosen.append(several[number % len(several)] if several else "")
    return chosen
