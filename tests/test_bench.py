"""What `fastssl bench` measures, and what it says of it."""

import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_fakes import Fake

from fastssl import cli
from fastssl.bench import bench, cases, compare, measure, read, results, running, sharded
from fastssl.bench.baselines import Absent, chosen, library
from fastssl.bench.cases import scaling_cases

ROOT = Path(__file__).parents[1]
SMALL = {"N": [24], "M": [40], "D": [16], "V": [2], "H": [32]}
LETTERS = {"losses": "NMD", "sinkhorn": "NMD", "sigreg": "VNMD", "optim": "N", "augment": "NMH"}
KERNELS = list(LETTERS)
ONCE = {"threads": 1, "seconds": 0.001, "baselines": None}


@pytest.fixture
def quick(monkeypatch):
    """Without the limits' bare copies and products and without collections: a second each."""
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)
    monkeypatch.setattr(measure, "bare_copy", lambda device: 1e-10)
    monkeypatch.setattr(measure, "bare_product", lambda work, dtype, device: 1e-3)


@pytest.mark.parametrize("group", KERNELS)
def test_providers_agree(group, quick):
    for case in cases([group], sizes={letter: SMALL[letter] for letter in LETTERS[group]}):
        row = running.row(case, **ONCE, apart=False)
        assert row["failed"] == {}, case
        assert "ours" in row["providers"] and row["ratios"], case
        assert row["speedup"] == min(ratio["ratio"] for ratio in row["ratios"].values())
        assert row["limit_ms"] > 0 and row["traffic_bytes"] > 0


def fake(**what):
    return Fake("losses", "fake", tuple(what.items()), "float32", "cpu")


def test_what_fails_is_a_result(monkeypatch):
    monkeypatch.setattr(running, "PRELOADED", running.__name__)  # no libraries
    case = fake(ours="fine", one="wrong", two="no memory", three="dies", four="fine")
    row = running.row(case, **ONCE | {"baselines": ["one", "two", "three", "four"]})
    assert row["failed"]["two"] == row["failed"]["three"] == "out of memory"
    assert row["failed"]["one"].startswith("differs from ours by")
    assert list(row["providers"]) == ["ours", "four"] and row["absent"] == ["absent one"]
    row = running.row(fake(ours="dies", one="fine"), **ONCE | {"baselines": ["one"]})
    assert row["failed"] == {"ours": "out of memory"}


def test_on_gpus_memory_is_measured_beside_the_times(monkeypatch, quick):
    monkeypatch.setattr(measure, "timed", lambda call, device: len(call()) * 1e-3)
    monkeypatch.setattr(measure, "peak_mib", lambda call, device: {"cuda": 7.0}[device])
    case = dataclasses.replace(fake(ours="fine", one="no memory", two="fine"), device="cuda")
    row = running.row(case, **ONCE | {"baselines": ["one", "two"]}, apart=False)
    assert row["failed"] == {"one": "out of memory"} and list(row["ratios"]) == ["two"]
    assert row["providers"]["two"]["extra_mib"] == 7
    # Whoever has asked for a GPU must not fork, and what is preloaded asks.
    assert running._context("cuda").get_start_method() == "spawn"


def turns(monkeypatch, **ms):
    """Blocks of calls that take so many milliseconds each, by a clock that does not run."""
    calls = []
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)
    monkeypatch.setattr(
        measure, "timed", lambda call, device: calls.append(call()) or ms[calls[-1]] / 1e3
    )
    blocks = measure.in_turn({name: lambda name=name: name for name in ms}, "cpu", seconds=1.0)
    return blocks, calls


def test_rounds_take_turns(monkeypatch):
    blocks, calls = turns(monkeypatch, ours=10, one=40)
    assert len(blocks) == 20 and all(list(map(len, b.values())) == [1, 1] for b in blocks)
    assert calls[:4] == ["ours", "one", "one", "ours"]  # none always comes first
    assert measure.paired(blocks, "one") == pytest.approx([4] * 20)


