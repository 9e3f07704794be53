"""The verdict of benchmarks/smoke.py; its runs take minutes, and are not made here."""

import importlib
from pathlib import Path

import pytest

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
        assert resolve(config).epochs and (row.margin >= 8 or row.start or row.needs)


def test_a_low_gain_and_a_collapse_are_faults(smoke):
    healthy = {
        "row": "dino", "data": "patches", "metric": "knn_20", "seed": 0, "before": 50.0,
        "after": 60.0, "gain": 10.0, "margin": 9.0, "train_s": 3.0, "evaluate_s": 1.0,
        "warnings": [], "monitors": {"std": 0.8, "effective_prototypes": 40.0},
    }  # fmt: skip
    assert smoke.faults(healthy) == []
    for changed, said in (
        ({"gain": 8.9}, "a gain of 8.9 points, below 9"),
        ({"warnings": ["12\tthe features are collapsing"]}, "12\tthe features are collapsing"),
        ({"monitors": {"std": 0.25}}, "std 0.25, below 0.3"),
        ({"monitors": {"effective_prototypes": 1.5}}, "1.5 prototypes in use"),
    ):
        assert smoke.faults(healthy | changed) == [said]
    lines = smoke.text([healthy, healthy | {"seed": 1, "gain": 14.0}]).splitlines()
    assert lines[1].split()[:7] == ["dino", "patches", "knn_20", "0", "50.0", "60.0", "10.0"]
    assert lines[3].split()[-4:] == ["12.0", "±", "2.8", "3.5"]
