"""Pictures of results: time and memory against size, a roofline, and scaling."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from ..extras import require
from .results import times_ms

COLOURS = ("#0b62b8", "#c2410c", "#15803d", "#a21caf", "#a16207", "#0e7490", "#4b5563")


def draw(folder: Path, result: dict[str, Any]) -> list[Path]:
    """GROUP.png of each group, roofline.png, and scaling.png where there are curves.

    Raises:
        ImportError: matplotlib is missing.
    """
    require("matplotlib", "bench")
    import matplotlib

    matplotlib.use("agg")
    rows = [row for row in result["rows"] if "ours" in row.get("providers", ())]
    drawn = []
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        draw_group = _steps if "images_per_s" in own[0] else _against_size
        drawn.append(draw_group(folder, group, own))
    if any(row.get("flop") for row in rows):
        drawn.append(_roofline(folder, rows))
    if result.get("scaling"):
        drawn.append(_scaling(folder, result["scaling"]))
    return drawn


def _against_size(folder: Path, group: str, rows: list[dict]) -> Path:
    """A line a case and size, a point a provider: time on the left, memory on the right."""
    import matplotlib.pyplot as plt

    names = dict.fromkeys(n for row in rows for n in (*row["providers"], *row["failed"]))
    libraries = dict.fromkeys(_library(name) for name in names)
    colours = dict(zip(libraries, itertools.cycle(COLOURS), strict=False))
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.5 + 0.24 * len(rows)), sharey=True, layout="constrained"
    )
    memory = [
        {n: f["extra_mib"] for n, f in row["providers"].items() if "extra_mib" in f} for row in rows
    ]
    axes[0].set(xscale="log", xlabel="time, ms")
    axes[1].set_xscale("symlog", linthresh=1)
    axes[1].set_xlabel("extra memory, MiB (where not measured, nothing)")
    for axis, each in zip(axes, ([times_ms(row) for row in rows], memory), strict=True):
        for y, values in enumerate(each):
            if values:
                axis.plot([min(values.values()), max(values.values())], [y, y], lw=1, color="0.75")
            for name, value in values.items():
                front = 4 if name == "ours" else 3
                axis.plot(value, y, "o", ms=6, color=colours[_library(name)], zorder=front)
        axis.grid(axis="x", alpha=0.3)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        if max(max(values.values(), default=0) for values in each) == 0:
            axis.set_xlim(0, 1)
    for y, row in enumerate(rows):
        if row["failed"]:
            why = ", ".join(f"{name} {why}" for name, why in row["failed"].items())
            axes[0].annotate(
                why[:60], (0.99, y), xycoords=("axes fraction", "data"), ha="right", va="center",
                fontsize=6, color=colours[_library(next(iter(row["failed"])))],
            )  # fmt: skip
        if y and row["case"] != rows[y - 1]["case"]:
            for axis in axes:
                axis.axhline(y - 0.5, lw=0.5, color="0.6")
    axes[0].set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    handles = [
        plt.Line2D([], [], ls="", marker="o", color=colour, label=library)
        for library, colour in colours.items()
    ]
    figure.legend(handles=handles, fontsize=8, loc="outside upper center", ncols=6)
    return _save(figure, folder / f"{group}.png")


def _library(provider: str) -> str:
    """What its points are coloured by: the library, or the first word of another description."""
    return "fastssl" if provider == "ours" else provider.replace(",", "").split()[0]


def _label(row: dict) -> str:
    sizes = (v if isinstance(v, str) else f"{k} {v}" for k, v in row["sizes"].items())
    return f"{row['case']} {', '.join(sizes)}, {row['dtype']}"


def _steps(folder: Path, group: str, rows: list[dict]) -> Path:
    """A bar a step: its time an image, in its parts."""
    import matplotlib.pyplot as plt

    bars = [(row, name, ms) for row in rows for name, ms in times_ms(row).items()]
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.24 * len(bars)), layout="constrained")
    left = [0.0] * len(bars)
    for n, part in enumerate(rows[0]["parts_percent"]["ours"]):
        widths = [
            row["parts_percent"][name][part] / 100 * ms / row["sizes"]["B"]
            for row, name, ms in bars
        ]
        axis.barh(range(len(bars)), widths, left=left, color=COLOURS[n], label=part)
        left = [x + w for x, w in zip(left, widths, strict=True)]
    labels = []
    for y, (row, name, _) in enumerate(bars):
        labels.append(f"{_label(row)}: fastssl" if name == "ours" else name)
        if y and name == "ours":
            axis.axhline(y - 0.5, lw=0.5, color="0.6")
    axis.set_yticks(range(len(bars)), labels, fontsize=7)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.set_xlabel("ms an image")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="outside upper center", ncols=6)
    return _save(figure, folder / f"{group}.png")


def _roofline(folder: Path, rows: list[dict]) -> Path:
    """Achieved rate against operations per byte, under the rates of bare products and of a copy."""
    import matplotlib.pyplot as plt

    copies = [row["copy_gb_s"] for row in rows if "copy_gb_s" in row]
    rows = [row for row in rows if row.get("flop")]
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    cases = list(dict.fromkeys(row["case"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    x = [row["flop"] / row["traffic_bytes"] for row in rows]
    y = [1e3 * row["tflops"] for row in rows]
    for row, intensity, rate in zip(rows, x, y, strict=True):
        axis.scatter(
            intensity, rate, color=plt.get_cmap("tab20")(cases.index(row["case"]) % 20),
            marker="os^D"[dtypes.index(row["dtype"]) % 4], s=36, zorder=3,
        )  # fmt: skip
    peaks = {
        dtype: max(1e3 * row["product_tflops"] for row in rows if row["dtype"] == dtype)
        for dtype in dtypes
    }
    left, right = min(x) / 8, 2 * max(x)
    bottom, top = min(y) / 2, 2 * max(*y, *peaks.values())
    for n, peak in enumerate(peaks.values()):
        ridge = max(left, peak / max(copies)) if copies else left
        axis.plot([ridge, right], [peak, peak], color="black", lw=1, ls=("-", "--", ":")[n % 3])
    if copies:
        copy, ridge = max(copies), max(peaks.values()) / max(copies)
        axis.plot([left, ridge], [left * copy, max(peaks.values())], color="grey", lw=1)
        place = max(left, 1.2 * bottom / copy)
        axis.annotate(f"copy, {copy:.0f} GB/s", (place, place * copy), (8, 0), fontsize=8,
                      textcoords="offset points", va="top")  # fmt: skip
    axis.set(
        xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top),
        xlabel="operations per byte of inputs and outputs",
        ylabel="GFLOP/s of the products that are needed",
    )  # fmt: skip
    names = axis.secondary_yaxis("right")
    names.set_yticks(list(peaks.values()), [f"{d}\n{p:.3g}" for d, p in peaks.items()], fontsize=8)
    names.minorticks_off()
    names.set_ylabel("the library's fastest bare product, GFLOP/s", fontsize=8)
    point = {"ls": "", "color": "black"}
    handles = [plt.Line2D([], [], marker="os^D"[n % 4], label=dtype, **point)
               for n, dtype in enumerate(dtypes)]  # fmt: skip
    handles += [
        plt.Line2D([], [], **point | {"color": plt.get_cmap("tab20")(n % 20)}, marker="o", label=c)
        for n, c in enumerate(cases)
    ]
    figure.legend(handles=handles, fontsize=8, loc="outside right upper")
    axis.grid(alpha=0.3, which="both")
    return _save(figure, folder / "roofline.png")


def _scaling(folder: Path, curves: list[dict]) -> Path:
    """Time of ours against one growing size, with the fitted and the expected exponent."""
    import matplotlib.pyplot as plt

    per_line = min(4, len(curves))
    lines = -(-len(curves) // per_line)
    figure, axes = plt.subplots(
        lines, per_line, figsize=(3.8 * per_line, 3.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    for axis, curve in zip(axes.flat, curves, strict=False):
        values, times = curve["values"], curve["times_ms"]
        axis.plot(values, times, "o-", color=COLOURS[0])
        centre, slope = statistics.geometric_mean(values), curve["expected"]
        expected = [statistics.geometric_mean(times) * (v / centre) ** slope for v in values]
        axis.plot(values, expected, ls="--", color="grey", lw=1)
        others = ", ".join(f"{k} {v}" for k, v in curve["others"].items())
        axis.set_title(
            f"{curve['case']} {others}\nfitted {curve['exponent']:.2f}, "
            f"expected {curve['expected']:g} (dashed)", fontsize=8,
        )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        labels = [f"{v // 10**6} million" if v % 10**6 == 0 else str(v) for v in values]
        axis.set_xticks(values, labels, fontsize=7)
        axis.set_yticks(times, [f"{t:.3g}" for t in times], fontsize=7)
        axis.minorticks_off()
        axis.set_xlabel(curve["letter"], fontsize=8)
        axis.set_ylabel("time, ms", fontsize=8)
        axis.grid(alpha=0.3)
    return _save(figure, folder / "scaling.png")


def _save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
