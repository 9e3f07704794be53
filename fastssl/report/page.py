"""The HTML of a report. Everything that comes from a user's files goes through `escape`."""

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluate import read_results
from ..train.folder import read_config
from ..train.metrics import read_metrics
from . import pictures
from .charts import COLOURS, Series, line_chart
from .style import STYLE

_SHOWN_FILES = 100
"""Unreadable files named in the page."""


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder holds; parts that are not there are empty."""

    folder: Path
    name: str
    config: dict[str, Any]
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    environment: dict[str, Any]
    results: dict[str, Any]
    warnings: list[str]
    corrupt: list[str]


def read(folder: Path) -> RunFiles:
    config = read_config(folder)
    if config is None:
        raise FileNotFoundError(
            f"report: {folder} is not a run: it has no config.yaml. Give the run's out folder."
        )
    return RunFiles(
        folder,
        folder.resolve().name,
        config,
        read_metrics(folder),
        _json(folder / "summary.json"),
        _json(folder / "environment.json"),
        read_results(folder),
        [line.partition("\t")[2] for line in _lines(folder / "warnings.txt")] + _stop(folder),
        _lines(folder / "corrupt.txt"),
    )


def _stop(folder: Path) -> list[str]:
    """That a loss or gradient was not finite, in a sentence, unless the run has since gone on."""
    bad, records = _json(folder / "bad_batch.json"), read_metrics(folder)
    if not bad or (records and records[-1]["step"] >= bad["step"]):
        return []
    return [
        f"stopped: the {bad['what']} was not finite at step {bad['step']} (first parameter: "
        f"{bad['parameter']}); bad_batch.json names the images"
    ]


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8", "surrogateescape").splitlines() if path.exists() else []


class _Curve(NamedTuple):
    title: str
    keys: tuple[str, ...]
    unit: str
    note: str
    options: dict[str, bool] = {}


_CURVES = (
    _Curve(
        "Loss", ("loss",), "loss",
        "Should fall, fast at first. How low says little about the features: see the accuracies.",
    ),
    _Curve(
        "Accuracy of frozen features while training", ("knn_top1", "probe_top1"), "top-1",
        "On augmented training images. Should rise; a fall while the loss falls means that the "
        "task is solved by something other than the content.",
        {"percent": True},
    ),
    _Curve(
        "RankMe", ("rankme",), "effective dimensions",
        "How many directions the features use. It may fall from a random network's; towards 1 is "
        "collapse.",
        {"zero": True},
    ),
    _Curve(
        "Spread", ("std", "feature_std"), "sd x sqrt(D)",
        "std of projections, feature_std of features: 1 is spread over the sphere, 0 is collapse.",
        {"zero": True},
    ),
    _Curve(
        "Prototypes in use", ("effective_prototypes",), "prototypes",
        "Near 1 means that most images are on one prototype.",
        {"zero": True},
    ),
    _Curve("Learning rate", ("lr",), "learning rate", "", {"zero": True}),
    _Curve(
        "Gradient norm", ("grad_norm",), "norm",
        "Single spikes do no harm; a steady rise comes before divergence.",
        {"log": True},
    ),
    _Curve("Images per second", ("images_per_s",), "images / s", "", {"zero": True}),
    _Curve(
        "Waiting for data", ("data_wait",), "share of time",
        "Above a few per cent more workers, smaller files or a smaller max_side help.",
        {"percent": True, "zero": True},
    ),
)  # fmt: skip
_NOT_DRAWN = {key for curve in _CURVES for key in curve.keys} | {
    "step", "epoch", "peak_memory_mb", "prototypes",
}  # fmt: skip


def describe(run: RunFiles, data: str | None, images: bool, tsne: bool) -> str:
    """The page of one run."""
    parts = [_tiles(run), _warnings([run])]
    parts.append(_section("Training", _charts([run])))
    parts.append(_section("Evaluation", _results([run])))
    if images:
        parts.append(pictures.sections(run.folder, run.config, data, tsne))
    parts.append(_section("Settings", _table(_flat(run.config).items())))
    parts.append(_section("Environment", _table(run.environment.items())))
    return _page(run.name, _headline(run), parts)


def compare(runs: Sequence[RunFiles]) -> str:
    """The page of several runs."""
    parts = [_section("Runs", _overview(runs)), _warnings(runs)]
    parts.append(_section("What differs in the settings", _differences(runs)))
    parts.append(_section("Training", _charts(runs)))
    parts.append(_section("Evaluation", _results(runs)))
    names = ", ".join(_names(runs))
    return _page(f"{len(runs)} runs", names, parts)


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Names that tell the runs apart: with the folder where two are called alike."""
    names = [run.name for run in runs]
    return [
        run.name if names.count(run.name) == 1 else f"{run.folder.resolve().parent.name}/{run.name}"
        for run in runs
    ]


