"""Losses of a batch spread over processes: forward and backward against open_clip's and lightly's.

    python benchmarks/bench_sharded.py

Each case has its own processes under gloo, one thread each, on this machine's CPU; N rows (of each
view) in all. A step takes the slowest rank's time, from a barrier on. Memory is rank 0's. Writes
results/<machine>/sharded.json.
"""

import gc
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

import harness
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from fastssl.bench.measure import peak_mib, quantiles, timed
from fastssl.ops import info_nce

PEERS = {"clip": "open_clip ClipLoss", "nt_xent": "lightly NTXentLoss"}
ROUNDS_SHORT, ROUNDS_LONG = 41, 7  # long: calls of more than 0.1 s
WORLDS, DTYPES = (1, 2, 4), ("float32", "bfloat16")
CASES = [  # case, N, D, dtype, ranks
    *[("clip", 8192, 256, dtype, W) for dtype in DTYPES for W in WORLDS],
    *[("nt_xent", 4096, 256, dtype, W) for dtype in DTYPES for W in WORLDS],
    ("nt_xent", 8192, 256, "float32", 2),
    *[(case, 512, 256, "float32", W) for case in PEERS for W in WORLDS],
]


def make(case: str, N: int, D: int, dtype: str, world: int, rank: int, names: list[str]) -> dict:
    """Providers by name, each for the loss and gradients of this rank's rows."""
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
            from open_clip.loss import ClipLoss

            return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        from lightly.loss import NTXentLoss

        return NTXentLoss(0.2, gather_distributed=True)

    def run(loss):
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs)

    losses = {name: peer() if name == PEERS[case] else ours(name) for name in names}
    return {name: lambda loss=loss: run(loss) for name, loss in losses.items()}


def averaged(call) -> list[torch.Tensor]:
    """What a rank's call gives, values and the scale's gradients averaged over ranks, as a mean of
    losses and DDP do. Gradients of features stay: DDP averages what they lead to, alike for all."""
    outputs = [x.float() for x in call()]
    for x in outputs:
        if x.dim() == 0:
            dist.all_reduce(x)
            x /= dist.get_world_size()
    return outputs


def times(providers: dict, ours: list[str], peer: str, dtype: str) -> dict[str, list[float]]:
    """Seconds of this rank for each round."""
    for name in ours:
        harness.gate(
            lambda name=name: averaged(providers[name]),
            lambda: averaged(providers[peer]),
            2e-4 if dtype == "float32" else 5e-2,
        )
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


def _rank(rank: int, store: str, params: dict, ours: list[str], peer: str, alone: str | None):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # open_clip's collectives are deprecated
    world = params["world"]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        if alone is None:
            providers = make(**params, rank=rank, names=[*ours, peer])
            return times(providers, ours, peer, params["dtype"])
        # A small call first: libraries, connections and their buffers are not this call's memory.
        make(**params | {"N": 16 * world}, rank=rank, names=[alone])[alone]()
        return peak_mib(make(**params, rank=rank, names=[alone])[alone], "cpu")
    finally:
        dist.destroy_process_group()


def on_ranks(params: dict, ours: list[str], peer: str, alone: str | None = None) -> list:
    """What each of fresh ranks returns: times of all, or peak memory of the one named `alone`."""
    world = params["world"]
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(world, mp_context=get_context("spawn")) as pool:
            jobs = [
                pool.submit(_rank, rank, f"{folder}/store", params, ours, peer, alone)
                for rank in range(world)
            ]
        return [job.result() for job in jobs]


def measure(case: str, N: int, D: int, dtype: str, world: int) -> dict:
    params = {"case": case, "N": N, "D": D, "dtype": dtype, "world": world}
    ours, peer = ["gather", "ring"] if world > 1 else ["gather"], PEERS[case]
    ranks = on_ranks(params, ours, peer)
    steps = {
        name: [max(each) for each in zip(*(seconds[name] for seconds in ranks), strict=True)]
        for name in (*ours, peer)
    }
    row = params | {
        "threads_per_rank": 1,
        "baseline": peer,
        "rounds": len(steps[peer]),
        "times": {name: quantiles(seconds) for name, seconds in steps.items()},
        "speedup": {name: median(steps[peer]) / median(steps[name]) for name in ours},
    }
    if 4 * N * N >= 2**24:  # below, the logits that others store are no memory to speak of
        names = [*ours, peer]
        row["extra_mib"] = {name: on_ranks(params, ours, peer, alone=name)[0] for name in names}
    return row


def main() -> None:
    rows = []
    for case, N, D, dtype, world in CASES:
        rows.append(row := measure(case, N, D, dtype, world))
        memory = row.get("extra_mib", {})
        each = [
            f"{name} {t['median_ms']:.2f} ms"
            + (f" ({row['speedup'][name]:.2f} x)" if name in row["speedup"] else "")
            + (f" {memory[name]:.0f} MiB" if memory else "")
            for name, t in row["times"].items()
        ]
        print(f"{case} N={N} D={D} {dtype}, {world} ranks: {', '.join(each)}", flush=True)
    print(harness.write("sharded", rows))


if __name__ == "__main__":
    main()
