"""What training keeps in memory beside activations."""

from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from .blockwise import Blockwise
from .states import local


class MemoryReport(NamedTuple):
    """Bytes. `str()` gives a table in MiB."""

    parameters: int
    gradients: int
    states: int
    states_32bit: int
    """What the same states take in fp32: the states before, if the optimizer keeps 8 bits."""

    def __str__(self) -> str:
        rows = [("", "32-bit states", "these states")]
        for name in ("parameters", "gradients"):
            rows.append((name, *[f"{getattr(self, name) / 2**20:.1f} MiB"] * 2))
        rows.append(("states", *(f"{x / 2**20:.1f} MiB" for x in (self.states_32bit, self.states))))
        rest = self.parameters + self.gradients
        totals = (rest + self.states_32bit, rest + self.states)
        rows.append(("together", *(f"{x / 2**20:.1f} MiB" for x in totals)))
        return "\n".join(f"{a:10} {b:>14} {c:>14}" for a, b, c in rows)


def memory_report(model: nn.Module, optimizer: Optimizer) -> MemoryReport:
    """Bytes of a model's parameters and gradients and of an optimizer's states, on this rank.

    Args:
        model: any module. Parameters that require no gradient count as parameters alone; gradients
            count whether they exist at the moment or not.
        optimizer: one of this package's, whose states are counted before the first step too, or
            any other, whose states are those it has now.

    Returns:
        MemoryReport(parameters, gradients, states, states_32bit).

    Example:
        >>> import fastssl
        >>> model = torch.nn.Linear(256, 256)
        >>> memory_report(model, fastssl.optim.AdamW8bit(model.parameters()))
        MemoryReport(parameters=263168, gradients=263168, states=135168, states_32bit=526336)
    """
    parts = [(local(p), p.requires_grad) for p in model.parameters()]
    parameters = sum(p.nbytes for p, _ in parts)
    gradients = sum(p.nbytes for p, trained in parts if trained)
    if not isinstance(optimizer, Blockwise):
        of_each = (tree_leaves(state) for state in optimizer.state.values())
        tensors = [local(x) for state in of_each for x in state if getattr(x, "dim", int)()]
        return MemoryReport(
            parameters,
            gradients,
            sum(x.nbytes for x in tensors),
            sum(4 * x.numel() for x in tensors),
        )
    now = whole = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            n, present = local(p).numel(), optimizer.has_states(group)
            count = sum(len(optimizer.moments_of(k)) for k in (0, 1) if present[k])
            whole += 4 * n * count
            small = optimizer.bits_of(group, p) == 8
            now += count * (n + 4 * -(-n // group["block_size"]) if small else 4 * n)
    return MemoryReport(parameters, gradients, now, whole)
