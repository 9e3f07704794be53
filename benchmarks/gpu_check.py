"""Build, GPU tests and GPU benchmarks with the active Python, in under 9 minutes.

Each part runs in a process of its own with a time limit; what fails is reported and the rest goes
on. gpu-check.json, bench/ and bench_step/ go into $OUT if set, else into benchmarks/results/<gpu>/.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", ".."]
TEST = ["-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", "-rf"]


def names(pattern: str, word: str = "") -> list[str]:
    """Files of the pattern that contain the word."""
    return sorted(path.name for path in ROOT.glob(pattern) if word in path.read_text())


# Without compiled baselines, which take longer than all the rest: `fastssl bench --baselines
# compiled` measures these. Whole steps apart, since they would leave the kernels no time.
BENCH = ["-m", "fastssl.cli", "bench", "--device", "cuda", "--short", "--same-process"]
BENCH += ["--seconds", "0.3", "--baselines", "eager,published,torch,open_clip,lightly"]
BENCH[-1] += ",pytorch-metric-learning,inf_cl,memeff,bitsandbytes,torchao,apex,kornia,torchvision"
KERNELS = [*BENCH, *"losses sinkhorn sigreg optim augment --minutes 2.5 --out".split()]
STEPS = [*BENCH, *"step --case simclr,dino --repeats 1 --minutes 1 --out".split()]

# Run from tests/ and benchmarks/, never the root, where the checkout would shadow the installation.
PARTS = [  # name, folder, command, limit in seconds
    ("build", "tests", BUILD, 120),
    ("kernel tests", "tests", [*TEST, *names("tests/test_*_triton.py")], 130),
    ("op tests", "tests", [*TEST, "-m", "gpu", *names("tests/test_*.py", "mark.gpu")], 130),
    ("benchmarks", "benchmarks", KERNELS, 190),
    ("steps", "benchmarks", STEPS, 110),
]
TOTAL_S = 530


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device. Run `make test` for what needs none.")
        return 2
    words = torch.cuda.get_device_name().lower().split()  # as fastssl.bench.results.machine
    name = "-".join(word for word in words if word not in ("nvidia", "amd", "gpu"))
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks/results" / name)
    folder.mkdir(parents=True, exist_ok=True)
    started, report = time.time(), {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    for name, place, command, limit in PARTS:
        if command[-1] == "--out":
            command = [*command, str(folder / ("bench" if command is KERNELS else "bench_step"))]
        limit = min(limit, TOTAL_S - (time.time() - started))
        print(f"--- {name} (at most {limit:.0f} s)", flush=True)
        begun, lines = time.time(), []
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT / place, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        timer = threading.Timer(max(limit, 1), os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        code = process.wait()
        timer.cancel()
        summary = next((line for line in reversed(lines) if re.search(r"\d+ passed", line)), "")
        report[name] = {
            "exit_code": code,
            "seconds": round(time.time() - begun, 1),
            "summary": summary,
            "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
            "tail": [] if code == 0 else lines[-40:],
        }
        path = folder / "gpu-check.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    failed = [name for name, *_ in PARTS if report[name]["exit_code"]]
    print(f"gpu-check: {path}; {'failed: ' + ', '.join(failed) if failed else 'all parts passed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
