"""The Triton kernel of `ema` compiles without a GPU and does not spill; whole tiles load and store
whole vectors."""

import re

import pytest

pytest.importorskip("triton")
from fastssl.kernels import blockwise, ema
from test_blockwise_cubin import both, ptx_of


@both
@pytest.mark.parametrize(
    "common", [0, 4 * blockwise.BF16.value, 5 * blockwise.BF16.value, 5 * blockwise.FP16.value]
)
def test_pairs(common, capability, tmp_path):
    known = blockwise.constants(ema.BLOCK) | {"CHUNK": ema.CHUNK, "COMMON": common}
    ptx = ptx_of(ema.ema_kernel, known, capability, tmp_path)
    loads, stores = (re.findall(rf"{x}\.global\.v4\.b32", ptx) for x in ("ld", "st"))
    assert len(loads) >= 2 and len(stores) >= 1
