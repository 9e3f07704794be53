"""What the benchmark scripts share beside `fastssl.bench`."""

import json
import os
from pathlib import Path

from fastssl.bench.measure import difference
from fastssl.bench.results import environment, machine

HERE = Path(__file__).parent


def gate(ours, baseline, tolerance: float) -> None:
    """Both must return the same tensors; a fast wrong answer is no result."""
    off = difference(ours, baseline)
    assert off <= tolerance, f"off by {off:.2e} of the largest value"


def write(name: str, rows: list[dict]) -> Path:
    """A results file of this machine."""
    folder = Path(os.environ.get("OUT") or HERE / "results" / machine())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path
