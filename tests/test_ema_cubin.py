"""The Triton kernel of `ema` compiles without a GPU and does not spill; whole tiles load and store
whole vectors."""

import re

import pytest

pytest.importorskip("triton")
from fastssl.kernels import ema, tables
from test_blockwise_cubin import both, ptx_of


@both
@pytest.mark.parametrize(
    "common", [0, 4 * tables.BF16.value, 5 * tables.BF16.value, 5 * tables.FP16.value]
)
def test_pairs(common, capability, tmp_path):
    known = tables.constants(ema.BLOCK) | {"CHUNK": ema.CHUNK, "COMMON": common}
    ptx = ptx_of(ema.ema_kernel, known, capability, tmp_path)
    loads, stores = (re.findall(rf"{x}\.global\.v4\.b32", ptx) for x in ("ld", "st"))
    assert len(loads) >= 2 and len(stores) >= 1
