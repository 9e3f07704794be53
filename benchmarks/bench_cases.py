"""The cases of `fastssl bench` under pytest-benchmark, which keeps and compares its own records:

pytest benchmarks/bench_cases.py -k "clip and float32"
"""

import pytest
import torch

from fastssl.bench import cases, running

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("case", cases(device=DEVICE), ids=str)
def test_case(benchmark, case):
    row = running.row(
        case, threads=torch.get_num_threads(), seconds=1.0, repeats=1, baselines=None, apart=False
    )
    assert "ours" not in row["failed"], row["failed"]
    ours = case.make()[0]["ours"]
    benchmark.pedantic(ours, rounds=row["rounds"], warmup_rounds=1)
    benchmark.extra_info.update(row)
