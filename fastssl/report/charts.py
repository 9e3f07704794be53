"""Line charts and scatter plots as SVG inside a page, in the page's colours, without a library."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from torch import Tensor

COLOURS = 8
"""The page's style sheet has --c0 to --c7; further series are dashed."""
_WIDTH, _HEIGHT = 560, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 8, 38
_MOST_POINTS = 400


class Series(NamedTuple):
    """One line. y that is not a finite number is left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    note: str = "",
    log: bool = False,
    percent: bool = False,
    zero: bool = False,
    last: bool = True,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A figure, or "" if no series has a point.

    Args:
        title, x_label, y_label, note: text; it is escaped. The note stands below the chart.
        log: a logarithmic y axis; values <= 0 are left out.
        percent: y are shares of 1, shown in %.
        zero: the y axis, then not logarithmic, begins at 0.
        last: name the lines with their last value.
        marks: dashed horizontal lines (y, text).
    """
    lines = [(number, s.name, _points(s, log)) for number, s in enumerate(series)]
    lines = [line for line in lines if line[2]]  # the others keep their colours
    if not lines:
        return ""
    scale = 100.0 if percent else 1.0
    ys = [y for *_, points in lines for _, y in points] + [y for y, _ in marks]
    xs = [x for *_, points in lines for x, _ in points]
    x_axis = _Axis(min(0, *xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    low, margin = (min(0.0, *ys), 0.0) if zero else (min(ys), 0.04)
    y_axis = _Axis(low * scale, max(ys) * scale, _HEIGHT - _BOTTOM, _TOP, log=log, margin=margin)
    y_label += " (%)" if percent else ""
    parts = [_frame(x_axis.ticks(7, least=1), x_axis, y_axis, x_label, y_label)]
    for y, text in marks:
        v = y_axis(y * scale)
        parts.append(f'<path class="mark" d="M{_LEFT} {v:.1f}H{_WIDTH - _RIGHT}"/>')
        below = v < _TOP + 16
        parts.append(
            f'<text x="{_WIDTH - _RIGHT}" y="{v + (13 if below else -4):.1f}" '
            f'text-anchor="end">{escape(text)}</text>'
        )
    legend = []
    for number, name, points in lines:
        path = "L".join(f"{x_axis(x):.1f} {y_axis(y * scale):.1f}" for x, y in points)
        colour = f"var(--c{number % COLOURS})"
        dash = ' stroke-dasharray="5 3"' if number >= COLOURS else ""
        if len(points) == 1:
            path += "h0"  # a dot
        parts.append(f'<path class="line" stroke="{colour}"{dash} d="M{path}"/>')
        value = points[-1][1] * scale
        text = f"{value:.1f}%" if percent else _number(value)
        legend.append((colour, name, text if last else ""))
    return _figure(title, legend, parts, note)


def scatter(
    title: str, points: Tensor, y: Tensor, class_names: Sequence[str], x_label: str, y_label: str
) -> str:
    """Points (N, 2) coloured by their label y (N,); -1 is grey. Ten colours, then other shapes."""
    xs, ys = points.T.tolist()
    x_axis = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, margin=0.03)
    height = 420
    y_axis = _Axis(min(ys), max(ys), height - _BOTTOM, _TOP, margin=0.03)
    parts, legend = [_frame(x_axis.ticks(7), x_axis, y_axis, x_label, y_label, height)], []
    for c in sorted({*y.tolist()}):
        chosen = [i for i, label in enumerate(y.tolist()) if label == c]
        dots = "".join(f"M{x_axis(xs[i]):.1f} {y_axis(ys[i]):.1f}h0" for i in chosen)
        colour = "var(--grey)" if c < 0 else f"var(--k{c % 10})"
        shape = "square" if c >= 0 and c // 10 % 2 else "round"
        parts.append(f'<path class="dots" stroke="{colour}" stroke-linecap="{shape}" d="{dots}"/>')
        name = "without label" if c < 0 else str(class_names[c])
        legend.append((colour, name, ""))
    note = ""
    if len(legend) > 20:
        legend, note = [], f"{len(legend)} classes: colours repeat."
    return _figure(title, legend, parts, note, height)


class _Axis:
    """Values to pixels, and the values that get a tick."""

    def __init__(self, low, high, start, end, *, log: bool = False, margin: float = 0.0):
        self._log = log
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-9 * max(abs(high), abs(low), 1e-300):
            pad = abs(high) * 0.1 or 1.0
            low, high = low - pad, high + pad
        pad = margin * (high - low)
        self._low, self._high = low - pad, high + pad
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self._log else value
        share = (value - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self, count: int = 5, least: float = 0.0) -> list[float]:
        """About `count` round values, at least `least` apart."""
        low, high = self._low, self._high
        if self._log and high - low > 0.7:
            mantissas = (1,) if high - low > 2 else (1, 2, 5)
            powers = range(math.floor(low), math.ceil(high) + 1)
            thin = math.ceil(len(powers) / 7)
            values = [m * 10.0**p for p in powers if p % thin == 0 for m in mantissas]
            return [v for v in values if low - 1e-9 <= math.log10(v) <= high + 1e-9]
        if self._log:
            low, high = 10**low, 10**high
        raw = (high - low) / count
        unit = 10.0 ** math.floor(math.log10(raw))
        step = max(least, next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw))
        first = math.ceil(low / step - 1e-9)
        return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _points(series: Series, log: bool) -> list[tuple[float, float]]:
    """Finite points; of very many, means over equal numbers of them."""
    pairs = zip(series.x, series.y, strict=True)
    points = [(x, y) for x, y in pairs if y is not None and math.isfinite(y) and (y > 0 or not log)]
    size = math.ceil(len(points) / _MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _frame(
    x_ticks: list[float],
    x_axis: _Axis,
    y_axis: _Axis,
    x_label: str,
    y_label: str,
    height: int = _HEIGHT,
) -> str:
    bottom, right = height - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in y_axis.ticks():
        v = y_axis(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {v:.1f}H{right}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{v + 4:.1f}" text-anchor="end">{_tick(tick)}</text>'
        )
    for tick in x_ticks:
        v = x_axis(tick)
        parts.append(f'<path class="axis" d="M{v:.1f} {bottom}v4"/>')
        parts.append(
            f'<text x="{v:.1f}" y="{bottom + 16}" text-anchor="middle">{_tick(tick)}</text>'
        )
    middle = (_TOP + bottom) / 2
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(
        f'<text x="{(_LEFT + right) / 2}" y="{height - 5}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _tick(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:g}{unit}"
    return f"{value:.6g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.3g}"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def _figure(title, legend, parts, note: str, height: int = _HEIGHT) -> str:
    keys = ""
    if legend:
        keys = "".join(
            f'<li><i style="background:{colour}"></i>{escape(name)} <b>{escape(value)}</b></li>'
            for colour, name, value in legend
        )
        keys = f"<ul>{keys}</ul>"
    note = f"<p>{escape(note)}</p>" if note else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{keys}"
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>{note}</figure>"
    )
