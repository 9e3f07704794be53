"""Paired timing and peak memory of a case against its baseline; one tidy results file a machine.

A case is a function `make(**params) -> (ours, baseline)` of two callables that each do the same
work and return tensors to compare. Peak memory is measured in a fresh process per provider, above
inputs and outputs.
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
    for got, expected in zip(ours(), baseline(), strict=True):
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


def measure(
    benchmark, module: str, params: dict, baseline_name: str, work_flop: float, gemm
) -> None:
    """Time a case inside pytest-benchmark, its baseline interleaved as the set-up of each round."""
    device = params["device"]
    ours, baseline = importlib.import_module(module).make(**params)
    gate(ours, baseline, 2e-4 if params["dtype"] == "float32" else 5e-2)
    gc.collect()
    slow = max(timed(ours, device), timed(baseline, device)) > 0.1
    seconds: dict[str, list[float]] = {"ours": [], "baseline": []}

    def run_ours():
        seconds["ours"].append(timed(ours, device))

    def run_baseline():
        seconds["baseline"].append(timed(baseline, device))

    rounds = ROUNDS_LONG if slow else ROUNDS_SHORT
    benchmark.pedantic(run_ours, setup=run_baseline, rounds=rounds, warmup_rounds=3)
    seconds = {name: values[-rounds:] for name, values in seconds.items()}  # less the warm-up
    bare = statistics.median(timed(gemm, device) for _ in range(rounds))
    ratio = statistics.median(seconds["baseline"]) / statistics.median(seconds["ours"])
    row = {
        "case": params["case"],
        **{name: value for name, value in params.items() if name != "case"},
        "baseline": baseline_name,
        "ours": quantiles(seconds["ours"]),
        "eager": quantiles(seconds["baseline"]),
        "speedup": ratio,
        "rounds": rounds,
        "ours_tflops": work_flop / statistics.median(seconds["ours"]) / 1e12,
        "bare_product_ms": 1e3 * bare,
        "extra_mib": extra_memory(module, params, 0),
        "eager_extra_mib": extra_memory(module, params, 1),
    }
    benchmark.extra_info.update(row)
    rows.append(row)
    ours_ms, eager_ms = row["ours"]["median_ms"], row["eager"]["median_ms"]
    size = " ".join(f"{k}={v}" for k, v in params.items() if k not in ("case", "device"))
    print(
        f"\n{params['case']} {size}: {ours_ms:.3f} ms, {baseline_name} {eager_ms:.3f} ms "
        f"({ratio:.2f} x), extra {row['extra_mib']:.0f} and {row['eager_extra_mib']:.0f} MiB",
        flush=True,
    )


rows: list[dict] = []

# ------------------------------------------------------------------------------------ memory


def extra_memory(module: str, params: dict, provider: int) -> float:
    """MiB of peak memory of one call above inputs and outputs, in a fresh process."""
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


def _peak(job: dict) -> float:
    module, params = importlib.import_module(job["module"]), job["params"]
    # A small call first: libraries, thread pools and their buffers are not this call's memory.
    module.make(**params | {"N": 64})[job["provider"]]()
    call = module.make(**params)[job["provider"]]
    gc.collect()
    if params["device"] == "cuda":
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
    for name in ("torch", "triton", "open_clip_torch", "lightly", "numpy"):
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


def write(name: str) -> Path:
    folder = Path(os.environ.get("OUT") or HERE / "results" / machine())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path


if __name__ == "__main__":
    print(_peak(json.loads(sys.argv[1])))
