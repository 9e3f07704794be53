"""Seconds until an ImageNet-shaped folder is open: 1000 classes of 1281 files to train on and 50 to
validate on, empty here.

    python benchmarks/bench_listing.py

The first opening lists it, later ones look at the folders' time stamps alone. Every opening is a
process of its own. Writes results/<machine>/listing.json.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

CLASSES, TIMES = 1000, 5
FILES = {"train": 1281, "val": 50}

OPEN = """
import sys, time
from fastssl.data import load
start, start_cpu = time.perf_counter(), time.process_time()
source = load(sys.argv[1], "train", 224)
print(len(source), time.perf_counter() - start, time.process_time() - start_cpu)
"""


def opened(folder: str, cache: str) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    environment = {**os.environ, "TORCH_HOME": cache}
    command = [sys.executable, "-c", OPEN, folder]
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    images, wall, cpu = out.stdout.split()
    assert int(images) == CLASSES * FILES["train"]
    return float(wall), float(cpu)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        for split, count in FILES.items():
            for c in range(CLASSES):
                inner = Path(folder, split, f"n{c:08}")
                inner.mkdir(parents=True)
                for i in range(count):
                    os.close(os.open(inner / f"n{c:08}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))
        time.sleep(3)  # a folder that has just changed is listed again
        rows = []
        for name, count in (("first", 1), ("later", TIMES)):
            times = [opened(folder, cache) for _ in range(count)]
            wall_s, cpu_s = (statistics.median(column) for column in zip(*times, strict=True))
            files = CLASSES * sum(FILES.values())
            rows.append({"opening": name, "files": files, "wall_s": wall_s, "cpu_s": cpu_s})
            print(f"{name:6} {wall_s:.2f} s, {cpu_s:.2f} s of the processor")
    print(harness.write("listing", rows))


if __name__ == "__main__":
    main()
