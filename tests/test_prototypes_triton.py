"""The Triton kernels of `prototypes` against the fp64 reference, on a GPU or interpreted."""

import pytest
import torch
from fastssl.kernels import prototypes as kernels
from triton_cases import DEVICE, DTYPES, dtypes, features, no_worse, same_bits

from fastssl.ops import sinkhorn
from fastssl.ops.prototypes import sinkhorn_codes_ref, sinkhorn_pass_ref

SIZES = [(1, 1), (2, 3), (7, 5), (33, 17), (130, 257), (70, 1030), (9, 3000), (3, 5000)]
ways = pytest.mark.parametrize("way", ["rows", "columns"])
SCALE = 20.0
LSE = kernels.lse_constants()


@pytest.fixture
def choose(monkeypatch):
    """Whether passes with a bias and codes run by rows or, as for wider K, by columns."""
    return lambda way: monkeypatch.setattr(
        kernels, "WIDEST_IN_REGISTERS", 2**20 if way == "rows" else 0
    )


def problem(B, K, dtype, D=32):
    scores = (features(B, D, torch.float32) @ features(K, D, torch.float32).T).to(dtype)
    return scores, -SCALE * torch.rand(K, device=DEVICE)


def check(scores, bias, scale=SCALE):
    exact, results = scores.double(), {}
    for name, run, ref, by in (
        ("first pass", kernels.sinkhorn_pass, sinkhorn_pass_ref, None),
        ("pass", kernels.sinkhorn_pass, sinkhorn_pass_ref, bias),
        ("codes", kernels.sinkhorn_codes, sinkhorn_codes_ref, bias),
    ):
        got, plain = run(scores, scale, by), ref(scores, scale, by)
        assert got.dtype == torch.float32
        # What rounding the logits may cost, which plain torch has by chance at one row or column.
        logits = float((scores.double() * scale).abs().max() + bias.abs().max())
        magnitude = logits if name != "codes" else logits * float(plain.max())
        no_worse(name, got, ref(exact, scale, by), plain, magnitude=magnitude)
        results[name] = got
    return results


@dtypes
@ways
@pytest.mark.parametrize("B, K", SIZES)
def test_sizes(B, K, way, dtype, choose):
    choose(way)
    check(*problem(B, K, dtype))


@dtypes
@pytest.mark.parametrize("K", [16384, 16385, 40000])
def test_what_the_dispatch_picks(K, dtype):
    check(*problem(5, K, dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@ways
@pytest.mark.parametrize("programs", [1, 3, 50])
def test_splits(programs, way, dtype, choose, monkeypatch):
    """Without a split, and merged from a few and from more than one block of parts."""
    asked = []

    def splits_of(x, rows, columns, groups, known):
        tiles = -(-columns // known["BLOCK_M"])
        each = -(-tiles // programs)
        asked.append(-(-tiles // each))
        return -(-rows // known["BLOCK_N"]), asked[-1], each * known["BLOCK_M"]

    choose(way)
    monkeypatch.setattr(kernels, "splits_of", splits_of)
    monkeypatch.setattr(kernels, "lse_constants", lambda: LSE | {"BLOCK_B": 64, "BLOCK_K": 16})
    check(*problem(4300, 20, dtype))
    check(*problem(90, 1700, dtype))
    assert (max(asked) > 32) == (programs == 50) and (max(asked) == 1) == (programs == 1)


@dtypes
@ways
def test_strided(way, dtype, choose):
    choose(way)
    scores, bias = problem(33, 100, dtype)
    expected = check(scores, bias)
    for other in (torch.cat([scores] * 2, 1)[:, 100:], scores.repeat_interleave(2, 0)[::2]):
        for name, got in check(other, bias).items():
            assert torch.equal(got, expected[name]), name
    check(scores.T.contiguous().T, bias)


@dtypes
@ways
def test_large_logits(way, dtype, choose):
    """Logits of hundreds, where an exponential of its own would overflow."""
    choose(way)
    scores = (40 * torch.rand(64, 100, device=DEVICE) - 20).to(dtype)
    check(scores, 300 - kernels.sinkhorn_pass(scores, 25.0, None), 25.0)


@dtypes
@ways
def test_what_is_not_finite(way, dtype, choose):
    choose(way)
    scores, bias = problem(40, 70, dtype)
    scores[:, 3], scores[5, 4] = -torch.inf, -torch.inf
    results = check(scores, bias)
    assert results["pass"].isneginf().nonzero().tolist() == [[3]]
    for bad in (torch.nan, torch.inf):
        scores[7, 9] = bad
        codes = kernels.sinkhorn_codes(scores, SCALE, bias)
        assert torch.equal(codes.isnan().all(1), torch.arange(40, device=DEVICE) == 7), bad
        assert torch.equal(codes.isnan().any(1), torch.arange(40, device=DEVICE) == 7), bad
        assert kernels.sinkhorn_pass(scores, SCALE, bias).isnan().all()
        first = kernels.sinkhorn_pass(scores, SCALE, None).isfinite()
        assert not first[9] and first[10:].all()
    scores[7] = -torch.inf
    assert kernels.sinkhorn_codes(scores, SCALE, bias).isnan().any(1).nonzero().tolist() == [[7]]


@dtypes
@ways
def test_no_rows(way, dtype, choose):
    choose(way)
    scores, bias = problem(3, 6, dtype)
    for by in (None, bias):
        assert kernels.sinkhorn_pass(scores[:0], SCALE, by).isneginf().all()
    assert kernels.sinkhorn_codes(scores[:0], SCALE, bias).shape == (0, 6)


@dtypes
@ways
def test_repeats_to_the_bit(way, dtype, choose):
    choose(way)
    scores, bias = problem(200, 300, dtype)
    assert same_bits(
        lambda: (
            kernels.sinkhorn_pass(scores, SCALE, None),
            kernels.sinkhorn_pass(scores, SCALE, bias),
            kernels.sinkhorn_codes(scores, SCALE, bias),
        )
    )


@dtypes
def test_three_iterations(dtype):
    """The passes put together, against the op's own path in fp64."""
    scores = problem(50, 130, dtype)[0]
    bias = -kernels.sinkhorn_pass(scores, SCALE, None)
    for _ in range(2):
        bias = bias - kernels.sinkhorn_pass(scores, SCALE, bias)
    true = sinkhorn(scores.double(), 1 / SCALE)
    assert (kernels.sinkhorn_codes(scores, SCALE, bias) - true).abs().max() <= 3e-6 * true.max()