def test_what_is_slow_has_fewer_turns(monkeypatch):
    blocks, calls = turns(monkeypatch, ours=10, one=20, far=450)
    assert calls.count("far") == len(blocks) == 2
    assert calls.count("ours") == calls.count("one") == 33
    last = len(calls) - 1 - calls[::-1].index("far")
    assert 40 < last < 60  # amid the rounds of its block
    assert measure.paired(blocks, "one") == pytest.approx([2] * 33)
    assert measure.paired(blocks, "far") == pytest.approx([45] * 33)
    assert turns(monkeypatch, ours=10, far=101)[1].count("far") == 9
    assert turns(monkeypatch, ours=10, far=1700)[1].count("far") == 1
    assert turns(monkeypatch, ours=2000, near=10)[1].count("ours") == 1


def test_noise_of_few_runs_is_lent_by_the_group():
    def ratio(*runs, within=0.01):
        return {"ratio": runs[0], "noise": 0.0, "within": within, "runs": list(runs)}

    pairs = [(1.0, 1.04), (2.0, 2.08), (3.0, 3.12), (1.0, 1.0), (1.0, 1.5)]
    rows = [{"group": "losses", "device": "cpu", "ratios": {"one": ratio(*runs)}} for runs in pairs]
    other = {"group": "optim", "device": "cpu", "ratios": {"one": ratio(1.0, 1.0, within=0.07)}}
    results.pool_noise([*rows, other])
    usual, _, _, lucky, unlucky = (row["ratios"]["one"]["noise"] for row in rows)
    assert 0.02 < usual < 0.03 and 0.9 * usual < lucky < usual  # equal runs are no proof
    assert 0.08 < unlucky < 0.12  # its own spread alone would say 0.20
    assert other["ratios"]["one"]["noise"] == 0.07


def test_a_fifth_slower_is_told_and_the_same_is_not(monkeypatch, quick):
    generator = torch.Generator().manual_seed(0)

    def measured(ours_ms, drift):
        def in_turn(providers, device, seconds):
            noise = drift * (1 + 0.05 * torch.randn(41, 2, generator=generator).abs())
            return [{"ours": [ours_ms * a], "one": [10 * b]} for a, b in noise.tolist()]

        monkeypatch.setattr(measure, "in_turn", in_turn)
        options = {"threads": 1, "seconds": 1, "repeats": 2, "baselines": ["one"], "apart": False}
        rows = [running.row(fake(ours="fine", one="fine"), **options)]
        results.pool_noise(rows)
        return {"rows": rows}

    before, after, slower = measured(10, 1.0), measured(10, 2.0), measured(12, 0.7)
    assert compare(before, after)[1] == []  # the machine was half as fast
    table, regressed = compare(before, slower)
    assert len(regressed) == 1 and "**slower**" in table
    assert compare(slower, before)[0].count("faster") == 1


