"""Build, GPU tests and GPU benchmarks with the active Python, in under 9 minutes.

    python benchmarks/gpu_check.py [PART ...]   parts: kernel-tests op-tests benchmarks steps

The parts share the time: all of them get a selection done, one by itself takes the whole. So with
half an hour in calls of ten minutes: the two of tests first, then each of the others alone.

Each part runs in a process of its own with a time limit; what fails or is late is reported and the
rest goes on, but for the build. gpu-check.json, bench/ and bench_step/ go into $OUT if set, else
into benchmarks/results/<gpu>/. Calls add up to one gpu-check.json, also where $OUT is empty each
time: build/gpu-check/ has a copy, with which the next call begins.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
GATHERED = ROOT / "build/gpu-check"
BUILD = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", ".."]
TEST = ["-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", "-rf"]


def names(pattern: str, word: str = "") -> list[str]:
    """Files of the pattern that contain the word."""
    return sorted(path.name for path in ROOT.glob(pattern) if word in path.read_text())


# Without compiled baselines, which take longer than all the rest: `fastssl bench --baselines
# compiled` measures these. Whole steps apart, since they would leave the kernels no time.
BENCH = ["-m", "fastssl.cli", "bench", "--device", "cuda", "--same-process"]
BENCH += ["--seconds", "0.3", "--baselines", "eager,published,torch,open_clip,lightly"]
BENCH[-1] += ",pytorch-metric-learning,inf_cl,memeff,bitsandbytes,torchao,apex,kornia,torchvision"
KERNELS = [*BENCH, *"losses sinkhorn sigreg optim augment --short".split()]
STEPS = [*BENCH, *"step --case simclr,dino --repeats 1".split()]

# Run from tests/ and benchmarks/, never the root, where the checkout would shadow the installation.
PARTS = {  # folder, command, share of the time, folder for what it measures
    "kernel-tests": ("tests", [*TEST, *names("tests/test_*_triton.py")], 13, None),
    "op-tests": (
        "tests", [*TEST, "-m", "gpu", *names("tests/test_*.py", "mark.gpu")], 13, None,
    ),
    "benchmarks": ("benchmarks", KERNELS, 19, "bench"),
    "steps": ("benchmarks", STEPS, 11, "bench_step"),
}  # fmt: skip
TOTAL_S, BUILD_S = 530, 180
LAST_S = 45
"""Of a benchmark's limit, for the run under way when its minutes are over, and for pictures."""
GRACE_S = 10
"""What is late is interrupted first, so that pytest and `fastssl bench` tell of what was done."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.py")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none: all")
    chosen = list(dict.fromkeys(parser.parse_args(argv).parts or PARTS))
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"part must be one of {', '.join(PARTS)}, got {unknown[0]!r}")
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device. Run `make test` for what needs none.")
        return 2
    words = torch.cuda.get_device_name().lower().split()  # as fastssl.bench.results.machine
    name = "-".join(word for word in words if word not in ("nvidia", "amd", "gpu"))
    out, gathered = os.environ.get("OUT"), GATHERED / name
    folder = Path(out or ROOT / "benchmarks/results" / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if out and gathered.exists():
        shutil.copytree(gathered, folder, dirs_exist_ok=True)
    path = folder / "gpu-check.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    started, left = time.time(), list(chosen)
    for part in ("build", *chosen):
        remaining = TOTAL_S - (time.time() - started)
        if part == "build":
            place, command, limit = "tests", BUILD, min(BUILD_S, remaining)
        else:
            place, command, share, measured = PARTS[part]
            limit = remaining * share / sum(PARTS[other][2] for other in left)
            left.remove(part)
            if measured:
                minutes = max(limit - LAST_S, limit / 2) / 60
                command = [*command, "--minutes", f"{minutes:.2f}", "--out", folder / measured]
        print(f"--- {part} (at most {limit:.0f} s)", flush=True)
        report[part] = run(command, ROOT / place, limit)
        path.write_text(json.dumps(report, indent=1) + "\n")
        if out:
            shutil.copytree(folder, gathered, dirs_exist_ok=True)
        if part == "build" and report[part]["exit_code"]:
            break  # what is installed would be of another time
    failed = [part for part in ("build", *chosen) if report.get(part, {}).get("exit_code", 1)]
    print(f"gpu-check: {path}; {'failed: ' + ', '.join(failed) if failed else 'all parts passed'}")
    return 1 if failed else 0


def run(command: list, place: Path, limit: float) -> dict:
    """What a Python command printed at its end, and how it ended."""
    begun, lines, late = time.time(), [], threading.Event()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=place, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip

    def end(number: int) -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    grace = min(GRACE_S, limit / 2)
    timers = [
        threading.Timer(max(after, 0), end, [number])
        for after, number in ((limit - grace, signal.SIGINT), (limit, signal.SIGKILL))
    ]
    for timer in timers:
        timer.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        code, in_time = process.wait(), not late.is_set()
    finally:
        for timer in timers:
            timer.cancel()
        end(signal.SIGKILL)  # what it has started and left, or all of it if this is interrupted
    summary = next((line for line in reversed(lines) if re.search(r"\d+ passed", line)), "")
    return {
        "exit_code": code,
        "late": not in_time,
        "seconds": round(time.time() - begun, 1),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "summary": summary,
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "tail": [] if code == 0 else lines[-40:],
    }


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:  # no git
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
