"""What `fastssl bench` measures, and what it says of it."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from bench_fakes import Fake

from fastssl import cli
from fastssl.bench import bench, cases, compare, measure, read, results, running
from fastssl.bench.baselines import Absent, chosen, library
from fastssl.bench.cases import scaling_cases

ROOT = Path(__file__).parents[1]
SMALL = {"N": [24], "M": [40], "D": [16], "V": [2], "H": [32]}
LETTERS = {"losses": "NMD", "sinkhorn": "NMD", "sigreg": "VNMD", "optim": "N", "augment": "NMH"}
KERNELS = list(LETTERS)
ONCE = {"threads": 1, "seconds": 0.001, "repeats": 1, "baselines": None}


@pytest.fixture
def quick(monkeypatch):
    """Without the bare copies and products of the limits, which take a second each."""
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


def test_what_fails_is_a_result():
    case = fake(ours="fine", one="wrong", two="no memory", three="dies")
    row = running.row(case, **ONCE | {"baselines": ["one", "two", "three"]})
    assert row["failed"]["two"] == row["failed"]["three"] == "out of memory"
    assert row["failed"]["one"].startswith("differs from ours by")
    assert list(row["providers"]) == ["ours"] and row["absent"] == ["absent one"]
    row = running.row(fake(ours="dies", one="fine"), **ONCE | {"baselines": ["one"]})
    assert row["failed"] == {"ours": "out of memory"}


def test_a_fifth_slower_is_told_and_the_same_is_not(monkeypatch, quick):
    generator = torch.Generator().manual_seed(0)

    def measured(ours_ms, drift):
        def in_turn(providers, device, seconds):
            noise = drift * (1 + 0.05 * torch.randn(2, 41, generator=generator).abs())
            return {"ours": (ours_ms * noise[0]).tolist(), "one": (10 * noise[1]).tolist()}

        monkeypatch.setattr(measure, "in_turn", in_turn)
        options = {"threads": 1, "seconds": 1, "repeats": 1, "baselines": ["one"], "apart": False}
        return {"rows": [running.row(fake(ours="fine", one="fine"), **options)]}

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


def test_tables_show_what_is_slower_and_what_is_absent():
    text = results.markdown(changed(2.0))
    assert "| 2.00 |" in text and "absent: apex" in text and "1 MiB | 9 MiB" in text
    assert "**0.80, slower**" in results.markdown(changed(0.8))
    assert "slower" not in results.markdown(changed(0.97))
    two = changed(0.8)
    two["rows"].append(copy.deepcopy(changed(2.0)["rows"][0]) | {"sizes": {"N": 16, "D": 4}})
    assert results.compact(two).count("| clip |") == 2  # the largest, and a slower one
    two["rows"][0] |= changed(1.5)["rows"][0]
    assert results.compact(two).count("| clip |") == 1


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


def test_scaling_fits_the_exponent(tmp_path, monkeypatch):
    sizes = {"N": [2, 4, 8], "D": [4]}
    curves = [("N", 2.0, cases(["losses"], names=["clip"], sizes=sizes, dtypes=["float32"]))]
    monkeypatch.setattr("fastssl.bench.scaling_cases", lambda *_: curves)
    monkeypatch.setattr(
        running, "row",
        lambda case, **_: {"providers": {"ours": {"median_ms": 3 * dict(case.sizes)["N"] ** 1.5}}},
    )  # fmt: skip
    from fastssl.bench import _curves

    (curve,) = _curves(None, "cpu", {})
    assert curve["exponent"] == pytest.approx(1.5) and curve["values"] == [2, 4, 8]
    assert curve["others"] == {"D": 4}


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
