"""Time and memory of one case, and what the machine could do at best.

A case's providers do the same work and take turns, so that a machine whose speed drifts drifts for
all of them. Figures are medians; what is compared is the ratio of two providers in the same round.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..ops.product import multiplied

Provider = Callable[[], Iterable[Tensor]]
"""One call of a case; the tensors it returns are compared between providers."""

# Rows and columns of a block of the bare product: what a blockwise kernel would do, in cache.
BLOCKS = {"cpu": ((96, None), (512, None), (256, 2048)), "cuda": ((1024, None), (4096, None))}
EXPONENTIALS = {"cpu": 2**17, "cuda": 2**22}
LEAST_ROUNDS, MOST_ROUNDS = 3, 101
SLOW = 10
"""What takes so many times as long as the fastest has fewer turns than there are rounds."""


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


def keep_memory() -> None:
    """From here on this process keeps what it frees. What the system asks for fresh memory differs
    many times over between processes of one machine; so no provider is measured by it."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc's
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap as well
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: whose end is never given back


def timed(call: Provider, device: str) -> float:
    """Seconds of one call; on a GPU from its launch there on to its end there."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def difference(ours: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """Largest difference of what two providers returned, as a share of the largest value."""
    worst = 0.0
    for got, expected in zip(ours, other, strict=False):  # a peer's scale may be fixed
        error = (got.float() - expected.float()).abs().max()
        worst = max(worst, float(error / expected.float().abs().max().clamp(min=1e-30)))
    return worst


def in_turn(
    providers: dict[str, Provider], device: str, seconds: float
) -> list[dict[str, list[float]]]:
    """Seconds of each call by provider in blocks: of what ran at one time, and may be compared.

    A round is one call of each, in an order that moves on by one, so that none always follows the
    same; as many as fit into `seconds`. Each is a block, unless a provider is `SLOW`: then a block
    is several rounds of the others with one call of the slow ones amid them, as many blocks as fit
    into `seconds` once more.
    """
    names = list(providers)
    gc.collect()
    block = {name: [timed(providers[name], device)] for name in names}
    once = {name: calls[0] for name, calls in block.items()}
    slow = [name for name in names if once[name] > SLOW * min(once.values())]
    fast = [name for name in names if name not in slow]
    rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, seconds / sum(once[n] for n in fast))))
    turns = rounds
    if slow:
        turns = int(min(rounds, max(1, seconds / sum(once[n] for n in slow))))
    blocks, number = [block], 1
    for turn in range(turns):
        if turn:
            blocks.append({name: [] for name in names})
        own = rounds * (turn + 1) // turns - rounds * turn // turns
        for place in range(0 if turn else 1, own):
            due = fast + slow if turn and place == own // 2 else fast
            first = number % len(due)
            for name in due[first:] + due[:first]:
                blocks[-1][name].append(timed(providers[name], device))
            number += 1
    return blocks


def paired(blocks: list[dict[str, list[float]]], other: str) -> list[float]:
    """The time of `other` over ours: in each round, or where one of them has fewer turns than the
    other its median in a block over each of the other's."""
    found = []
    for block in blocks:
        a, b = block[other], block["ours"]
        if len(a) < len(b):
            a = [statistics.median(a)] * len(b)
        elif len(b) < len(a):
            b = [statistics.median(b)] * len(a)
        found += [x / y for x, y in zip(a, b, strict=True)]
    return found


def quantiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else 4 * seconds
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "p20_ms": 1e3 * cuts[0],
        "p80_ms": 1e3 * cuts[3],
    }


def median_and_noise(values: list[float], independent: int) -> tuple[float, float]:
    """The median, and its standard error as a share of it, from the 20 % and 80 % quantiles and the
    number of values that are independent."""
    median, cuts = statistics.median(values), statistics.quantiles(values, n=5)
    deviation = (cuts[3] - cuts[0]) / 1.683  # of a normal distribution
    return median, 1.253 * deviation / independent**0.5 / median


def bare_product(work: Work, dtype: str, device: str, rounds: int = 3) -> float:
    """Seconds of the library's product (rows, width) by (width, keys), in the fastest of a few
    blockings; in float32 where it has none of dtype."""
    x, y = (torch.randn(n, work.width, device=device) for n in (work.rows, work.keys))
    x, y = (z.to(multiplied(z, getattr(torch, dtype))) for z in (x, y))
    best = float("inf")
    for height, width in BLOCKS[device]:
        width = width or work.keys
        out = x.new_empty(height * width)

        def product(height=height, width=width, out=out):
            for i in range(0, work.rows, height):
                for j in range(0, work.keys, width):
                    a, b = x[i : i + height], y[j : j + width]
                    torch.mm(a, b.T, out=out[: len(a) * len(b)].view(len(a), len(b)))

        first = timed(product, device)
        if first < 2 * best:
            again = rounds if first < 0.1 else 1
            best = min(best, statistics.median(timed(product, device) for _ in range(again)))
    return best


def bare_exponential(device: str, rounds: int = 7, calls: int = 8) -> float:
    """Seconds of one exponential of many in float32, whose reads and writes find them in cache."""
    x = torch.rand(EXPONENTIALS[device], device=device)
    out = torch.empty_like(x)

    def exponentials():
        for _ in range(calls):  # so that launches count little
            torch.exp(x, out=out)

    timed(exponentials, device)
    seconds = statistics.median(timed(exponentials, device) for _ in range(rounds))
    return seconds / (calls * len(x))


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
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # what earlier calls left for reuse would hide what this one takes
        reset.write_text("5")  # the peak becomes what is resident now
        before = _resident("VmRSS")
        outputs = call()
        peak = _resident("VmHWM")
    return (peak - before - sum(x.numel() * x.element_size() for x in outputs)) / 2**20
