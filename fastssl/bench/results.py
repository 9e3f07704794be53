"""A folder of results: results.json, .csv and .md, and what two such files say of each other."""

import csv
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__, extension
from ..train.checkpoint import replacing
from .baselines import versions
from .measure import SLOW

LEAST_CHANGE, SIGMAS = 0.10, 4.0
"""A ratio to the baseline must fall by more than this share, and by more than so many of its
standard errors, to be called a regression."""
LARGEST_NOISE = 0.15
"""Where these standard errors come to more than this share, a small change cannot be seen."""
SCALING = """Time of fastssl, forward and backward, against one growing size: N rows, M keys,
prototypes or slices, D width, and W processes that share the rows, a thread and a core each."""
PRIOR = 4
"""How many runs of its own the spread of a group's others weighs as much as, for a case."""


def machine(device: str | None = None) -> str:
    """This machine in a word: the GPU's name (h200), or the CPU, the widest instructions that torch
    uses of it and its cores; None: the GPU's if there is one."""
    if device != "cpu" and torch.cuda.is_available():
        words = torch.cuda.get_device_name().lower().split()
        return "-".join(word for word in words if word not in ("nvidia", "amd", "gpu"))
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2]
            break
    words = [w for w in model.replace("(R)", "").split() if w[0].isalnum() and w != "CPU"]
    # Virtual machines tell one name for generations of which some lack half of the instructions.
    instructions = torch.backends.cpu.get_cpu_capability()
    return "-".join([*words[:3], instructions, f"{os.cpu_count()}cores"]).lower()


def environment(threads: int | None = None, device: str | None = None) -> dict[str, Any]:
    """What figures depend on beside the code measured."""
    here = Path(__file__).parent
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip()
    except OSError:  # no git
        commit = ""
    return {
        "date": datetime.date.today().isoformat(),
        "fastssl": __version__,
        "commit": commit or "not from a repository",
        "python": platform.python_version(),
        "threads": threads or torch.get_num_threads(),
        "machine": machine(device),
        "device": (
            torch.cuda.get_device_name()
            if device != "cpu" and torch.cuda.is_available()
            else machine("cpu")
        ),
        "cpu_features": extension.cpu_features(),
        "cpu_products": extension.cpu_products()[1],
        "versions": versions(),
    }


def write(folder: Path, result: dict[str, Any]) -> None:
    """results.json, results.csv and results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "results.json") as file:
        file.write(f"{json.dumps(result, indent=1)}\n".encode())
    rows = [flat(row) for row in result["rows"]]
    for curve in result.get("scaling", ()):
        fixed = {"case": curve["case"]} | curve["others"]
        for value, ms in zip(curve["values"], curve["times_ms"], strict=True):
            rows.append(fixed | {curve["letter"]: value, "ours: median_ms": ms})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "results.md").write_text(markdown(result))


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Results by their file or folder.

    Raises:
        FileNotFoundError: no such file. ValueError: a file that holds no results.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"bench: no results in {path}. Give a folder that bench wrote.")
    try:
        result = json.loads(path.read_text())
        if all("ratios" in row or "failed" in row for row in result["rows"]):
            return result
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise ValueError(f"bench: {path} must be a results.json of `fastssl bench`, got another file.")


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row without anything inside anything, for tables."""
    found = {k: v for k, v in row.items() if not isinstance(v, (dict, list))}
    found |= row["sizes"]
    for name, figures in row.get("providers", {}).items():
        found |= {f"{name}: {key}": value for key, value in figures.items()}
    for name, figures in row.get("ratios", {}).items():
        found |= {f"{name}: {key}": value for key, value in figures.items()}
    return found | {f"{name}: failed": why for name, why in row["failed"].items()}


