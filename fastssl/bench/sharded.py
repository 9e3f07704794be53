"""Losses of a batch spread over W processes under gloo on this machine's CPU, one thread each.

A step takes the slowest rank's time, from a barrier on. N counts the rows (of each view) in all.
"""

import gc
import os
import statistics
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from ..ops import info_nce
from .baselines import library
from .measure import difference, peak_mib, timed

PEERS = {"clip": "open_clip ClipLoss", "nt_xent": "lightly NTXentLoss"}
ROUNDS_SHORT, ROUNDS_LONG = 41, 7  # long: calls of more than 0.1 s
SCALING = "clip", {"N": 4096, "D": 256}, -1.0
"""Case, sizes and expected exponent of the curve against W."""


def make(case: str, N: int, D: int, dtype: str, world: int, rank: int, names: list[str]) -> dict:
    """Providers by name, each for the loss and gradients of this rank's rows: a peer, or ours by
    the exchange it is named after."""
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(2, N // world, D, generator=generator)
    b = a + 2 * b  # views that resemble each other: of strangers the scale's gradient cancels
    a, b = (x.to(getattr(torch, dtype)) for x in (a, b))
    if case == "clip":
        inputs = [normalize(a), normalize(b), torch.tensor(14.3)]
    else:
        inputs = [a, b]
    inputs = [x.requires_grad_() for x in inputs]

    def ours(exchange):
        if case == "clip":
            return lambda image, text, scale: info_nce(
                image, text, logit_scale=scale, symmetric=True, exchange=exchange
            )
        other_view = torch.arange(2 * len(a)).roll(len(a))
        return lambda a, b: info_nce(
            torch.cat([a, b]), target=other_view, temperature=0.2, normalize=True,
            exchange=exchange,
        )  # fmt: skip

    def peer():
        if case == "clip":
            loss = library("open_clip.loss").ClipLoss
            return loss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        return library("lightly.loss").NTXentLoss(0.2, gather_distributed=True)

    def run(loss):
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs)

    losses = {name: peer() if name == PEERS[case] else ours(name) for name in names}
    return {name: lambda loss=loss: run(loss) for name, loss in losses.items()}


def seconds(
    case: str, N: int, D: int, dtype: str, world: int, ours: list[str], peer: str | None = None
) -> dict[str, list[float]]:
    """Of each round by provider, the slowest rank's."""
    params = {"case": case, "N": N, "D": D, "dtype": dtype, "world": world}
    ranks = on_ranks(params, [*ours, *([peer] if peer else [])])
    return {
        name: [max(each) for each in zip(*(rank[name] for rank in ranks), strict=True)]
        for name in ranks[0]
    }


def worlds() -> list[int]:
    """Numbers of ranks on the curve: up to one a core."""
    return [W for W in (1, 2, 4, 8, 16) if W <= (os.cpu_count() or 1)]


def median_ms(world: int) -> float:
    """Of the curve's case on so many ranks."""
    case, sizes, _ = SCALING
    found = seconds(case, **sizes, dtype="float32", world=world, ours=["gather"])
    return 1e3 * statistics.median(found["gather"])


def on_ranks(params: dict, names: list[str], alone: bool = False) -> list:
    """What each of fresh ranks returns: seconds of the calls of all names, or the peak memory of
    the one that is `alone`. The last name is the peer, where one of them is."""
    world = params["world"]
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(world, mp_context=get_context("spawn")) as pool:
            jobs = [
                pool.submit(_rank, rank, f"{folder}/store", params, names, alone)
                for rank in range(world)
            ]
        return [job.result() for job in jobs]


def _rank(rank: int, store: str, params: dict, names: list[str], alone: bool):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # open_clip's collectives are deprecated
    world = params["world"]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        if not alone:
            return _times(make(**params, rank=rank, names=names), params["dtype"])
        # A small call first: libraries, connections and their buffers are not this call's memory.
        make(**params | {"N": 16 * world}, rank=rank, names=names)[names[0]]()
        return peak_mib(make(**params, rank=rank, names=names)[names[0]], "cpu")
    finally:
        dist.destroy_process_group()


def _times(providers: dict, dtype: str) -> dict[str, list[float]]:
    """Seconds of this rank for each round."""
    *others, expected = (_averaged(call) for call in providers.values())
    for got in others:
        off, allowed = difference(got, expected), 2e-4 if dtype == "float32" else 5e-2
        assert off <= allowed, f"off by {off:.2e} of the largest value"
    del others, expected
    gc.collect()
    longest = torch.tensor(max(timed(call, "cpu") for call in providers.values()))
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    rounds = ROUNDS_LONG if longest > 0.1 else ROUNDS_SHORT
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, call in providers.items():
            dist.barrier()
            seconds[name].append(timed(call, "cpu"))
    return seconds


def _averaged(call) -> list[torch.Tensor]:
    """What a rank's call gives, values and the scale's gradients averaged over ranks, as a mean of
    losses and DDP do. Gradients of features stay: DDP averages what they lead to, alike for all."""
    outputs = [x.float() for x in call()]
    for x in outputs:
        if x.dim() == 0:
            dist.all_reduce(x)
            x /= dist.get_world_size()
    return outputs
