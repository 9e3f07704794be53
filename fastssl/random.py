"""Random numbers as a pure function of what they are for.

Every number is Philox4x32-10 of (seed, stream, epoch, sample index, view, parameter number). There
is no generator state: a number does not depend on the batch a sample is in, on the worker that
decodes it, on the rank that trains on it, or on what was drawn before, so a run resumes exactly and
a checkpoint holds no generator.

Paper: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

# Streams keep the uses of one seed apart.
AUGMENT, ORDER, STEP, SPLIT, SLICES, CUSTOM, SHAPES, MIXTURE, MASK, CAPTIONS = range(10)

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten rounds of Philox on 32-bit words held in int64.

    Args:
        counter: (..., 4) int64, words in [0, 2**32).
        key: two words in [0, 2**32).

    Returns:
        (..., 4) int64, words in [0, 2**32).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        # The product wraps modulo 2**64, which keeps all 64 bits of the unsigned product; the mask
        # takes the copies of the sign out of the shifted high word.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def words(
    seed: int, stream: int, epoch: int, index: Tensor, view: int, count: int, first: int = 0
) -> Tensor:
    """Random 32-bit words for samples `index` (B,) int64: parameters first .. first + count - 1.

    Counter words: index (low 32 bits); epoch; view (8 bits) and block of four parameters (24 bits);
    stream (8 bits) and the index's high bits. `first` must be a multiple of 4.

    Returns:
        (B, count) int64, words in [0, 2**32).
    """
    if first % 4 or (first + count) >= 1 << 26:
        raise ValueError(f"words: first must be a multiple of 4 below 2**26, got {first}.")
    blocks = torch.arange(first // 4, (first + count + 3) // 4, device=index.device)
    index, blocks = index[:, None], blocks[None, :]
    counter = torch.stack(
        torch.broadcast_tensors(
            index & _MASK,
            torch.full_like(index, epoch),
            (view << 24) | blocks,
            (stream << 24) | (index >> 32),
        ),
        dim=-1,
    )  # (B, blocks, 4)
    key = (seed & _MASK, (seed >> 32) & _MASK)
    return philox4x32(counter, key).flatten(1)[:, :count]


def uniform(
    seed: int, stream: int, epoch: int, index: Tensor, view: int, count: int, first: int = 0
) -> Tensor:
    """(B, count) float64, uniform in the open interval (0, 1); arguments as `words`.

    float64 because vectorised and scalar `exp`, `log` and `cos` may differ in the last bit, and
    which of them an element meets depends on the batch: rounding to float32 afterwards hides it.
    """
    return (words(seed, stream, epoch, index, view, count, first).double() + 0.5) / 2.0**32


def permutation(n: int, seed: int, stream: int = ORDER, epoch: int = 0) -> Tensor:
    """(n,) int64: the order of n samples in one epoch, by sorting one 63-bit key a sample."""
    high, low = words(seed, stream, epoch, torch.arange(n), 0, 2).unbind(-1)
    return torch.argsort((high << 31) | (low >> 1), stable=True)


def step_seed(seed: int, step: int, rank: int) -> int:
    """63-bit seed of torch's own generators (dropout, drop-path, masks) in one step of one rank."""
    high, low = words(seed, STEP, step, torch.tensor([rank]), 0, 2)[0].tolist()
    return (high << 31) | (low >> 1)
