"""Exponential moving averages of a model's weights: teachers, and weights to evaluate."""

import copy
import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor, nn

import fastssl.ops.ema  # noqa: F401  (defines the op)

from .states import expanded, local

AVERAGED = (torch.float32, torch.bfloat16, torch.float16)
SMALL = 1 << 14  # elements: less than what an op costs a tensor


def _check_momentum(name: str, label: str, m: float | Tensor) -> None:
    """What is in a tensor is not looked at: it may be on a device."""
    if isinstance(m, Tensor) and m.numel() == 1:
        return
    if not isinstance(m, Real):
        got = f"a tensor {tuple(m.shape)}" if isinstance(m, Tensor) else repr(m)
        raise TypeError(f"{name}: {label} must be one number, got {got}.")
    if not 0 <= m <= 1:
        raise ValueError(f"{name}: {label} must be in [0, 1], got {m}.")


def cosine_momentum(start: float, end: float = 1.0, *, steps: int) -> Callable[[int], float]:
    """The momentum of step t, from `start` at 0 to `end` at `steps` and after.

        m_t = end - (end - start) (cos(pi t / steps) + 1) / 2

    Args:
        start, end: in [0, 1]. steps: >= 1.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> momentum = cosine_momentum(0.996, steps=100)
        >>> momentum(0), momentum(50), momentum(100)
        (0.996, 0.998, 1.0)

    Paper: BYOL, arXiv 2006.07733.
    """
    _check_momentum("cosine_momentum", "start", start)
    _check_momentum("cosine_momentum", "end", end)
    if not steps >= 1:
        raise ValueError(f"cosine_momentum: steps must be at least 1, got {steps}.")

    def momentum(step: int) -> float:
        t = min(max(step, 0), steps)
        return end - (end - start) * (math.cos(math.pi * t / steps) + 1) / 2

    return momentum


def warmup_momentum(most: float) -> Callable[[int], float]:
    """The momentum of step t, min(most, (1 + t) / (10 + t)): the first weights are soon forgotten.

    Args:
        most: in [0, 1].

    Raises:
        ValueError: a number out of range.

    Example:
        >>> momentum = warmup_momentum(0.999)
        >>> momentum(0), momentum(10), momentum(100_000)
        (0.1, 0.55, 0.999)
    """
    _check_momentum("warmup_momentum", "most", most)
    return lambda step: min(most, (1 + step) / (10 + step))


