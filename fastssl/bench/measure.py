"""Time and memory of one case, and what the machine could do at best.

A case's providers do the same work and take turns, so that a machine whose speed drifts drifts for
all of them. Figures are medians; what is compared is the ratio of two providers in the same round.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Provider = Callable[[], Iterable[Tensor]]
"""One call of a case; the tensors it returns are compared between providers."""

# Rows and columns of a block of the bare product: what a blockwise kernel would do, in cache.
BLOCKS = {"cpu": ((96, None), (512, None), (256, 2048)), "cuda": ((1024, None), (4096, None))}
EXPONENTIALS = {"cpu": 2**17, "cuda": 2**22}
LEAST_ROUNDS, MOST_ROUNDS = 5, 41


@dataclass(frozen=True)
class Work:
    """What a case cannot do without."""

    rows: int = 0
    keys: int = 0
    width: int = 0
    products: float = 0.0
    """Of (rows, width) by (width, keys)."""
    exponentials: float = 0.0
    """Of each of rows x keys."""
    traffic: float = 0.0
    """Bytes read and written of inputs, outputs and states."""

    @property
    def flop(self) -> float:
        return 2 * self.products * self.rows * self.keys * self.width


def timed(call: Provider, device: str) -> float:
    """Seconds of one call; on a GPU by events, so that launch gaps between calls do not count."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def difference(ours: Provider, other: Provider) -> float:
    """Largest difference of what they return, as a share of the largest value."""
    worst = 0.0
    for got, expected in zip(ours(), other(), strict=False):  # a peer's scale may be fixed
        error = (got.float() - expected.float()).abs().max()
        worst = max(worst, float(error / expected.float().abs().max().clamp(min=1e-30)))
    return worst


def in_turn(providers: dict[str, Provider], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of each call by provider, one call of each a round, for about so long.

    The order moves on by one in every round, so that none always follows the same.
    """
    names = list(providers)
    once = sum(timed(providers[name], device) for name in names)
    once = min(once, sum(timed(providers[name], device) for name in names))
    rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, seconds / max(once, 1e-9))))
    gc.collect()
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(timed(providers[name], device))
    return found


def quantiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=5)
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "p20_ms": 1e3 * cuts[0],
        "p80_ms": 1e3 * cuts[3],
    }


def median_and_noise(values: list[float]) -> tuple[float, float]:
    """The median, and its standard error as a share of it, from the 20 % and 80 % quantiles."""
    median, cuts = statistics.median(values), statistics.quantiles(values, n=5)
    deviation = (cuts[3] - cuts[0]) / 1.683  # of a normal distribution
    return median, 1.253 * deviation / len(values) ** 0.5 / median


def bare_product(work: Work, dtype: str, device: str, rounds: int = 3) -> float:
    """Seconds of the library's product (rows, width) by (width, keys), in the fastest of a few
    blockings."""
    x, y = (
        torch.randn(n, work.width).to(device, getattr(torch, dtype)) for n in (work.rows, work.keys)
    )
    best = float("inf")
    for height, width in BLOCKS[device]:
        width = width or work.keys
        out = x.new_empty(height * width)

        def product(height=height, width=width, out=out):
            for i in range(0, work.rows, height):
                for j in range(0, work.keys, width):
                    a, b = x[i : i + height], y[j : j + width]
                    torch.mm(a, b.T, out=out[: len(a) * len(b)].view(len(a), len(b)))

        timed(product, device)
        best = min(best, statistics.median(timed(product, device) for _ in range(rounds)))
    return best


def bare_exponential(device: str, rounds: int = 7) -> float:
    """Seconds of one exponential of many in float32."""
    x = torch.rand(EXPONENTIALS[device], device=device)
    out = torch.empty_like(x)
    timed(lambda: torch.exp(x, out=out), device)
    return statistics.median(
        timed(lambda: torch.exp(x, out=out), device) for _ in range(rounds)
    ) / len(x)


def bare_copy(device: str, rounds: int = 5) -> float:
    """Seconds of a byte read or written by a copy too large for caches."""
    x = torch.ones(2**26, device=device)
    out = torch.zeros_like(x)
    timed(lambda: out.copy_(x), device)
    seconds = statistics.median(timed(lambda: out.copy_(x), device) for _ in range(rounds))
    return seconds / (2 * x.nbytes)


def limits(work: Work, dtype: str, device: str) -> dict[str, float]:
    """The machine's own rates for this work, and the seconds it would need for it bare."""
    found, needed = {}, 0.0
    if work.products:
        seconds = bare_product(work, dtype, device)
        found["product_tflops"] = 2 * work.rows * work.keys * work.width / seconds / 1e12
        needed += work.products * seconds
    if work.exponentials:
        each = bare_exponential(device)
        found["exponentials_per_ns"] = 1e-9 / each
        needed += work.exponentials * work.rows * work.keys * each
    if work.traffic and not needed:  # what computes much finds its few bytes in cache
        each = bare_copy(device)
        found["copy_gb_s"] = 1e-9 / each
        needed = work.traffic * each
    return {**found, "limit_ms": 1e3 * needed}


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_mib(call: Provider, device: str) -> float | None:
    """MiB of peak memory of one call above inputs and outputs; None where nothing tells."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = call()
        peak = torch.cuda.max_memory_allocated()
    else:
        reset = Path("/proc/self/clear_refs")
        if not reset.exists():
            return None
        reset.write_text("5")  # the peak becomes what is resident now
        before = _resident("VmRSS")
        outputs = call()
        peak = _resident("VmHWM")
    return (peak - before - sum(x.numel() * x.element_size() for x in outputs)) / 2**20
