"""Paired timing and peak memory of a case against its baselines; a results file per bench module.

A module has a function `make(**params)` that gives providers by name: "ours", the baseline, others.
Each is a call that does the same work and returns tensors to compare. Peak memory is that above
inputs and outputs; on a CPU it is measured in a fresh process per provider.
"""

import datetime
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROUNDS_SHORT, ROUNDS_LONG = 41, 7  # long: calls of more than 0.1 s


def timed(call, device: str) -> float:
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


def gate(ours, baseline, tolerance: float) -> None:
    """Both must return the same tensors; a fast wrong answer is no result."""
    for got, expected in zip(ours(), baseline(), strict=False):  # a peer's scale may be fixed
        error = (got.float() - expected.float()).abs().max()
        scale = expected.float().abs().max().clamp(min=1e-30)
        assert error <= tolerance * scale, f"off by {error / scale:.2e} of the largest value"


def quantiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=5)
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "p20_ms": 1e3 * cuts[0],
        "p80_ms": 1e3 * cuts[3],
    }


# Rows and columns of a block of the bare product, and elements of a bare exponential: what a
# blockwise kernel would do, in cache.
BLOCKS = {"cpu": ((96, None), (512, None), (256, 2048)), "cuda": ((1024, None), (4096, None))}
EXPONENTIALS = {"cpu": 2**17, "cuda": 2**22}


def bare_product(rows: int, keys: int, D: int, dtype: str, device: str, rounds: int) -> float:
    """Seconds of the library's product (rows, D) x (D, keys) in the fastest of a few blockings."""
    x, y = (torch.randn(n, D).to(device, getattr(torch, dtype)) for n in (rows, keys))
    best = float("inf")
    for height, width in BLOCKS[device]:
        width = width or keys
        out = x.new_empty(height * width)

        def product(height=height, width=width, out=out):
            for i in range(0, rows, height):
                for j in range(0, keys, width):
                    a, b = x[i : i + height], y[j : j + width]
                    torch.mm(a, b.T, out=out[: len(a) * len(b)].view(len(a), len(b)))

        timed(product, device)
        best = min(best, statistics.median(timed(product, device) for _ in range(rounds)))
    return best


def bare_exponential(device: str, rounds: int) -> float:
    """Seconds of one exponential of many in fp32."""
    x = torch.rand(EXPONENTIALS[device], device=device)
    out = torch.empty_like(x)
    timed(lambda: torch.exp(x, out=out), device)
    return statistics.median(
        timed(lambda: torch.exp(x, out=out), device) for _ in range(rounds)
    ) / len(x)


def bare_copy(device: str, rounds: int) -> float:
    """Seconds of a byte read or written by a copy too large for caches."""
    x = torch.rand(2**26, device=device)
    out = torch.empty_like(x)
    timed(lambda: out.copy_(x), device)
    seconds = statistics.median(timed(lambda: out.copy_(x), device) for _ in range(rounds))
    return seconds / (2 * x.nbytes)


