"""Cases in processes of their own: what one breaks, it breaks for itself alone."""

import dataclasses
import math
import multiprocessing
import signal
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from . import measure
from .baselines import DISTRIBUTIONS, PLAIN, chosen
from .cases import Case

TOLERANCE = {"float32": 2e-4}
"""Largest difference from the baseline, as a share of the largest value; else 5e-2."""
LEAST_MEMORY = 2**20
"""Bytes: below, what others store is no memory to speak of, and is not measured."""


def row(
    case: Case,
    *,
    threads: int,
    seconds: float,
    repeats: int,
    baselines: Sequence[str] | None,
    apart: bool = True,
) -> dict[str, Any]:
    """Measure a case.

    Args:
        threads: of torch. seconds: to spend on the rounds of one process, about.
        repeats: processes that time it one after another: what differs between them is noise too.
        baselines: names, or their first words; None: all but compiled ones on CPUs, where the
            compiler takes longer than the case.
        apart: False: all in this process, one time.

    Returns:
        A row for `results`. What did not fit into memory, or gave other values than the baseline,
        is in its `failed`.
    """
    described = {
        "group": case.group, "case": case.name, "sizes": dict(case.sizes), "dtype": case.dtype,
        "device": case.device, "threads": threads,
    }  # fmt: skip
    if baselines is None and case.device == "cpu":
        baselines = [name for name in (*PLAIN, *DISTRIBUTIONS) if name != "compiled"]
    job = {"case": case, "threads": threads, "seconds": seconds, "baselines": baselines}
    failed: dict[str, str] = {}
    memory: dict[str, float | None] = {}
    if apart and case.device == "cpu":
        memory, failed = _memory_alone(job)
    runs = []
    for _ in range(repeats if apart else 1):
        job |= {"left_out": list(failed), "limited": not runs}
        found = _alone(_time, job) if apart else _time(**job)
        if isinstance(found, str):
            return described | {"failed": {**failed, "ours": found}}
        failed |= found.pop("failed")
        runs.append(found)
    return described | _merged(runs, memory, failed, case)


def _merged(runs: list[dict], memory: dict, failed: dict, case: Case) -> dict[str, Any]:
    first = runs[0]
    providers = {}
    for name in first["times"]:
        times = [t for run in runs for t in run["times"].get(name, ())]
        providers[name] = measure.quantiles(times)
        mib = memory.get(name, first["memory"].get(name))
        if mib is not None:
            providers[name]["extra_mib"] = max(0.0, mib)
    ratios = {name: _ratio(runs, name) for name in providers if name != "ours"}
    ratios = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    found: dict[str, Any] = {
        "providers": providers, "ratios": ratios, "failed": failed, "absent": first["absent"],
        "rounds": sum(len(run["times"].get("ours", ())) for run in runs),
        **first.get("details", {}),
    }  # fmt: skip
    if "ours" not in providers:
        return found
    work, ours = case.work(), providers["ours"]["median_ms"] / 1e3
    if ratios:
        best = min(ratios, key=lambda name: ratios[name]["ratio"])
        found |= {"best_baseline": best, "speedup": ratios[best]["ratio"]}
    if work.flop:
        found["tflops"] = work.flop / ours / 1e12
    elif work.traffic:
        found["gb_s"] = work.traffic / ours / 1e9
    limits = first["limits"]
    if limits["limit_ms"]:
        found |= limits | {"share": limits["limit_ms"] / (1e3 * ours)}
    found["flop"], found["traffic_bytes"] = work.flop, work.traffic
    return found


def _ratio(runs: list[dict], name: str) -> dict[str, float] | None:
    """Time of `name` over ours in the same round: median, and its noise as a share."""
    logs, within = [], []
    for run in runs:
        if name not in run["times"] or "ours" not in run["times"]:
            return None
        pairs = zip(run["times"][name], run["times"]["ours"], strict=True)
        median, noise = measure.median_and_noise([other / ours for other, ours in pairs])
        logs.append(math.log(median))
        within.append(noise)
    mean = sum(logs) / len(logs)
    between = 0.0
    if len(logs) > 1:
        spread = sum((x - mean) ** 2 for x in logs) / (len(logs) - 1)
        between = math.sqrt(spread / len(logs))
    own = math.sqrt(sum(x * x for x in within)) / len(within)
    return {"ratio": math.exp(mean), "noise": max(own, between)}