class EMA(nn.Module):
    """A copy of a model whose weights are a moving average of the model's.

        average = average + (1 - m) (value - average)

    Args:
        model: any module; under DistributedDataParallel its `.module`. It is copied with its
            modes, and its copy requires no gradient. The model itself is not a part of this module.
        momentum: m, in [0, 1]: a number, a tensor of one element (on the device: nothing waits for
            it, and a CUDA graph reads it anew), or a function of the step, as `cosine_momentum`
            and `warmup_momentum` make.
        buffers: "copy" them; "average" those of floating point and copy the others; "keep" those of
            the copy, which its own forward updates in training mode (as MoCo, BYOL and DINO do).
        dtype: of the averages, None for the model's. Averages in float32 of bfloat16 weights move
            where averages in bfloat16 stand still: there 1 - m is below half a unit in the last
            place.

    Attributes:
        model: the one that is followed; another may be set.
        module: the copy, to be called, evaluated or saved. Calling the EMA calls it without
            gradients; `train()` and `eval()` are its own, as in any module.

    Raises:
        ValueError: a momentum out of range; `update` of a model of other tensors than were copied.
        TypeError: not a model or a momentum; weights that are neither float32, bfloat16 nor
            float16 nor integers.

    Memory: the copy; no temporary.

    Notes: one op call for all averages of a device, arithmetic in float32, one rounding. Weights of
    integers are copied. Nothing is exchanged between ranks: averages of equal weights are equal.
    FSDP2: make the EMA first, then shard both modules alike; each rank averages its own shards.
    `state_dict()` is the copy's with "module." before each name; a schedule has no state. A copy
    or pickle of an EMA takes its model along, so that copies of both together belong together; for
    one alone take `module`, or set the copy's `model`.

    Example:
        >>> model = torch.nn.Linear(4, 4)
        >>> teacher = EMA(model, cosine_momentum(0.996, steps=100))
        >>> teacher.update(step=1)

    Paper: Mean teachers, arXiv 1703.01780.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float | Tensor | Callable[[int], float | Tensor] = 0.999,
        *,
        buffers: str = "copy",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"EMA: model must be an nn.Module, got {type(model).__name__}.")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise TypeError("EMA: model must not be wrapped for several ranks. Give its .module.")
        if buffers not in ("copy", "average", "keep"):
            raise ValueError(f"EMA: buffers must be 'copy', 'average' or 'keep', got {buffers!r}.")
        if dtype is not None and dtype not in AVERAGED:
            raise TypeError(f"EMA: dtype must be float32, bfloat16 or float16, got {dtype}.")
        if not callable(momentum):
            _check_momentum("EMA", "momentum", momentum)
        self.momentum, self.buffers_are = momentum, buffers
        self.model = model
        self.module = copy.deepcopy(model).requires_grad_(False).to(dtype)
        for buffer in self.module.buffers():
            if expanded(buffer):  # to be written
                buffer.data = buffer.clone()
        self._pairs()

    def __setattr__(self, name: str, value) -> None:
        if name == "model":  # not registered: it is no part of this module
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, buffers={self.buffers_are!r}"

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, step: int | None = None) -> None:
        """Moves the averages towards the model's weights, after an optimizer's step.

        Args:
            step: t of the schedule, from 0; not needed without one.
        """
        momentum = self.momentum
        if callable(momentum):
            if step is None:
                raise ValueError("EMA.update: momentum is a schedule. Give the step.")
            momentum = momentum(step)
        _check_momentum("EMA.update", "momentum", momentum)
        if not isinstance(momentum, Tensor):
            momentum = torch.tensor(momentum, dtype=torch.float64, device="cpu")
        momentum = momentum.to(torch.promote_types(momentum.dtype, torch.float32)).reshape(())
        averaged, copied = self._pairs()
        for (_, small), (averages, values) in averaged.items():
            if small:
                torch._foreach_lerp_(averages, values, float(1 - momentum))
            else:
                torch.ops.fastssl.ema_(averages, values, 1 - momentum)
        if copied:
            torch._foreach_copy_(*map(list, zip(*copied, strict=True)))

    def _pairs(self) -> tuple[dict[tuple, tuple[list, list]], list[tuple[Tensor, Tensor]]]:
        """Averages and values by device and by whether torch's loop over tensors is faster; pairs
        of what is copied. Looked up at each update: a module's tensors may be replaced."""
        of_copy, of_model = self.module, self.model
        pairs = [(a, v, True) for a, v in _both(of_copy.parameters(), of_model.parameters())]
        if self.buffers_are != "keep":
            average = self.buffers_are == "average"
            pairs += [(a, v, average) for a, v in _both(of_copy.buffers(), of_model.buffers())]
        averaged, copied = {}, []
        for a, v, average in pairs:
            if a.shape != v.shape or a.device != v.device:
                raise ValueError(
                    f"EMA: the copy must have the model's tensors, got {tuple(a.shape)} on "
                    f"{a.device} for {tuple(v.shape)} on {v.device}. Move both together, or make "
                    "a new EMA."
                )
            if not average or not a.is_floating_point():
                copied.append((a, v))
                continue
            if a.dtype not in AVERAGED or v.dtype not in AVERAGED:
                raise TypeError(
                    "EMA: what is averaged must be float32, bfloat16 or float16, got "
                    f"{v.dtype} of shape {tuple(v.shape)}. Convert the model with .float()."
                )
            small = a.device.type == "cpu" and a.dtype == v.dtype == torch.float32
            small = small and a.numel() < SMALL
            averages, values = averaged.setdefault((a.device, small), ([], []))
            averages.append(a)
            values.append(v)
        return averaged, copied


def _both(of_copy, of_model):
    """Each rank's parts, pairwise."""
    of_copy, of_model = [local(x) for x in of_copy], [local(x) for x in of_model]
    if len(of_copy) != len(of_model):
        raise ValueError(
            f"EMA: the copy has {len(of_copy)} tensors and the model {len(of_model)}: the model "
            "has changed. Make a new EMA."
        )
    return zip(of_copy, of_model, strict=True)