def measure(
    benchmark,
    module: str,
    params: dict,
    shape: tuple[int, int],
    products: float,
    exponentials: float,
    traffic: float = 0,
) -> None:
    """Time a case inside pytest-benchmark, the others interleaved as the set-up of each round.

    shape (rows, keys), products of it and exponentials of each pair, or else bytes of traffic, are
    what the algorithm cannot do without. In fp32 these, timed bare, are the machine's own limit.
    """
    device, dtype = params["device"], params["dtype"]
    providers = importlib.import_module(module).make(**params)
    ours, baseline, *others = providers
    gate(providers[ours], providers[baseline], 2e-4 if dtype == "float32" else 5e-2)
    for name in others:  # in what precision they please
        gate(providers[ours], providers[name], 5e-2)
    gc.collect()
    slow = max(timed(providers[name], device) for name in (ours, baseline)) > 0.1
    seconds: dict[str, list[float]] = {name: [] for name in providers}

    def run(*names):
        for name in names:
            seconds[name].append(timed(providers[name], device))

    rounds = ROUNDS_LONG if slow else ROUNDS_SHORT
    benchmark.pedantic(
        lambda: run(ours), setup=lambda: run(baseline, *others), rounds=rounds, warmup_rounds=3
    )
    medians = {
        name: statistics.median(values[-rounds:])  # less the warm-up
        for name, values in seconds.items()
    }
    product = 0.0
    if products:
        product = bare_product(*shape, params["D"], dtype, device, min(rounds, 7))
    pairs = shape[0] * shape[1]
    row = {
        **params,
        "baseline": baseline,
        "ours": quantiles(seconds[ours][-rounds:]),
        "eager": quantiles(seconds[baseline][-rounds:]),
        "others": {name: quantiles(seconds[name][-rounds:]) for name in others},
        "speedup": medians[baseline] / medians[ours],
        "rounds": rounds,
    }
    if products:
        row["ours_tflops"] = products * 2 * pairs * params["D"] / medians[ours] / 1e12
        row["bare_product_ms"] = 1e3 * product
        rate = f"{row['ours_tflops']:.2f} TFLOP/s"
    elif traffic:
        row["ours_gb_s"] = traffic / medians[ours] / 1e9
        rate = f"{row['ours_gb_s']:.2f} GB/s"
    else:
        row["ours_gexp_s"] = exponentials * pairs / medians[ours] / 1e9
        rate = f"{row['ours_gexp_s']:.2f} exponentials a ns"
    if dtype == "float32":
        if traffic:
            limit = traffic * bare_copy(device, min(rounds, 7))
        else:
            limit = products * product + exponentials * pairs * bare_exponential(device, rounds)
        row |= {"limit_ms": 1e3 * limit, "share": medians[ours] / limit}
    memory = "not measured"
    if 4 * pairs >= 2**20:  # below, the logits that others store are no memory to speak of
        for field, name in (("extra_mib", ours), ("eager_extra_mib", baseline)):
            row[field] = extra_memory(module, params, name, providers[name])
        memory = f"{row['extra_mib']:.0f} and {row['eager_extra_mib']:.0f} MiB"
    benchmark.extra_info.update(row)
    results.setdefault(module, []).append(row)
    size = " ".join(f"{k}={v}" for k, v in params.items() if k not in ("case", "device"))
    times = [f"{name} {1e3 * median:.3f} ms" for name, median in medians.items()]
    share = f", {row['share']:.2f} of the limit" if "share" in row else ""
    print(
        f"\n{params['case']} {size}: {', '.join(times)} ({row['speedup']:.2f} x), {rate}{share}, "
        f"extra {memory}",
        flush=True,
    )


results: dict[str, list[dict]] = {}  # rows by module

# ------------------------------------------------------------------------------------ memory


def extra_memory(module: str, params: dict, provider: str, call) -> float:
    """MiB of peak memory of one call above inputs and outputs."""
    if params["device"] == "cuda":
        return peak(call, "cuda")
    job = json.dumps({"module": module, "params": params, "provider": provider})
    out = subprocess.run(
        [sys.executable, str(HERE / "harness.py"), job],
        capture_output=True, text=True, cwd=HERE,
    )  # fmt: skip
    if out.returncode:
        raise RuntimeError(f"memory run failed:\n{out.stderr[-2000:]}")
    return float(out.stdout.split()[-1])


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak(call, device: str) -> float:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = call()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
        before = _resident("VmRSS")
        outputs = call()
        peak = _resident("VmHWM")
    return (peak - before - sum(x.numel() * x.element_size() for x in outputs)) / 2**20


def _peak_alone(module: str, params: dict, provider: str) -> float:
    make = importlib.import_module(module).make
    # A small call first: libraries, thread pools and their buffers are not this call's memory.
    make(**params | {"N": 64, "M": 64})[provider]()
    return peak(make(**params)[provider], params["device"])


# ----------------------------------------------------------------------------------- results


def machine() -> str:
    """Folder name of this machine's results: the GPU's name (h200), or the CPU and its cores."""
    if torch.cuda.is_available():
        words = torch.cuda.get_device_name().lower().split()
        return "-".join(word for word in words if word not in ("nvidia", "amd", "gpu"))
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2]
            break
    words = [w for w in model.replace("(R)", "").split() if w[0].isalnum() and w != "CPU"]
    return "-".join([*words[:3], f"{os.cpu_count()}cores"]).lower()


def environment() -> dict:
    versions = {}
    for name in (
        "torch",
        "triton",
        "open_clip_torch",
        "lightly",
        "pytorch-metric-learning",
        "bitsandbytes",
        "torchvision",
        "kornia",
        "numpy",
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    from fastssl import extension

    return {
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
        ).stdout.strip(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else machine(),
        "cpu_features": extension.cpu_features(),
        "cpu_products": extension.cpu_products()[1],
        **versions,
    }


def write(name: str, rows: list[dict]) -> Path:
    folder = Path(os.environ.get("OUT") or HERE / "results" / machine())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path


if __name__ == "__main__":
    print(_peak_alone(**json.loads(sys.argv[1])))
