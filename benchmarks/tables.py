"""Rewrites README's and docs/benchmarks.md's tables from the committed results files.

python benchmarks/tables.py
"""

import json
from pathlib import Path

from fastssl.bench.results import compact, markdown, provenance

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PAGES = {"README.md": "front_page", "docs/benchmarks.md": "whole_page"}
NO_GPU = "Figures of GPUs are still to come."
SHARDED = """One batch over several processes under gloo on the same CPU, one thread each; N rows
(of each view) in all. A step takes the slowest rank's time; extra memory is rank 0's. fastssl by
its two exchanges, open_clip with `local_loss` and `gather_with_grad`, lightly with
`gather_distributed`."""


def results(name: str) -> dict[str, dict]:
    """Results files of that name by machine; GPUs first."""
    paths = sorted(ROOT.glob(f"benchmarks/results/*/{name}"), key=lambda p: "cores" in p.parts[-2])
    return {path.relative_to(ROOT / "benchmarks/results").parts[0]: json.loads(path.read_text())
            for path in paths}  # fmt: skip


def front_page() -> str:
    """A case and dtype a row, at its largest size, and whatever is slower than a baseline: of every
    GPU, and of the CPU with the widest instructions."""
    found = list(results("bench/results.json").values())
    gpus = [result for result in found if "cuda" in result["rows"][0]["device"]]
    cpus = [result for result in found if result not in gpus]
    widest = max(cpus, key=lambda result: len(result["environment"]["cpu_features"]))
    parts = [compact(result) for result in [*gpus, widest]]
    return "\n\n".join(parts if gpus else [*parts, NO_GPU])


def whole_page() -> str:
    parts = []
    for folder in ("bench", "bench_optim", "bench_step", "bench_scaling"):
        for machine, result in results(f"{folder}/results.json").items():
            parts.append(f"## {machine}: `{result['command']}`\n\n{markdown(result)}".rstrip())
    for machine, result in results("sharded.json").items():
        parts.append(f"## {machine}: sharded losses\n\n{SHARDED}\n\n{sharded_table(result)}")
    return "\n\n".join(parts)


def sharded_table(result: dict) -> str:
    env = result["environment"]
    versions = env.get("versions") or {
        "torch": env["torch"], "open_clip": env["open_clip_torch"], "lightly": env["lightly"]
    }  # fmt: skip
    lines = [
        provenance(env | {"versions": versions, "threads": "1 a rank,"}),
        "",
        "| loss | ranks | N x D | dtype | exchange | fastssl | baseline | speed-up | extra memory "
        "| baseline's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        peer = row["baseline"]
        for exchange, speedup in row["speedup"].items():
            memory = [
                f"{max(row['extra_mib'][name], 0):.0f} MiB" if "extra_mib" in row else ""
                for name in (exchange, peer)
            ]
            lines.append(
                f"| {row['case']} | {row['world']} | {row['N']} x {row['D']} "
                f"| {row['dtype']} | {exchange if row['world'] > 1 else ''} "
                f"| {row['times'][exchange]['median_ms']:.2f} ms "
                f"| {peer} {row['times'][peer]['median_ms']:.2f} ms | {speedup:.2f} x "
                f"| {memory[0]} | {memory[1]} |"
            )
    return "\n".join(lines)


def page(name: str) -> str:
    """The page's text with the tables of the results files in it."""
    head, rest = (ROOT / name).read_text().split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{globals()[PAGES[name]]()}\n{END}{tail}"


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(page(name))
