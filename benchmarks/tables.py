"""Rewrites the README's table of measured figures from the committed results files."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = "contrastive prototypes linear_prototypes gram sigreg optim augment".split()
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NAMES = {
    "clip": "ClipLoss",
    "clip_stored": "ClipLoss(store_logits=True)",
    "nt_xent": "NTXentLoss",
    "queue": "queue_nce",
    "siglip": "SigLipLoss",
    "sup_con": "SupConLoss",
    "sinkhorn_bias": "sinkhorn_bias",
    "sinkhorn": "sinkhorn",
    "dino": "prototype_cross_entropy",
    "linear_prototypes": "linear_prototype_cross_entropy",
    "linear_prototypes_autocast": "the same under autocast",
    "sigreg": "sigreg",
    "adamw8bit": "AdamW8bit",
    "adamw8bit_vit_b": "AdamW8bit, ViT-B/16",
    "ema_vit_b": "EMA, ViT-B/16",
    "ema_1000_tensors": "EMA, 1000 tensors",
    "simclr": "augment, SimCLR's view",
    "vicreg": "VICRegLoss",
    "barlow_twins": "BarlowTwinsLoss",
    "koleo": "KoLeoLoss",
    "topk": "topk_cosine",
}
SIZES = {
    "queue": "NMD", "topk": "NMD", "sinkhorn_bias": "NM", "sinkhorn": "NM", "dino": "NM",
    "linear_prototypes": "NMD", "linear_prototypes_autocast": "NMD", "sigreg": "VNMD",
    "adamw8bit": "N", "adamw8bit_vit_b": "N", "ema_vit_b": "N", "ema_1000_tensors": "N",
    "simclr": "NHM",
}  # fmt: skip
LIMIT = """Sizes are N x D; N x M x D with a queue or bank of M; N x M over M prototypes, for the
cross-entropy with 2 teacher and 10 student crops; V x N x M x D for V views and M slices; N
parameters of an optimizer; N x H x M for N images of H x H pixels and views of M x M. Of the limit:
the time of fastssl over that of the algorithm's own products and exponentials, for optimizers and
views of a copy of as many bytes, timed bare in the same run (float32)."""
SHARDED = """One batch over several processes under gloo on the same CPU, one thread each; N rows
(of each view) in all. A step takes the slowest rank's time; extra memory is rank 0's. fastssl by
its two exchanges, open_clip with `local_loss` and `gather_with_grad`, lightly with
`gather_distributed`."""


def provenance(result: dict, threads: str) -> str:
    env = result["environment"]
    return (
        f"{env['device']}, {threads}, {', '.join(env['cpu_features'])}; "
        f"torch {env['torch']}, open_clip {env['open_clip_torch']}, lightly {env['lightly']}, "
        f"pytorch-metric-learning {env['pytorch-metric-learning']}; "
        f"{env['date']}, commit {env['commit']}."
    )


def table(result: dict) -> str:
    lines = [
        provenance(result, f"{result['environment']['threads']} threads"),
        "",
        "| loss | size | dtype | fastssl | baseline | speed-up | of the limit | extra memory "
        "| baseline's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        size = [row[name] for name in SIZES.get(row["case"], "ND")]
        others = {row["baseline"]: row["eager"], **row["others"]}
        others = ", ".join(f"{name} {x['median_ms']:.2f} ms" for name, x in others.items())
        share = f"{row['share']:.2f}" if "share" in row else ""
        lines.append(
            f"| {NAMES[row['case']]} | {' x '.join(map(str, size))} | {row['dtype']} "
            f"| {row['ours']['median_ms']:.2f} ms | {others} | {row['speedup']:.2f} x | {share} "
            f"| {mebibytes(row, 'extra_mib')} | {mebibytes(row, 'eager_extra_mib')} |"
        )
    return "\n".join(lines)


def sharded_table(result: dict) -> str:
    lines = [
        provenance(result, "1 thread a rank"),
        "",
        "| loss | ranks | N x D | dtype | exchange | fastssl | baseline | speed-up | extra memory "
        "| baseline's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        peer = row["baseline"]
        for exchange, speedup in row["speedup"].items():
            lines.append(
                f"| {NAMES[row['case']]} | {row['world']} | {row['N']} x {row['D']} "
                f"| {row['dtype']} | {exchange if row['world'] > 1 else ''} "
                f"| {row['times'][exchange]['median_ms']:.2f} ms "
                f"| {peer} {row['times'][peer]['median_ms']:.2f} ms | {speedup:.2f} x "
                f"| {mebibytes(row.get('extra_mib', {}), exchange)} "
                f"| {mebibytes(row.get('extra_mib', {}), peer)} |"
            )
    return "\n".join(lines)


def mebibytes(row: dict, field: str) -> str:
    return f"{max(row[field], 0):.0f} MiB" if field in row else ""


def results(name: str) -> list[dict]:
    """Those of a bench module: a machine's own file, or that part of gpu-check's report."""
    found = []
    for path in sorted(ROOT.glob("benchmarks/results/*/*.json")):
        result = json.loads(path.read_text())
        if path.stem == name:
            found.append(result)
        elif path.stem == "gpu-check" and name in result:
            found.append(result[name])
    return found


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    parts = [LIMIT]
    for name in PARTS:
        parts += map(table, results(name))
    if sharded := results("sharded"):
        parts += [SHARDED, *map(sharded_table, sharded)]
    tables = "\n\n".join(parts)
    readme.write_text(f"{head}{BEGIN}\n{tables}\n{END}{tail}")


if __name__ == "__main__":
    main()