def pool_noise(rows: Iterable[dict[str, Any]]) -> None:
    """Sets the noise of ratios of several runs.

    Two or three runs say little of the spread between runs, so that the cases of a group and device
    lend each other theirs: a case's variance is the mean of its own and of the group's typical one,
    the median over its cases, which counts as `PRIOR` more runs.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        for ratio in row["ratios"].values():
            if len(ratio["runs"]) > 1:
                groups.setdefault((row["group"], row["device"]), []).append(ratio)
    for ratios in groups.values():
        spread = [statistics.variance(math.log(x) for x in ratio["runs"]) for ratio in ratios]
        free = [len(ratio["runs"]) - 1 for ratio in ratios]
        # The median of a variance estimated with so much freedom is below its mean by this factor.
        typical = statistics.median(
            v / (1 - 2 / (9 * k)) ** 3 for v, k in zip(spread, free, strict=True)
        )
        for ratio, own, k in zip(ratios, spread, free, strict=True):
            variance = (PRIOR * typical + k * own) / (PRIOR + k)
            ratio["noise"] = max(ratio["within"], math.sqrt(variance / len(ratio["runs"])))


# -------------------------------------------------------------------------------------- table


def markdown(result: dict[str, Any], groups: Sequence[str] | None = None) -> str:
    """The figures as tables, a group each; rows slower than their best baseline are marked."""
    parts = [provenance(result["environment"])]
    for group in dict.fromkeys(row["group"] for row in result["rows"]):
        if groups is None or group in groups:
            rows = [row for row in result["rows"] if row["group"] == group]
            table = (
                _step_table(rows) if any("images_per_s" in row for row in rows) else _table(rows)
            )
            parts.append(f"### {group}\n\n{table}")
    if result.get("scaling"):
        parts.append(f"### scaling\n\n{SCALING}\n\n{_scaling_table(result['scaling'])}")
    return "\n\n".join(parts) + "\n"


def compact(result: dict[str, Any]) -> str:
    """Of each case and dtype the largest size; and every row slower than a baseline."""
    rows = [row for row in result["rows"] if "images_per_s" not in row]
    largest = {(row["case"], row["dtype"]): row for row in rows}  # sizes ascend
    kept = [
        row for row in rows if row is largest[row["case"], row["dtype"]] or "slower" in verdict(row)
    ]
    return f"{provenance(result['environment'])}\n\n{_table(kept)}"


def provenance(environment: dict[str, Any]) -> str:
    """Machine, threads, versions, date and commit in a sentence."""
    there = {k: v for k, v in environment["versions"].items() if v != "absent"}
    absent = [k for k, v in environment["versions"].items() if v == "absent"]
    text = (
        f"{environment['device']}, {environment['threads']} threads "
        f"({', '.join(environment['cpu_features'])}); "
        + ", ".join(f"{name} {version}" for name, version in there.items())
    )
    text += f"; absent: {', '.join(absent)}" if absent else ""
    return f"{text}. {environment['date']}, commit {environment['commit']}."


def _table(rows: Iterable[dict[str, Any]]) -> str:
    lines = [
        "| case | size | dtype | fastssl | others | against the best | of the machine | "
        "extra memory | the first baseline's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = ", ".join(f"{k} {v}" for k, v in row["sizes"].items())
        providers, times = row.get("providers", {}), times_ms(row)
        others = [f"{name} {_ms(ms)}" for name, ms in times.items() if name != "ours"]
        others += [f"{n} {why}" for n, why in row["failed"].items() if n != "ours"]
        ours = _ms(times["ours"]) if times else row["failed"].get("ours", "")
        first = next((name for name in providers if name != "ours"), None)
        cells = [
            row["case"], size, row["dtype"], ours, ", ".join(others), verdict(row),
            f"{100 * row['share']:.0f} %" if "share" in row else "",
            _mib(providers.get("ours")), _mib(providers.get(first)),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _step_table(rows: list[dict[str, Any]]) -> str:
    """A line a method, backbone and provider."""
    parts = next((row["parts_percent"]["ours"] for row in rows if "parts_percent" in row), ())
    on_gpu = any("largest_batch" in row for row in rows)
    lines = [
        "| method | size | dtype | with | images/s | fastssl's speed-up | of the step: "
        f"{', '.join(parts)} | weights and states | a step's memory above them |"
        f"{' largest batch |' if on_gpu else ''}",
        "|---|---|---|---|---|---|---|---|---|" + "---|" * on_gpu,
    ]
    for row in rows:
        size = ", ".join(f"{k} {v}" for k, v in row["sizes"].items())
        head = f"| {row['case']} | {size} | {row['dtype']} |"
        for name, figures in row.get("providers", {}).items():
            shares = ", ".join(f"{x:.0f} %" for x in row["parts_percent"][name].values())
            images, times = row["images_per_s"]["ours"], ""
            if name != "ours":  # by the rounds' ratio: medians drift apart with the machine
                ratio = row["ratios"][name]["ratio"]
                images /= ratio
                times = verdict(row | {"best_baseline": name, "speedup": ratio})
            cells = [
                "fastssl" if name == "ours" else name, f"{images:.3g}", times, shares,
                f"{row['held_mib'][name]:.0f} MiB", _mib(figures),
            ]  # fmt: skip
            if on_gpu:
                more = " or more" * (name in row.get("larger_not_tried", ()))
                cells.append(f"{row['largest_batch'][name]}{more}")
            lines.append(f"{head} {' | '.join(cells)} |")
        for name, why in row["failed"].items():
            lines.append(f"{head} {name} | {why} | | | | |{' |' * on_gpu}")
    return "\n".join(lines)


def times_ms(row: dict[str, Any]) -> dict[str, float]:
    """By provider, to be shown side by side: ours, and the others' by the ratio to ours in the same
    rounds, since medians of all rounds drift apart with the machine."""
    if "ours" not in row.get("providers", ()):
        return {}
    ours = row["providers"]["ours"]["median_ms"]
    return {"ours": ours} | {n: ours * x["ratio"] for n, x in row["ratios"].items()}


def verdict(row: dict[str, Any]) -> str:
    """How many times as fast as the fastest baseline, with its noise if that is more than 5 %, and
    whether that is slower."""
    if "speedup" not in row:
        return ""
    times = row["speedup"]
    noise = row["ratios"][row["best_baseline"]]["noise"]
    text = f"{times:.2f}" + (f" ± {times * noise:.2f}" if noise > 0.05 else "")
    return f"**{text}, slower**" if times < min(0.95, math.exp(-2 * noise)) else text


def _ms(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def _mib(figures: dict[str, float] | None) -> str:
    return f"{figures['extra_mib']:.0f} MiB" if figures and "extra_mib" in figures else ""


def _scaling_table(curves: list[dict[str, Any]]) -> str:
    lines = [
        "| case | grows | from | to | fitted exponent | expected |",
        "|---|---|---|---|---|---|",
    ]
    for curve in curves:
        others = ", ".join(f"{k} {v}" for k, v in curve["others"].items())
        values = curve["values"]
        lines.append(
            f"| {curve['case']} {others} | {curve['letter']} | {values[0]} | {values[-1]} "
            f"| {curve['exponent']:.2f} | {curve['expected']:g} |"
        )
    return "\n".join(lines)


# ----------------------------------------------------------------------------------- compare


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, list[str]]:
    """What changed beyond the noise of both.

    Machines drift, by a factor of two on shared ones, so what is compared is the time of a baseline
    that both have, of those not far slower than others the one with the least noise, over ours, in
    the same rounds of the same run.

    Returns:
        A table, and what regressed: rows, and cases by the mean of their rows, whose ratio fell by
        more than 10 % and by more than four standard errors; and rows that failed.
    """
    known = {_key(row): row for row in before["rows"]}
    lines, regressed = [], []
    of_cases: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in after["rows"]:
        old = known.pop(_key(row), None)
        if old is None:
            continue
        name = (
            f"{row['case']} {' '.join(f'{k}={v}' for k, v in row['sizes'].items())} {row['dtype']}"
        )
        if "ours" in row["failed"]:
            if "ours" not in old["failed"]:
                regressed.append(name)
            lines.append([name, "", "", "", f"failed: {row['failed']['ours']}"])
            continue
        both = [n for n in row.get("ratios", ()) if n in old.get("ratios", ())]
        if not both:
            lines.append([name, "", "", "", "no baseline in both"])
            continue
        times = {n: row["ratios"][n]["ratio"] for n in both}  # what takes far longer has few turns
        both = [n for n in both if times[n] <= SLOW * min(times.values())]
        noises = {n: math.hypot(old["ratios"][n]["noise"], row["ratios"][n]["noise"]) for n in both}
        steadiest = min(both, key=noises.get)
        was, now = old["ratios"][steadiest]["ratio"], row["ratios"][steadiest]["ratio"]
        change = math.log(now / was)
        of_cases.setdefault((row["group"], row["case"]), []).append((change, noises[steadiest]))
        word = _moved(change, noises[steadiest])
        if "slower" in word:
            regressed.append(name)
        figures = f"{was:.2f}", f"{now:.2f}", f"{100 * math.expm1(change):+.0f} %"
        lines.append([f"{name}, {steadiest}", *figures, word])
    for (group, case), each in of_cases.items():
        if len(each) > 1:  # a row may be too noisy where all of them are not
            changes, noise = zip(*each, strict=True)
            change = statistics.fmean(changes)
            word = _moved(change, math.hypot(*noise) / len(noise))
            name = f"{case}, mean of {len(each)} rows of {group}"
            if "slower" in word:
                regressed.append(name)
            lines.append([name, "", "", f"{100 * math.expm1(change):+.0f} %", word])
    for row in known.values():
        lines.append([f"{row['case']} {row['sizes']}", "", "", "", "not measured again"])
    head = ["case, baseline", "before", "after", "change", "verdict"]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * 5, *lines])
    return table, regressed


def _moved(change: float, noise: float) -> str:
    """A word for the change of a ratio's logarithm, given its standard error."""
    least = max(-math.log(1 - LEAST_CHANGE), SIGMAS * noise)
    if change < -least:
        return "**slower**"
    if change > least:
        return "faster"
    return "same" if SIGMAS * noise <= LARGEST_NOISE else "too noisy to tell"


def _key(row: dict[str, Any]) -> tuple:
    sizes = tuple(sorted(row["sizes"].items()))
    return row["group"], row["case"], sizes, row["dtype"], row["device"]


def command() -> str:
    """How this process was called, without paths of this machine."""
    return " ".join(["fastssl", *sys.argv[1:]]) if sys.argv else "fastssl"
