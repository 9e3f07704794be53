"""The verdict of benchmarks/smoke.py; its runs take minutes, and are not made here."""

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastssl.config import PretrainConfig
from fastssl.methods.recipes import resolve


@pytest.fixture
def smoke(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("smoke")


def test_rows_are_settings_that_can_run(smoke):
    for name, row in smoke.ROWS.items():
        config = PretrainConfig(method=row.method or name, data=row.data, **row.settings)
        assert resolve(config).epochs and row.margin >= 8


HEALTHY = {
    "row": "dino", "data": "patches", "metric": "knn_20", "seed": 0, "before": 50.0,
    "after": 60.0, "gain": 10.0, "margin": 9.0, "train_s": 3.0, "evaluate_s": 1.0,
    "warnings": [], "monitors": {"std": 0.8, "effective_prototypes": 40.0},
}  # fmt: skip


def test_a_low_gain_and_a_collapse_are_faults(smoke):
    assert smoke.faults(HEALTHY) == []
    for changed, said in (
        ({"gain": 8.9}, "a gain of 8.9 points, below 9"),
        ({"warnings": ["12\tthe features are collapsing"]}, "12\tthe features are collapsing"),
        ({"monitors": {"std": 0.25}}, "std 0.25, below 0.3"),
        ({"monitors": {"effective_prototypes": 1.5}}, "1.5 prototypes in use"),
    ):
        assert smoke.faults(HEALTHY | changed) == [said]


def test_results_hold_every_row_and_seed(smoke, monkeypatch, tmp_path, capsys):
    def tried(name, seed, out):
        result = HEALTHY | {"row": name, "seed": seed, "gain": 10.0 + 4 * seed}
        return result | {"faults": smoke.faults(result)}

    monkeypatch.setattr(smoke, "tried", tried)
    monkeypatch.setattr(smoke, "ProcessPoolExecutor", lambda n, **_: ThreadPoolExecutor(n))
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["smoke.py", "--seeds", "0", "1"])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert smoke.main() == 0
    rows = json.loads((tmp_path / "smoke.json").read_text())["rows"]
    each = [(name, seed) for name in smoke.ROWS for seed in (0, 1)]
    assert [(row["row"], row["seed"]) for row in rows] == each
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index("") + 1 :]
    assert table[1].split()[:7] == ["simclr", "patches", "knn_20", "0", "50.0", "60.0", "10.0"]
    assert table[1 + len(rows)].split()[-4:] == ["12.0", "±", "2.8", "3.5"]
