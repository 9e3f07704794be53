"""Losses of a batch spread over processes: forward and backward against open_clip's and lightly's.

    python benchmarks/bench_sharded.py

Each case has its own processes under gloo, one thread each, on this machine's CPU; N rows (of each
view) in all. A step takes the slowest rank's time, from a barrier on. Memory is rank 0's. Writes
results/<machine>/sharded.json.
"""

from statistics import median

import harness

from fastssl.bench.measure import quantiles
from fastssl.bench.sharded import PEERS, on_ranks, seconds

WORLDS, DTYPES = (1, 2, 4), ("float32", "bfloat16")
CASES = [  # case, N, D, dtype, ranks
    *[("clip", 8192, 256, dtype, W) for dtype in DTYPES for W in WORLDS],
    *[("nt_xent", 4096, 256, dtype, W) for dtype in DTYPES for W in WORLDS],
    ("nt_xent", 8192, 256, "float32", 2),
    *[(case, 512, 256, "float32", W) for case in PEERS for W in WORLDS],
]


def measure(case: str, N: int, D: int, dtype: str, world: int) -> dict:
    params = {"case": case, "N": N, "D": D, "dtype": dtype, "world": world}
    ours, peer = ["gather", "ring"] if world > 1 else ["gather"], PEERS[case]
    steps = seconds(**params, ours=ours, peer=peer)
    row = params | {
        "threads_per_rank": 1,
        "baseline": peer,
        "rounds": len(steps[peer]),
        "times": {name: quantiles(each) for name, each in steps.items()},
        "speedup": {name: median(steps[peer]) / median(steps[name]) for name in ours},
    }
    if 4 * N * N >= 2**24:  # below, the logits that others store are no memory to speak of
        row["extra_mib"] = {name: on_ranks(params, [name], alone=True)[0] for name in steps}
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
