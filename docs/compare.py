"""Brings docs/compare.md and its plots up to date with benchmarks/results/*/compare.json.

fastssl compare simclr moco_v2 byol swav dino vicreg barlow lejepa mae --seeds 0,1,2
cp runs/compare/compare.json benchmarks/results/MACHINE/
python docs/compare.py
"""

import json
from pathlib import Path

from fastssl.compare import plot, table

DOCS = Path(__file__).parent
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def files() -> dict[Path, str]:
    """The page and its plots as they should be."""
    page = DOCS / "compare.md"
    head, rest = page.read_text().split(BEGIN)
    found, parts = {}, [head + BEGIN]
    for results in sorted(DOCS.parent.glob("benchmarks/results/*/compare.json")):
        measured, machine = json.loads(results.read_text()), results.parent.name
        picture = DOCS / f"compare-{machine}.svg"
        found[picture] = plot(measured)
        parts += [f"On {machine}:", table(measured), f"![the same as a plot]({picture.name})"]
    return {page: "\n\n".join(parts) + "\n" + END + rest.partition(END)[2], **found}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
