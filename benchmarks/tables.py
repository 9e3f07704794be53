"""Rewrites the README's table of measured figures from the committed results files."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NAMES = {
    "clip": "ClipLoss",
    "clip_stored": "ClipLoss(store_logits=True)",
    "nt_xent": "NTXentLoss",
    "queue": "queue_nce",
    "siglip": "SigLipLoss",
    "sup_con": "SupConLoss",
}
LIMIT = """Of the limit: the time of fastssl over that of the algorithm's own products and
exponentials, timed bare in the same run (float32)."""


def table(result: dict) -> str:
    env = result["environment"]
    lines = [
        f"{env['device']}, {env['threads']} threads, {', '.join(env['cpu_features'])}; "
        f"torch {env['torch']}, open_clip {env['open_clip_torch']}, lightly {env['lightly']}, "
        f"pytorch-metric-learning {env['pytorch-metric-learning']}; "
        f"{env['date']}, commit {env['commit']}.",
        "",
        "| loss | N x D | dtype | fastssl | baseline | speed-up | of the limit | extra memory "
        "| baseline's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        size = [row["N"], row["M"], row["D"]] if row["case"] == "queue" else [row["N"], row["D"]]
        others = {row["baseline"]: row["eager"], **row["others"]}
        others = ", ".join(f"{name} {x['median_ms']:.2f} ms" for name, x in others.items())
        share = f"{row['share']:.2f}" if "share" in row else ""
        lines.append(
            f"| {NAMES[row['case']]} | {' x '.join(map(str, size))} | {row['dtype']} "
            f"| {row['ours']['median_ms']:.2f} ms | {others} | {row['speedup']:.2f} x | {share} "
            f"| {mebibytes(row, 'extra_mib')} | {mebibytes(row, 'eager_extra_mib')} |"
        )
    return "\n".join(lines)


def mebibytes(row: dict, field: str) -> str:
    return f"{max(row[field], 0):.0f} MiB" if field in row else ""


def results() -> list[dict]:
    """Of the contrastive losses: a machine's own file, or that part of gpu-check's report."""
    found = []
    for path in sorted(ROOT.glob("benchmarks/results/*/*.json")):
        result = json.loads(path.read_text())
        if path.stem == "contrastive":
            found.append(result)
        elif path.stem == "gpu-check" and "contrastive" in result:
            found.append(result["contrastive"])
    return found


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    tables = "\n\n".join([LIMIT, *map(table, results())])
    readme.write_text(f"{head}{BEGIN}\n{tables}\n{END}{tail}")


if __name__ == "__main__":
    main()