def _time(
    case: Case, threads: int, seconds: float, baselines, left_out: list[str], limited: bool
) -> dict:
    """In the process that measures: seconds by provider, and if `limited` the machine's limits and
    what else is said of the case."""
    torch.set_num_threads(threads)
    providers, absent, failed = _providers(case, baselines, left_out)
    tolerance = TOLERANCE.get(case.dtype, 5e-2)
    memory = {}
    for name in list(providers):
        try:
            providers[name]()
            if name != "ours" and "ours" in providers:
                own = tolerance if name == next(n for n in providers if n != "ours") else 5e-2
                off = measure.difference(providers["ours"], providers[name])
                if off > own:
                    failed[name] = f"differs from ours by {off:.1e} of the largest value"
            if case.device == "cuda":
                memory[name] = measure.peak_mib(providers[name], "cuda")
        except Exception as error:  # of libraries, of many types
            failed[name] = _reason(error)
        if name in failed:
            del providers[name]
    times = measure.in_turn(providers, case.device, seconds) if providers else {}
    found = {"times": times, "memory": memory, "absent": absent, "failed": failed}
    if not limited:
        return found
    found["limits"] = measure.limits(case.work(), case.dtype, case.device)
    if details := getattr(case.module, "details", None):
        medians = {name: 1e3 * statistics.median(each) for name, each in times.items()}
        found["details"] = details(case.name, providers, medians, case.device, **dict(case.sizes))
    return found


def _providers(case: Case, baselines, left_out: list[str]) -> tuple[dict, list[str], dict]:
    try:
        providers, absent = case.make()
    except Exception as error:  # even the inputs may not fit
        if _reason(error) != "out of memory":
            raise
        return {}, [], {"ours": "out of memory"}
    wanted = {
        name: call
        for name, call in providers.items()
        if name not in left_out and (name == "ours" or chosen(name, baselines))
    }
    return wanted, absent, {}


def _peak(case: Case, threads: int, provider: str | None, baselines=None):
    """In a process of its own: names of all providers, or one's peak in MiB."""
    torch.set_num_threads(threads)
    if provider is None:
        providers, _, failed = _providers(case, baselines, [])
        return failed or list(providers)
    # A small call first: libraries, thread pools and their buffers are not this call's memory.
    small = tuple((k, 64 if k in "NM" else v) for k, v in case.sizes)
    if small != case.sizes:
        dataclasses.replace(case, sizes=small).make()[0][provider]()
    call = case.make()[0][provider]
    if small == case.sizes:
        call()
    return measure.peak_mib(call, case.device)


def peak_alone(case: Case, provider: str, threads: int = 1) -> float | None | str:
    """MiB of a provider's peak memory in a process of its own, or why there is none."""
    return _alone(_peak, {"case": case, "threads": threads, "provider": provider})


def _memory_alone(job: dict) -> tuple[dict[str, float | None], dict[str, str]]:
    """MiB by provider, and what failed; nothing of cases too small."""
    work, large = job["case"].work(), hasattr(job["case"].module, "details")
    if not large and max(4 * work.rows * work.keys, work.traffic) < LEAST_MEMORY:
        return {}, {}
    case, threads = job["case"], job["threads"]
    job = {"case": case, "threads": threads, "baselines": job["baselines"]}
    names = _alone(_peak, job | {"provider": None})
    if isinstance(names, str):
        return {}, {"ours": names}
    if isinstance(names, dict):
        return {}, names
    memory, failed = {}, {}
    for name in names:
        found = peak_alone(case, name, threads)
        if isinstance(found, str):
            failed[name] = found
        else:
            memory[name] = found
    return memory, failed


# ------------------------------------------------------------------------------- own processes


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text[:200]}"


def _context():
    context = multiprocessing.get_context("forkserver")
    # What takes seconds to import is imported once; no threads start by that.
    context.set_forkserver_preload([f"{__package__}.preloaded"])
    return context


def _answer(connection, function, job) -> None:
    try:
        connection.send((True, function(**job)))
    except BaseException as error:  # said by the parent
        connection.send((False, _reason(error)))


def _alone(function, job: dict):
    """function(**job) in a process of its own; a string says why there is no result."""
    context = _context()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, job), daemon=True)
    process.start()
    there.close()
    try:
        _, found = here.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:  # what Linux does where memory is at an end
            return "out of memory"
        return f"ended with exit code {process.exitcode}"
    finally:
        here.close()
        process.join()
    return found
