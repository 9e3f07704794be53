"""Results as text, aligned for a terminal."""

from typing import Any


def table(results: dict[str, dict[str, Any]]) -> str:
    """Lines of numbers, one column for each key of `results`, for instance random and pretrained.

    Args:
        results: what `evaluate` returned, by the name of its column. With two columns a third
            one, the gap from the first to the second in percentage points, is added.
    """
    columns = list(results)
    first = results[columns[0]]
    rows = [["top-1, %", *columns, *(["gap"] if len(columns) == 2 else [])]]
    for protocol, result in first.items():
        for metric in result.get("top1_percent", ()):
            values = [results[column][protocol]["top1_percent"][metric] for column in columns]
            cells = [
                f"{value:.1f}{_spread(results[column][protocol], metric)}"
                for value, column in zip(values, columns, strict=True)
            ]
            gap = [f"{values[1] - values[0]:+.1f}"] if len(columns) == 2 else []
            rows.append([metric, *cells, *gap])
    no_gap = [""] if len(columns) == 2 else []
    for metric in first.get("retrieval", {}).get("percent", ()):
        cells = [f"{results[column]['retrieval']['percent'][metric]:.1f}" for column in columns]
        rows.append([f"{metric}, %", *cells, *no_gap])
    for metric in first.get("diagnostics", ()):
        if metric != "protocol":
            cells = [f"{results[column]['diagnostics'][metric]:.2f}" for column in columns]
            rows.append([metric, *cells, *no_gap])
    return align(rows)


def align(rows: list[list[str]], left: int = 1) -> str:
    """Text of a table: the first `left` columns to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:left], widths[:left], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _spread(result: dict[str, Any], metric: str) -> str:
    return f" ± {result['sd_percent'][metric]:.1f}" if "sd_percent" in result else ""