ENVIRONMENT = {
    "device": "a machine", "machine": "a machine", "threads": 2, "cpu_features": ["AVX2"],
    "versions": {"torch": "2", "apex": "absent"}, "date": "2000-01-01", "commit": "abc",
}  # fmt: skip
ROW = {
    "group": "losses", "case": "clip", "sizes": {"N": 8, "D": 4}, "dtype": "float32",
    "device": "cpu", "threads": 2, "rounds": 5, "absent": [], "failed": {},
    "providers": {
        "ours": {"median_ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.1, "extra_mib": 1.0},
        "open_clip ClipLoss": {"median_ms": 4.0, "p20_ms": 3.9, "p80_ms": 4.1, "extra_mib": 9.0},
    },
    "ratios": {"open_clip ClipLoss": {"ratio": 2.0, "noise": 0.01}},
    "best_baseline": "open_clip ClipLoss", "speedup": 2.0, "tflops": 0.1, "flop": 1e9,
    "traffic_bytes": 1e6, "limit_ms": 1.0, "share": 0.5, "product_tflops": 0.2, "copy_gb_s": 20.0,
}  # fmt: skip


def changed(ratio, noise=0.01, **more):
    row = copy.deepcopy(ROW) | more
    row["ratios"]["open_clip ClipLoss"] = {"ratio": ratio, "noise": noise}
    return {"environment": ENVIRONMENT, "rows": [row | {"speedup": ratio}]}


@pytest.mark.parametrize(
    "after, word, told",
    [
        (changed(1.9), "same", False),
        (changed(1.7), "**slower**", True),
        (changed(2.5), "faster", False),
        (changed(1.7, noise=0.1), "too noisy to tell", False),
        (changed(1.2, noise=0.1), "**slower**", True),
        (changed(1.75, noise=0.035), "same", False),
        (changed(2.0, failed={"ours": "out of memory"}), "failed: out of memory", True),
        (changed(2.0, ratios={}), "no baseline in both", False),
    ],
)
def test_comparison(after, word, told):
    if word.startswith("no baseline"):
        after["rows"][0]["ratios"] = {}
    table, regressed = compare(changed(2.0), after)
    assert table.splitlines()[-1].endswith(f"| {word} |") and bool(regressed) == told


def test_a_baseline_of_few_turns_is_no_measure():
    before, after = changed(2.0, noise=0.05), changed(2.0, noise=0.05)
    for result, ratio in ((before, 90.0), (after, 30.0)):
        result["rows"][0]["ratios"]["bitsandbytes"] = {"ratio": ratio, "noise": 0.01}
    assert compare(before, after)[1] == []


def test_a_case_is_judged_by_the_mean_of_its_rows():
    def four(speedup):
        result = changed(speedup, noise=0.04)
        (row,) = result["rows"]
        sizes = [{"N": 2**k, "D": 4} for k in range(4)]
        return result | {"rows": [copy.deepcopy(row) | {"sizes": s} for s in sizes]}

    table, regressed = compare(four(2.0), four(2.0 / 1.2))
    assert table.count("too noisy to tell") == 4 and regressed == ["clip, mean of 4 rows of losses"]
    assert compare(four(2.0), four(2.0))[1] == []


def test_tables_show_what_is_slower_and_what_is_absent():
    text = results.markdown(changed(2.0))
    assert "| 2.00 |" in text and "absent: apex" in text and "1 MiB | 9 MiB" in text
    assert "**0.80, slower**" in results.markdown(changed(0.8))
    assert "slower" not in results.markdown(changed(0.97))
    assert "slower" not in results.markdown(changed(0.9, noise=0.1))
    assert "**0.10 ± 0.06, slower**" in results.markdown(changed(0.1, noise=0.6))
    drifted = changed(1.25)  # medians say 2, the rounds 1.25: one of both is shown
    assert "| open_clip ClipLoss 2.5 ms | 1.25 |" in results.markdown(drifted)
    assert "| 2.00 ± 0.20 |" in results.markdown(changed(2.0, noise=0.1))
    two = changed(0.8)
    two["rows"].append(copy.deepcopy(changed(2.0)["rows"][0]) | {"sizes": {"N": 16, "D": 4}})
    assert results.compact(two).count("| clip |") == 2  # the largest, and a slower one
    two["rows"][0] |= changed(1.5)["rows"][0]
    two["rows"].append(copy.deepcopy(two["rows"][1]) | {"group": "methods", "images_per_s": {}})
    assert results.compact(two).count("| clip |") == 1  # a step of that name is another thing


def test_folder_holds_json_csv_markdown_and_pictures(tmp_path, monkeypatch, quick):
    pytest.importorskip("matplotlib")
    folder = bench(
        ["losses"], names=["clip", "topk"], sizes={"N": [8, 16], "M": [32], "D": [8]},
        out=tmp_path, seconds=0.001, apart=False, threads=1,
    )  # fmt: skip
    found = read(folder)
    assert [row["sizes"]["N"] for row in found["rows"]] == [8, 16] * 3
    assert found["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    lines = (folder / "results.csv").read_text().splitlines()
    assert len(lines) == 7 and lines[0].startswith("group,case,dtype,device,threads")
    for name in ("losses.png", "roofline.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    assert str(tmp_path) not in json.dumps(found)


def test_no_run_is_begun_after_the_time(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 30))  # half a minute between any two looks
    monkeypatch.setattr("fastssl.bench.time.perf_counter", lambda: next(clock))
    ran = []
    monkeypatch.setattr(
        running, "run", lambda case, earlier, **_: ran.append(case.name) or OURS_FAILED
    )
    with pytest.warns(UserWarning, match="3 of 6 runs are left out"):
        bench(["losses"], names=["koleo", "topk"], out=tmp_path, threads=1, minutes=2.5)
    assert ran == ["koleo", "koleo", "topk"]  # each once before any twice


def test_a_time_too_short_for_anything_gives_the_first_run(tmp_path, quick):
    with pytest.warns(UserWarning, match="3 of 4 runs are left out"):
        folder = bench(
            ["losses"], names=["clip"], sizes={"N": [8, 16], "M": [32], "D": [8]},
            dtypes=["float32"], out=tmp_path, seconds=0.001, apart=False, threads=1, minutes=1e-9,
        )  # fmt: skip
    assert [row["sizes"]["N"] for row in read(folder)["rows"]] == [8]


def test_ctrl_c_leaves_the_rows_so_far(tmp_path):
    argv = ["losses", "--case", "clip", "--sizes", "N=8", "--sizes", "D=8", "--dtype", "float32"]
    argv += ["--repeats", "1000", "--seconds", "0.2", "--threads", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastssl.cli", "bench", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        for line in process.stderr:
            if line.startswith("3/1000"):
                break
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and out == ""
    assert err.splitlines()[-2:] == [f"the rows so far are in {tmp_path}", "interrupted"]
    assert "Traceback" not in err
    (row,) = read(tmp_path)["rows"]
    assert row["case"] == "clip" and row["failed"] == {}


OURS_FAILED = {"blocks": [], "memory": {}, "absent": [], "failed": {"ours": "no"}}


def test_scaling_fits_the_exponent(tmp_path, monkeypatch):
    sizes = {"N": [2, 4, 8], "D": [4]}
    curves = [("N", 2.0, cases(["losses"], names=["clip"], sizes=sizes, dtypes=["float32"]))]
    monkeypatch.setattr("fastssl.bench.scaling_cases", lambda *_: curves)
    disturbed = iter([1, 9, 1, 2, 1, 3])  # on the way up, and down

    def median_ms(case):
        return 3 * dict(case.sizes)["N"] ** 1.5 * next(disturbed)

    monkeypatch.setattr(running, "median_ms", median_ms)
    monkeypatch.setattr(sharded, "seconds", lambda *_, world, **__: {"gather": [4.0 / world] * 3})
    monkeypatch.setattr("fastssl.bench.sharded.os.cpu_count", lambda: 6)
    from fastssl.bench import _curves

    against_n, against_w = _curves(None, None, "cpu", {})
    assert against_n["exponent"] == pytest.approx(1.5) and against_n["values"] == [2, 4, 8]
    assert against_n["others"] == {"D": 4}
    assert against_w["exponent"] == pytest.approx(-1) and against_w["values"] == [1, 2, 4]
    text = results.markdown({"environment": ENVIRONMENT, "rows": [], "scaling": [against_n]})
    assert "| clip D 4 | N | 2 | 8 | 1.50 | 2 |" in text
    monkeypatch.setattr(running, "median_ms", lambda case: math.nan)
    assert _curves(["sigreg"], None, "cpu", {}) == []  # did not fit into memory


@pytest.mark.parametrize("case, peer", sharded.PEERS.items())
def test_sharded_losses_agree(case, peer, tmp_path):
    pytest.importorskip(peer.partition(" ")[0])
    params = {"case": case, "N": 16, "D": 8, "dtype": "float32", "world": 1}
    threads = torch.get_num_threads()
    try:
        seconds = sharded._rank(0, str(tmp_path / "store"), params, ["gather", peer], alone=False)
    finally:
        torch.set_num_threads(threads)
    assert {name: len(each) for name, each in seconds.items()} == {"gather": 41, peer: 41}


def test_growing_sizes_are_those_of_cases():
    for letter, exponent, grown in scaling_cases(KERNELS, "cpu"):
        assert exponent > 0 and len({dict(case.sizes)[letter] for case in grown}) == len(grown) >= 4
        assert all(isinstance(case.work(), measure.Work) for case in grown)


def test_short_selection():
    assert all(case.work().flop <= 6e10 for case in cases(KERNELS, short=True))
    for device in ("cpu", "cuda"):
        every, short = cases(device=device), cases(device=device, short=True)
        assert {(c.name, c.dtype) for c in every} == {(c.name, c.dtype) for c in short}
        assert len(short) < len(every)


def test_apex_of_pypi_is_not_nvidias(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", type(sys)("apex"))
    with pytest.raises(Absent):
        library("apex.optimizers")
    assert chosen("lightly NTXentLoss", ["lightly"]) and not chosen("torchao", ["torch"])


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["losess"], "group must be a known one, got 'losess'. Did you mean 'losses'"),
        (["losses", "--case", "clp"], "case must be a known one, got 'clp'. Did you mean 'clip'"),
        (["--sizes", "N"], "--sizes must be like N=256,1024, got 'N'"),
        (
            ["losses", "--sizes", "Q=3"],
            "sizes must be of letters that cases have, D, M, N, got 'Q'",
        ),
        (["losses", "--dtype", "float16"], "nothing fits"),
        (["--seconds", "0"], "seconds must be above 0"),
        (["--minutes", "0"], "minutes must be above 0, got 0"),
        (["--repeats", "0"], "repeats must be at least 1, got 0"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--baselines", "lightley"], "got 'lightley'. Did you mean 'lightly'"),
        (["--device", "tpu"], "device must be cpu, cuda or auto, got 'tpu'"),
        (["augment", "--case", "clip", "--scaling"], "no curve fits groups ['augment']"),
        (["--compare", "nothing", "here"], "no results in nothing"),
    ],
)
def test_errors(arguments, text, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_command_line(tmp_path, capsys):
    assert cli.main(["bench", "sigreg", "--list", "--short", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.count("sigreg    sigreg V=8") == 2
    for name, result in (("a", changed(2.0)), ("b", changed(1.5))):
        results.write(tmp_path / name, result)
    a, b = str(tmp_path / "a"), str(tmp_path / "b" / "results.json")
    assert (
        cli.main(["bench", "--compare", a, a]) == 0 and "no regression" in capsys.readouterr().out
    )
    assert cli.main(["bench", "--compare", a, b]) == 1
    (tmp_path / "c.json").write_text("{}")
    assert cli.main(["bench", "--compare", a, str(tmp_path / "c.json")]) == 2
    assert "must be a results.json of `fastssl bench`" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_pages_show_the_results_files(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tables

    assert tables.page(name) == (ROOT / name).read_text(), "run python benchmarks/tables.py"


def test_a_case_is_a_value():
    (case,) = cases(["sigreg"], sizes={"V": [1], "N": [8], "M": [8], "D": [4]}, dtypes=["float32"])
    assert dataclasses.replace(case) == case and str(case) == "sigreg V=1 N=8 M=8 D=4 float32"
