"""Rewrites the README's table of measured figures from the committed results files."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NAMES = {"clip": "ClipLoss", "nt_xent": "NTXentLoss"}


def table(path: Path) -> str:
    result = json.loads(path.read_text())
    env = result["environment"]
    lines = [
        f"{env['device']}, {env['threads']} threads, {', '.join(env['cpu_features'])}; "
        f"torch {env['torch']}, open_clip {env['open_clip_torch']}, lightly {env['lightly']}; "
        f"{env['date']}, commit {env['commit']}.",
        "",
        "| loss | N x D | dtype | fastssl | baseline | speed-up | extra memory | baseline's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ours, eager = row["ours"]["median_ms"], row["eager"]["median_ms"]
        lines.append(
            f"| {NAMES[row['case']]} | {row['N']} x {row['D']} | {row['dtype']} | {ours:.2f} ms "
            f"| {row['baseline']} {eager:.2f} ms | {row['speedup']:.2f} x "
            f"| {max(row['extra_mib'], 0):.0f} MiB | {max(row['eager_extra_mib'], 0):.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    tables = [table(p) for p in sorted(ROOT.glob("benchmarks/results/*/contrastive.json"))]
    readme.write_text(head + BEGIN + "\n" + "\n\n".join(tables) + "\n" + END + tail)


if __name__ == "__main__":
    main()
