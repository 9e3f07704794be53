"""Results as text, aligned for a terminal."""

from typing import Any


def table(results: dict[str, dict[str, Any]]) -> str:
    """Lines of numbers, one column for each key of `results`, for instance random and pretrained.

    Args:
        results: what `evaluate` returned, by the name of its column. With two columns a third
            one, the gap from the first to the second in percentage points, is added.
    """
    columns = list(results)
    rows = []  # protocol, metric, cells
    for protocol in results[columns[0]]:
        of = [results[column][protocol] for column in columns]
        for metric in of[0].get("top1_percent", ()):
            values = [result["top1_percent"][metric] for result in of]
            gap = [f"{values[1] - values[0]:+.1f}"] if len(columns) == 2 else []
            rows.append((protocol, metric, _cells(of, "top1_percent", metric) + gap))
        for metric in of[0].get("percent", ()):
            rows.append((protocol, f"{metric}, %", _cells(of, "percent", metric)))
        for metric, value in of[0].items():
            if isinstance(value, float):
                spread = [result.get("sd", {}).get(metric) for result in of]
                cells = [
                    f"{result[metric]:.2f}" + ("" if sd is None else f" ± {sd:.2f}")
                    for result, sd in zip(of, spread, strict=True)
                ]
                rows.append((protocol, metric, cells))
    metrics = [metric for _, metric, _ in rows]
    lines = [["top-1, %", *columns, *(["gap"] if len(columns) == 2 else [])]]
    for protocol, metric, cells in rows:
        name = f"{protocol}: {metric}" if metrics.count(metric) > 1 else metric
        lines.append([name, *cells, *[""] * (len(lines[0]) - 1 - len(cells))])
    return align(lines)


def align(rows: list[list[str]], left: int = 1) -> str:
    """Text of a table: the first `left` columns to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:left], widths[:left], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cells(results: list[dict[str, Any]], kind: str, metric: str) -> list[str]:
    cells = []
    for result in results:
        sd = result.get("sd_percent", {}).get(metric)
        cells.append(f"{result[kind][metric]:.1f}" + ("" if sd is None else f" ± {sd:.1f}"))
    return cells
