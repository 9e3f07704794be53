"""Cases in processes of their own: what one breaks, it breaks for itself alone."""

import dataclasses
import math
import multiprocessing
import signal
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import measure
from .baselines import DISTRIBUTIONS, PLAIN, chosen
from .cases import Case

TOLERANCE = {"float32": 2e-4}
"""Largest difference from the baseline, as a share of the largest value; else 5e-2."""
PRELOADED = f"{__package__}.preloaded"
LEAST_MEMORY = 2**22
"""Bytes: below, what others store is no memory to speak of, and is not measured."""


def row(case: Case, *, threads: int, repeats: int = 1, **options) -> dict[str, Any]:
    """Measure a case, in `repeats` runs one after another. The other options are those of `run`."""
    runs: list[dict] = []
    for _ in range(repeats):
        runs.append(run(case, runs, threads=threads, **options))
    return merged(case, runs, threads)


def run(
    case: Case,
    earlier: Sequence[dict],
    *,
    threads: int,
    seconds: float,
    baselines: Sequence[str] | None,
    apart: bool = True,
) -> dict[str, Any]:
    """Time a case once.

    Args:
        earlier: runs of the same case. What failed there is left out; the first measures memory and
            the machine's limits as well.
        threads: of torch. seconds: to spend on rounds, about.
        baselines: names, or their first words; None: all but compiled ones on CPUs, where the
            compiler takes longer than the case.
        apart: in a process of its own, and each provider whose memory is wanted in another; False:
            in this one.

    Returns:
        What `merged` makes a row of.
    """
    if baselines is None and case.device == "cpu":
        baselines = [name for name in (*PLAIN, *DISTRIBUTIONS) if name != "compiled"]
    failed = {name: why for one in earlier for name, why in one["failed"].items()}
    job = {"case": case, "threads": threads, "seconds": seconds, "baselines": baselines}
    job |= {"limited": not earlier, "apart": apart}
    while "ours" not in failed:
        job["left_out"] = list(failed)
        try:
            found = _alone(_time, job) if apart else _time(**job, at=lambda name: None)
        except Died as error:  # the others may live
            failed[error.provider] = error.why
            continue
        failed |= found.pop("failed")
        if apart and case.device == "cpu" and not earlier:
            found["memory"] = _memory_alone(case, found["blocks"], threads)
        return found | {"failed": failed}
    return {"blocks": [], "memory": {}, "absent": [], "failed": failed}


def merged(case: Case, runs: Sequence[dict], threads: int) -> dict[str, Any]:
    """A row for `results` of a case's runs. What did not fit into memory, or gave other values than
    the baseline, is in its `failed`."""
    failed = {name: why for one in runs for name, why in one["failed"].items()}
    first = runs[0]
    names = [name for name in (first["blocks"] or [{}])[0] if name not in failed]
    providers = {}
    for name in names:
        providers[name] = measure.quantiles([t for one in runs for t in _times(one, name)])
        mib = first["memory"].get(name)
        if mib is not None:
            providers[name]["extra_mib"] = max(0.0, mib)
    found: dict[str, Any] = {
        "group": case.group, "case": case.name, "sizes": dict(case.sizes), "dtype": case.dtype,
        "device": case.device, "threads": threads, "providers": providers, "failed": failed,
        "absent": first["absent"], **first.get("details", {}),
    }  # fmt: skip
    if "ours" not in providers:
        return found | {"ratios": {}}
    ratios = {name: _ratio(runs, name) for name in names[1:]}
    found |= {"ratios": ratios, "rounds": sum(len(_times(one, "ours")) for one in runs)}
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


def median_ms(case: Case, **options) -> float:
    """Of ours alone, without limits or memory; nan where it failed."""
    one = run(case, [{"failed": {}}], baselines=[], **options)
    return 1e3 * statistics.median(_times(one, "ours") or [math.nan])


def _times(one: dict, name: str) -> list[float]:
    return [t for block in one["blocks"] for t in block[name]]


def _ratio(runs: Sequence[dict], name: str) -> dict[str, Any]:
    """Time of `name` over ours: the mean of the runs' medians of pairs; these; and the noise of
    that mean as a share, by the spread of the pairs or, if it is larger, by that of the runs."""
    medians, within = [], []
    for one in runs:
        calls = min(len(_times(one, name)), len(_times(one, "ours")))
        median, noise = measure.median_and_noise(measure.paired(one["blocks"], name), calls)
        medians.append(median)
        within.append(noise)
    logs = [math.log(x) for x in medians]
    own = math.hypot(*within) / len(within)
    between = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    ratio = math.exp(statistics.fmean(logs))
    return {"ratio": ratio, "noise": max(own, between), "within": own, "runs": medians}


