"""Pictures of results: time and memory against size, a roofline, and scaling."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from ..extras import require

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
    """A column a case and dtype: time above, memory below."""
    import matplotlib.pyplot as plt

    panels = defaultdict(list)
    for row in rows:
        panels[row["case"], row["dtype"]].append(row)
    per_line = min(4, len(panels))
    bands = -(-len(panels) // per_line)
    figure, axes = plt.subplots(
        2 * bands, per_line, figsize=(4.2 * per_line, 5.6 * bands), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for number, ((case, dtype), own) in enumerate(panels.items()):
        top = axes[2 * (number // per_line), number % per_line]
        bottom = axes[2 * (number // per_line) + 1, number % per_line]
        _panel(top, own, "median_ms", "time, ms")
        _panel(bottom, own, "extra_mib", "extra memory, MiB")
        top.set_title(f"{case}, {dtype}", fontsize=10)
        top.legend(fontsize=7)
    for empty in range(len(panels), bands * per_line):
        for half in range(2):
            axes[2 * (empty // per_line) + half, empty % per_line].axis("off")
    return _save(figure, folder / f"{group}.png")


def _steps(folder: Path, group: str, rows: list[dict]) -> Path:
    """A bar a step: its time an image, in its parts."""
    import matplotlib.pyplot as plt

    bars = [(row, name) for row in rows for name in row["providers"]]
    figure, axis = plt.subplots(figsize=(9, 0.6 + 0.26 * len(bars)), layout="constrained")
    left = [0.0] * len(bars)
    for n, part in enumerate(rows[0]["parts_percent"]["ours"]):
        widths = [
            row["parts_percent"][name][part] / 100 * 1e3 / row["images_per_s"][name]
            for row, name in bars
        ]
        axis.barh(range(len(bars)), widths, left=left, color=COLOURS[n], label=part)
        left = [x + w for x, w in zip(left, widths, strict=True)]
    labels = []
    for row, name in bars:
        size = ", ".join(str(v) for v in row["sizes"].values())
        labels.append(f"{row['case']} {size}, {'fastssl' if name == 'ours' else name}")
    axis.set_yticks(range(len(bars)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("ms an image")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="outside upper center", ncols=6)
    return _save(figure, folder / f"{group}.png")


def _panel(axis, rows: list[dict], field: str, label: str) -> None:
    """One bar a size and provider: sizes differ in more than one letter."""
    names = list(dict.fromkeys(name for row in rows for name in row["providers"]))
    width = 0.8 / len(names)
    for n, name in enumerate(names):
        heights = [row["providers"].get(name, {}).get(field) for row in rows]
        places = [i + n * width - 0.4 + width / 2 for i in range(len(rows))]
        found = [(x, h) for x, h in zip(places, heights, strict=True) if h is not None]
        colour = COLOURS[n % len(COLOURS)]
        shown = "fastssl" if name == "ours" else name
        axis.bar([x for x, _ in found], [h for _, h in found], width, color=colour, label=shown)
    values = [row["providers"][n].get(field) for row in rows for n in row["providers"]]
    values = [v for v in values if v]
    if field == "median_ms" or values:
        axis.set_yscale("log" if values and max(values) > 20 * min(values) else "linear")
    labels = ["\n".join(f"{k} {v}" for k, v in row["sizes"].items()) for row in rows]
    axis.set_xticks(range(len(rows)), labels, fontsize=7)
    axis.set_ylabel(label, fontsize=8)
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(axis="y", alpha=0.3)
    if not values:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", fontsize=8)


def _roofline(folder: Path, rows: list[dict]) -> Path:
    """Achieved rate against operations per byte, under the rates of bare products and of the copy
    measured for the rows without products."""
    import matplotlib.pyplot as plt

    copies = [row["copy_gb_s"] for row in rows if "copy_gb_s" in row]
    rows = [row for row in rows if row.get("flop")]

    figure, axis = plt.subplots(figsize=(8, 5.5), layout="constrained")
    axis.set(xscale="log", yscale="log")
    cases = list(dict.fromkeys(row["case"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    for row in rows:
        axis.scatter(
            row["flop"] / row["traffic_bytes"], 1e3 * row["tflops"],
            color=plt.get_cmap("tab20")(cases.index(row["case"]) % 20),
            marker="os^D"[dtypes.index(row["dtype"]) % 4],
            label=f"{row['case']}, {row['dtype']}", s=36,
        )  # fmt: skip
    for n, dtype in enumerate(dtypes):
        peak = max(1e3 * row["product_tflops"] for row in rows if row["dtype"] == dtype)
        axis.axhline(peak, color="black", lw=1, ls=("-", "--", ":")[n % 3])
        axis.annotate(
            f"bare product, {dtype}: {peak:.3g}", (0.01 + 0.98 * (n % 2), peak), fontsize=8,
            va="bottom", ha=("left", "right")[n % 2], xycoords=("axes fraction", "data"),
        )  # fmt: skip
    if copies:  # up to the ridge
        ends = axis.get_xlim()[0], 1e3 * max(row["product_tflops"] for row in rows) / max(copies)
        axis.plot(ends, [x * max(copies) for x in ends], color="grey", lw=1,
                  label=f"copy, {max(copies):.0f} GB/s")  # fmt: skip
    axis.set(xlabel="operations per byte of inputs and outputs",
             ylabel="GFLOP/s of the products that are needed")  # fmt: skip
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), fontsize=7, loc="outside right upper")
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
        expected = [times[-1] * (v / values[-1]) ** curve["expected"] for v in values]
        axis.plot(values, expected, ls="--", color="grey", lw=1)
        others = ", ".join(f"{k} {v}" for k, v in curve["others"].items())
        axis.set_title(
            f"{curve['case']} {others}\nfitted {curve['exponent']:.2f}, "
            f"expected {curve['expected']:g} (dashed)", fontsize=8,
        )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(values, [str(v) for v in values], fontsize=7)
        axis.minorticks_off()
        axis.set_xlabel(curve["letter"], fontsize=8)
        axis.set_ylabel("time, ms", fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        axis.grid(alpha=0.3)
    return _save(figure, folder / "scaling.png")


def _save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