def _headline(run: RunFiles) -> str:
    config = run.config
    data = pictures.data_name(str(config["data"]))
    return f"{config['method']} on {data}, {config['backbone']}, {_state(run)}"


def _state(run: RunFiles) -> str:
    if run.summary:
        return f"finished: {run.summary['epochs']} epochs, {run.summary['steps']} steps"
    if not run.records:
        return "no record yet"
    last = run.records[-1]
    return (
        f"not finished: step {last['step']}, in epoch {last['epoch'] + 1} of {run.config['epochs']}"
    )


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    """Names and values of the last numbers of a run."""
    last: dict[str, Any] = {}
    for record in run.records:
        last |= record
    facts = [("loss", _number(last.get("loss")))]
    facts += [
        (name, f"{100 * last[key]:.1f} %")
        for key, name in (("knn_top1", "online kNN"), ("probe_top1", "online probe"))
        if key in last
    ]
    if "best_held_out_top1_percent" in run.summary:
        best = f"{run.summary['best_held_out_top1_percent']:.1f} %"
        facts.append(("best held-out", f"{best} at step {run.summary['best_step']}"))
    if "rankme" in last:
        facts.append(("RankMe", _number(last["rankme"])))
    rate = run.summary.get("images_per_s", last.get("images_per_s"))
    facts.append(("images / s", "" if rate is None else f"{rate:,.0f}"))
    if "peak_memory_mb" in last:
        facts.append(("peak memory", f"{last['peak_memory_mb']:,.0f} MB"))
    if "seconds" in run.summary:
        facts.append(("time", _duration(run.summary["seconds"])))
    return facts


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _tiles(run: RunFiles) -> str:
    tiles = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for name, value in _facts(run)
        if value
    )
    return f'<div class="tiles">{tiles}</div>'


def _overview(runs: Sequence[RunFiles]) -> str:
    facts = [dict(_facts(run)) for run in runs]
    heads = list(dict.fromkeys(name for fact in facts for name in fact))
    rows = [
        [_key(number) + escape(name), escape(_state(run)), *(escape(f.get(h, "")) for h in heads)]
        for number, (run, name, f) in enumerate(zip(runs, _names(runs), facts, strict=True))
    ]
    return _grid(["run", "state", *heads], rows)


def _key(number: int) -> str:
    return f'<i style="background:var(--c{number % COLOURS})"></i>'


def _warnings(runs: Sequence[RunFiles]) -> str:
    """Warnings of the runs and the files they could not read; "" where there are none."""
    items = []
    for run, name in zip(runs, _names(runs), strict=True):
        prefix = f"{name}, " if len(runs) > 1 else ""
        items += [f"<li>{escape(prefix + text)}</li>" for text in run.warnings]
        if run.corrupt:
            files = "".join(
                f"<li>{escape(': '.join(line.split(chr(9))))}</li>"
                for line in run.corrupt[:_SHOWN_FILES]
            )
            more = len(run.corrupt) - _SHOWN_FILES
            if more > 0:
                files += f"<li>and {more} more, in corrupt.txt</li>"
            items.append(
                f"<li>{escape(prefix)}{len(run.corrupt)} files could not be read"
                f"<details><summary>which</summary><ul>{files}</ul></details></li>"
            )
    if not items:
        return ""
    return f'<section class="warn"><h2>Warnings</h2><ul>{"".join(items)}</ul></section>'


def _charts(runs: Sequence[RunFiles]) -> str:
    """One chart a curve: of one run with all its keys, of several with a line for each run."""
    charts = []
    own = dict.fromkeys(
        key
        for run in runs
        for record in run.records
        for key, value in record.items()
        if key not in _NOT_DRAWN and isinstance(value, int | float)
    )
    for curve in (*_CURVES, *(_Curve(key, (key,), key, "") for key in own)):
        if len(runs) == 1:
            lines = [_series(runs[0], key, key) for key in curve.keys]
            charts.append(_chart(curve, curve.title, lines, runs))
            continue
        for key in curve.keys:
            title = curve.title if len(curve.keys) == 1 else f"{curve.title}: {key}"
            names = zip(runs, _names(runs), strict=True)
            lines = [_series(run, key, name) for run, name in names]
            charts.append(_chart(curve, title, lines, runs))
    if not any(charts):
        return "<p>No metrics yet.</p>"
    return f'<div class="charts">{"".join(charts)}</div>'


def _series(run: RunFiles, key: str, name: str) -> Series:
    points = [(record["step"], record[key]) for record in run.records if key in record]
    return Series(name, [x for x, _ in points], [y for _, y in points])


