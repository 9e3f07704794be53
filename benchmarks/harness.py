"""What the benchmark scripts share beside `fastssl.bench`."""

import json
import os
from pathlib import Path

from fastssl.bench.results import environment, machine

HERE = Path(__file__).parent


def write(name: str, rows: list[dict]) -> Path:
    """A results file of this machine."""
    folder = Path(os.environ.get("OUT") or HERE / "results" / machine())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return path