# --------------------------------------------------------------------- in the measuring process


def _time(
    case: Case, threads: int, seconds: float, baselines, left_out: list[str], limited: bool,
    apart: bool, at: Callable[[str], None],
) -> dict:  # fmt: skip
    """Seconds in blocks; if `limited` the machine's limits and what else is said of the case. If
    `apart` the process is its own, and keeps what memory it frees."""
    if apart:
        measure.keep_memory()
    torch.set_num_threads(threads)
    providers, absent, failed = _providers(case, baselines, left_out)
    baseline = next((name for name in providers if name != "ours"), None)
    memory, expected = {}, ()
    for name, call in list(providers.items()):
        at(name)
        try:
            outputs = call()
            if name == "ours":
                expected = outputs
            tolerance = TOLERANCE.get(case.dtype, 5e-2) if name == baseline else 5e-2
            off = measure.difference(expected, outputs)
            if off > tolerance:
                failed[name] = f"differs from ours by {off:.1e} of the largest value"
            if case.device == "cuda":
                memory[name] = measure.peak_mib(call, "cuda")
        except Exception as error:  # of libraries, of many types
            failed[name] = _reason(error)
        if name in failed:
            del providers[name]
            if case.device == "cuda":
                torch.cuda.empty_cache()
    at("ours")
    del expected, outputs
    blocks = measure.in_turn(providers, case.device, seconds) if "ours" in providers else []
    found = {"blocks": blocks, "memory": memory, "absent": absent, "failed": failed}
    if not limited or not blocks:
        return found
    found["limits"] = measure.limits(case.work(), case.dtype, case.device)
    if details := getattr(case.module, "details", None):
        medians = {name: 1e3 * statistics.median(_times(found, name)) for name in providers}
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


def _peak(case: Case, provider: str, threads: int, at: Callable[[str], None]) -> float | None:
    torch.set_num_threads(threads)
    at(provider)
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
    try:
        return _alone(_peak, {"case": case, "provider": provider, "threads": threads})
    except Died as error:
        return error.why


def _memory_alone(case: Case, blocks: list[dict], threads: int) -> dict[str, float | None]:
    """MiB of ours, the first baseline and the fastest; nothing of cases too small to tell."""
    work, large = case.work(), hasattr(case.module, "details")
    if not blocks or not large and max(4 * work.rows * work.keys, work.traffic) < LEAST_MEMORY:
        return {}
    ours, *others = blocks[0]
    fastest = sorted(others, key=lambda name: min(t for b in blocks for t in b[name]))
    memory = {
        name: peak_alone(case, name, threads)
        for name in dict.fromkeys([ours, *others[:1], *fastest[:1]])
    }
    return {name: mib for name, mib in memory.items() if not isinstance(mib, str)}


# ------------------------------------------------------------------------------- own processes


class Died(Exception):
    """A measuring process without a result: at which provider, and why."""

    def __init__(self, provider: str, why: str):
        super().__init__(f"{provider}: {why}")
        self.provider, self.why = provider, why


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text[:200]}"


def _context(device: str):
    if device == "cuda":  # whose driver does not survive a fork of who has asked for it
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # What takes seconds to import is imported once; no threads start by that.
    context.set_forkserver_preload([PRELOADED])
    return context


def _answer(connection, function, job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    try:
        found = function(**job, at=lambda name: connection.send(("at", name)))
        connection.send(("found", found))
    except BaseException as error:  # said by the parent
        connection.send(("failed", _reason(error)))


def _alone(function, job: dict):
    """function(**job) in a process of its own. Raises: Died."""
    context = _context(job["case"].device)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, job), daemon=True)
    process.start()
    there.close()
    at = "ours"
    try:
        while True:
            kind, what = here.recv()
            if kind == "found":
                return what
            if kind == "failed":
                raise Died(at, what)
            at = what
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:  # what Linux does where memory is at an end
            raise Died(at, "out of memory") from None
        raise Died(at, f"ended with exit code {process.exitcode}") from None
    except KeyboardInterrupt:
        process.kill()  # a call may take long
        raise
    finally:
        here.close()
        process.join()