def _chart(curve: _Curve, title: str, lines: list[Series], runs: Sequence[RunFiles]) -> str:
    last = [run.records[-1] for run in runs if run.records]
    marks = []
    for K in {record["prototypes"] for record in last if "prototypes" in record}:
        if curve.keys == ("effective_prototypes",):
            marks.append((K, f"K = {K:.0f}"))
        if curve.keys == ("loss",) and not any("prototype_loss" in record for record in last):
            marks.append((math.log(K), f"ln {K:.0f}: all images alike"))
    return line_chart(
        title, lines, x_label="optimizer step", y_label=curve.unit, note=curve.note, marks=marks,
        **curve.options,
    )  # fmt: skip


def _results(runs: Sequence[RunFiles]) -> str:
    """A table for each data set: metrics down, runs and weights across; protocols below."""
    if not any(run.results for run in runs):
        command = f"fastssl evaluate {shlex.quote(str(runs[0].folder))} --random"
        return f"<p>Not evaluated yet: <code>{escape(command)}</code></p>"
    parts = []
    everything = list(dict.fromkeys(data for run in runs for data in run.results))
    short = [pictures.data_name(data) for data in everything]
    for data in everything:
        columns = {}
        for run, name in zip(runs, _names(runs), strict=True):
            by_weights = run.results.get(data, {})
            for weights in sorted(by_weights, key=lambda weights: weights != "random"):
                head = weights if len(runs) == 1 else f"{name}, {weights}"
                columns[head] = by_weights[weights]
        numbers = [dict(_metrics(result)) for result in columns.values()]
        metrics = dict.fromkeys(metric for n in numbers for metric in n)
        rows = [[escape(m), *(_measured(m, n.get(m)) for n in numbers)] for m in metrics]
        gap = [*columns] == ["random", "pretrained"]
        if gap:
            for row, metric in zip(rows, metrics, strict=True):
                row.append(_gap(*(n.get(metric) for n in numbers)))
        protocols = "".join(
            f"<details><summary>Protocol: {escape(head)}</summary>"
            f"<pre>{escape(json.dumps(_protocols(result), indent=2))}</pre></details>"
            for head, result in columns.items()
        )
        name = pictures.data_name(data)
        title = escape(f"On {name if short.count(name) == 1 else data}")
        parts.append(
            f"<h3>{title}</h3>{_grid(['metric', *columns, *['gap'] * gap], rows)}{protocols}"
        )
    return "".join(parts)


def _metrics(result: dict[str, Any]) -> Iterable[tuple[str, tuple[float, float | None]]]:
    """Name, value and deviation (None without draws) of each number that `evaluate` gave."""
    for protocol, values in result.items():
        spread = values.get("sd_percent", {}) | values.get("sd", {})
        for group, value in values.items():
            if group in ("protocol", "sd_percent", "sd"):
                continue
            members = value if isinstance(value, dict) else {group.removesuffix("_percent"): value}
            for name, number in members.items():
                if isinstance(number, int | float):
                    if isinstance(value, dict) and not group.endswith("percent"):
                        name = f"{group} {name}"
                    label = name if name.startswith(protocol) else f"{protocol}: {name}"
                    unit = ", %" if group.endswith("percent") else ""
                    yield f"{label}{unit}", (number, spread.get(name))


def _protocols(result: dict[str, Any]) -> dict[str, Any]:
    return {name: values.get("protocol", {}) for name, values in result.items()}


def _measured(name: str, metric: tuple[float, float | None] | None) -> str:
    if metric is None:
        return ""
    value, spread = metric
    text = f"{value:.2f}" if name.endswith("%") else _number(value)
    if spread is None:
        return text
    return f"{text} ± {spread:.2f}" if name.endswith("%") else f"{text} ± {_number(spread)}"


def _gap(random: tuple | None, pretrained: tuple | None) -> str:
    return f"{pretrained[0] - random[0]:+.2f}" if random and pretrained else ""


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _differences(runs: Sequence[RunFiles]) -> str:
    tables = [_flat({**run.config, "environment": run.environment}) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table if key not in ("out", "resume"))
    rows = []
    for key in keys:
        texts = [_text(table[key]) if key in table else "" for table in tables]
        if len({*texts}) > 1:
            rows.append([escape(key), *map(escape, texts)])
    if not rows:
        return "<p>Nothing but the folder.</p>"
    return _grid(["setting", *_names(runs)], rows)


def _table(items: Iterable[tuple[str, Any]]) -> str:
    rows = [[escape(str(key)), escape(_text(value))] for key, value in items]
    return _grid([], rows) if rows else "<p>Not there.</p>"


def _text(value: Any) -> str:
    return (
        "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; heads are text, cells HTML."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{f"<tr>{head}</tr>" if heads else ""}{body}</table></div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _page(title: str, headline: str, parts: Sequence[str]) -> str:
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}: fastssl</title><style>{STYLE}</style></head>
<body><header><h1>{escape(title)}</h1><p>{escape(headline)}</p></header>
{"".join(parts)}
</body></html>
"""
