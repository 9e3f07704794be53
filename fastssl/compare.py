"""Methods side by side: the same images as often with each, one table and one plot."""

import json
import os
import re
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .config import PretrainConfig
from .data import load
from .evaluate import evaluate, read_results
from .outputs import check_folder
from .report.style import STYLE
from .train import pretrain
from .train.checkpoint import replacing
from .train.folder import read_config

SCORES = {"knn-20": "knn", "linear": "linear"}
"""Numbers of the table and their protocols."""


def compare(
    methods: Sequence[str],
    data: str = "patches",
    *,
    epochs: int = 20,
    seeds: Sequence[int] = (0,),
    backbone: str | None = None,
    out: str | os.PathLike = "runs/compare",
    device: str = "auto",
) -> dict[str, Any]:
    """Pretrain with each method, evaluate before and after, and write a table and a plot.

    Every method sees every image `epochs` times; all else is its recipe's. What is finished in
    `out` is not done again, and an interrupted run goes on. A method that fails is told of in the
    table, and the others go on.

    Args:
        methods: names, or `FILE.py:CLASS`.
        data: what is trained on, labelled; evaluated on its test split.
        epochs: passes over the images.
        seeds: a run for each.
        backbone: of all of them; None: that of the recipe.
        out: folder for the runs, compare.json, compare.md and compare.svg.
        device: "auto" (the GPU if there is one), "cpu", "cuda", ...

    Returns:
        What compare.json holds: data, epochs, versions, and `rows`, one for each run, with
        method, seed, backbone, `before` and `after` in percent, seconds and images_per_s of the
        training; or with method, seed and the `error`.

    Raises:
        ValueError: no method, no seed, one twice, an unknown one or a wrong setting; or `out` holds
            a comparison on other data, of other epochs or another backbone. FileNotFoundError: no
            such data, or no test split. NotADirectoryError, PermissionError: out cannot be
            written. All before anything is trained or written.
    """
    if not methods or not seeds:
        raise ValueError(f"compare: methods and seeds must not be empty, got {methods}, {seeds}.")
    check_folder("compare", out)
    out, rows = Path(out), []
    jobs = []
    for method in methods:
        for seed in seeds:
            path = out / f"{method.rpartition(':')[2]}-{seed}"
            config = PretrainConfig(
                method=method, data=data, epochs=epochs, seed=seed, backbone=backbone,
                out=path, device=device, resume=(path / "config.yaml").is_file(),
            )  # fmt: skip
            if any(config.out == earlier.out for _, earlier in jobs):
                raise ValueError(
                    "compare: methods and seeds must differ, as each run has its folder, got "
                    f"{path.name} twice. Leave one out, or rename its class."
                )
            jobs.append((method, config))
    load(data, "test")  # refuses data that cannot be scored
    found = {
        "data": data,
        "epochs": epochs,
        "backbone": backbone,
        "versions": {"fastssl": __version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    _refuse_other_settings(out / "compare.json", found)
    out.mkdir(parents=True, exist_ok=True)
    for method, config in jobs:
        print(f"{method}, seed {config.seed}", flush=True)
        row = {"method": method, "seed": config.seed}
        try:
            rows.append(row | _run(config, device))
        except Exception as error:  # of one method; the others go on
            rows.append(row | {"error": f"{type(error).__name__}: {error}"})
            print(f"failed: {rows[-1]['error']}", flush=True)
        for name, text in (  # after each run, for who looks in between
            ("compare.json", json.dumps(found, indent=1) + "\n"),
            ("compare.md", table(found) + "\n"),
            ("compare.svg", plot(found)),
        ):
            with replacing(out / name) as file:
                file.write(text.encode())
    return found


def _refuse_other_settings(path: Path, found: dict[str, Any]) -> None:
    if not path.is_file():
        return
    try:
        earlier = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"compare: {path} must be of an earlier comparison, got {error}. Choose another out."
        ) from error
    for name in ("data", "epochs", "backbone"):
        if earlier.get(name) != found[name]:
            raise ValueError(
                f"compare: {name} must be that of the comparison in {path.parent}, "
                f"{earlier.get(name)!r}, got {found[name]!r}. Choose another out."
            )


def _run(config: PretrainConfig, device: str) -> dict[str, Any]:
    run = pretrain(config)  # at once if it is finished
    settings = read_config(run.path)
    return {
        "backbone": settings["backbone"],
        "before": _scores(run.path, settings["data"], "random", device),
        "after": _scores(run.path, settings["data"], "pretrained", device),
        "seconds": run.metrics["seconds"],
        "images_per_s": run.metrics["images_per_s"],
    }


def _scores(path: Path, data: str, weights: str, device: str) -> dict[str, float]:
    results = read_results(path).get(data, {}).get(weights, {})
    if not set(SCORES.values()) <= results.keys():
        results = evaluate(path, None, [*SCORES.values()], weights=weights, device=device)
    return {name: results[protocol]["top1_percent"][name] for name, protocol in SCORES.items()}


def table(found: dict[str, Any]) -> str:
    """Markdown: a line for each method, means over its seeds and, of several, deviations."""
    titles = ["random weights: kNN-20", "linear", "trained: kNN-20", "linear", "seconds"]
    lines = [
        f"| {' | '.join(['method', 'backbone', *titles, 'images/s', 'seeds'])} |",
        f"|{'---|' * (len(titles) + 4)}",
    ]
    failed = []
    for method, rows in _by_method(found).items():
        failed += [f"{method}, seed {r['seed']}: {r['error']}" for r in rows if "error" in r]
        done = [row for row in rows if "error" not in row]
        if not done:
            continue
        cells = [
            spread([row[weights][name] for row in done], 1)
            for weights in ("before", "after")
            for name in SCORES
        ]
        cells += [spread([row[key] for row in done], 0) for key in ("seconds", "images_per_s")]
        seeds = ", ".join(str(row["seed"]) for row in done)
        lines.append(f"| {method} | {done[0]['backbone']} | {' | '.join(cells)} | {seeds} |")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines += [
        "",
        f"Top-1 accuracy in percent on the test split of {found['data']} after {found['epochs']} "
        f"epochs; mean and standard deviation over the seeds. Seconds are of the training, on "
        f"{found['threads']} threads; {versions}.",
    ]
    if failed:
        lines += ["", "Failed:", "", *(f"- {text}" for text in failed)]
    return "\n".join(lines)


def plot(found: dict[str, Any]) -> str:
    """SVG, complete in itself: of each method and score a dot before and one after training, with
    bars of a standard deviation."""
    done = {
        method: [row for row in rows if "error" not in row]
        for method, rows in _by_method(found).items()
    }
    done = {method: rows for method, rows in done.items() if rows}
    colour = dict(reversed(re.findall(r"--(bg|fg|dim|rule|grey|c\d): (#\w+)", STYLE)))  # light
    left, right, top, pitch = 110, 620, 44, 34
    bottom = top + pitch * max(1, len(done))
    parts = [f'<rect width="640" height="{bottom + 44}" fill="{colour["bg"]}"/>']

    def x(percent: float) -> float:
        return left + (right - left) * percent / 100

    for percent in range(0, 101, 20):
        parts.append(
            f'<path stroke="{colour["rule"]}" d="M{x(percent):.1f} {top}V{bottom}"/>'
            f'<text x="{x(percent):.1f}" y="{bottom + 16}" text-anchor="middle">{percent}</text>'
        )
    parts.append(
        f'<text x="{(left + right) / 2}" y="{bottom + 36}" text-anchor="middle">top-1 on the test '
        f"split of {escape(found['data'])} (%), after {found['epochs']} epochs</text>"
    )
    shown = dict(zip(SCORES, (colour["c0"], colour["c1"]), strict=True))
    legend = {f"{name}, trained": hue for name, hue in shown.items()}
    for number, (text, hue) in enumerate((legend | {"random weights": colour["grey"]}).items()):
        parts.append(
            f'<circle cx="{left + 8 + 150 * number}" cy="20" r="5" fill="{hue}"/>'
            f'<text x="{left + 20 + 150 * number}" y="24">{text}</text>'
        )
    for line, (method, rows) in enumerate(done.items()):
        parts.append(
            f'<text x="{left - 10}" y="{top + pitch * (line + 0.5) + 4}" text-anchor="end" '
            f'fill="{colour["fg"]}">{escape(method)}</text>'
        )
        for number, (name, hue) in enumerate(shown.items()):
            y = top + pitch * (line + 0.32 + 0.36 * number)
            for weights, fill in (("before", colour["grey"]), ("after", hue)):
                values = [row[weights][name] for row in rows]
                mean = statistics.mean(values)
                if len(values) > 1:
                    sd = statistics.stdev(values)
                    parts.append(
                        f'<path stroke="{fill}" stroke-width="2" '
                        f'd="M{x(mean - sd):.1f} {y:.1f}H{x(mean + sd):.1f}"/>'
                    )
                parts.append(f'<circle cx="{x(mean):.1f}" cy="{y:.1f}" r="5" fill="{fill}"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {bottom + 44}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{colour["dim"]}">'
        f"{''.join(parts)}</svg>\n"
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Their mean and, of several, the deviation."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def _by_method(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        rows.setdefault(row["method"], []).append(row)
    return rows
