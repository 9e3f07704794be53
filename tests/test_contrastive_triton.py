"""The Triton kernels of `contrastive` against the fp64 reference, on a GPU or interpreted."""

import os

import pytest
import torch
from oracle import assert_no_worse
from torch.nn.functional import normalize

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from fastssl.kernels import contrastive as kernels  # noqa: E402

from fastssl.ops.contrastive import contrastive_bwd_ref, contrastive_fwd_ref  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter's bf16 arithmetic is wrong without a word.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
SIZES = [(1, 1), (2, 3), (7, 5), (33, 17), (130, 257)]
WIDTHS = [1, 7, 64, 96, 100, 128, 384]
DIRECTIONS = [(True, False), (False, True), (True, True)]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def features(rows, D, dtype):
    return normalize(torch.randn(rows, D, device=DEVICE), dim=1).to(dtype)


def integers(high, size):
    return torch.randint(0, high, (size,), device=DEVICE, dtype=torch.int32)


def extras(N, M):
    """ids that leave out some pairs, a bias and a target."""
    ids = integers(max(2, N // 2), N), integers(max(2, N // 2), M)
    return *ids, torch.randn(M, device=DEVICE), integers(M, N)


def problem(q, k, scale, q_ids=None, k_ids=None, bias=None, target=None):
    return q, k, torch.tensor(float(scale), device=DEVICE), q_ids, k_ids, bias, target


def double(args):
    return [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]


def check(args, rows=True, cols=True, symmetric=False, need_dq=True, need_dk=True):
    """Both directions of the op against fp64 and plain torch; returns what the kernels gave."""
    need_dk = need_dk and not symmetric
    flags = rows, cols, symmetric
    got = kernels.contrastive_fwd(*args, *flags)
    exact = contrastive_fwd_ref(*double(args), *flags)
    plain = contrastive_fwd_ref(*args, *flags)
    grads = [torch.randn_like(x) / len(args[0]) for x in got]
    needs = symmetric, need_dq, need_dk
    got += kernels.contrastive_bwd(*args, *got[:2], *grads, *needs)
    exact += contrastive_bwd_ref(*double(args), *exact[:2], *double(grads), *needs)
    plain += contrastive_bwd_ref(*args, *plain[:2], *grads, *needs)
    names = "row_lse", "col_lse", "pos", "dq", "dk", "dscale", "dbias"
    for name, a, b, c in zip(names, got, exact, plain, strict=True):
        assert a.dtype == (args[0].dtype if name in ("dq", "dk") else torch.float32), name
        if name == "dscale":
            check_dscale(a, b, c, args, exact[:3], grads)
            continue
        try:
            assert_no_worse(a.cpu(), b.cpu(), c.cpu(), 3 if name.startswith("d") else 2)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    return got


def check_dscale(got, exact, plain, args, stats, grads):
    """dscale sums terms of both signs, so its floor is that of the terms: each coefficient carries
    the rounding of a log-sum-exp and of a logit."""
    terms = (
        sum(x.abs().sum() for x in grads) * args[0].norm(dim=1).max() * args[1].norm(dim=1).max()
    )
    largest = max([float(x[x.isfinite()].abs().max()) for x in stats if x.isfinite().any()] + [1])
    limit = 3 * (plain - exact).abs() + torch.finfo(torch.float32).eps * largest * terms
    assert (got - exact).abs() <= limit, f"dscale: {got} for {exact}, plain torch {plain}"


@dtypes
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("N, M", SIZES)
def test_sizes(N, M, D, dtype):
    check(problem(features(N, D, dtype), features(M, D, dtype), 10, *extras(N, M)))


@dtypes
@pytest.mark.parametrize("rows, cols", DIRECTIONS)
@pytest.mark.parametrize("given", range(8), ids=lambda g: f"extras{g:03b}")
def test_options(given, rows, cols, dtype):
    q_ids, k_ids, bias, target = extras(40, 70)
    ids = (q_ids, k_ids) if given & 1 else (None, None)
    options = bias if given & 2 else None, target if given & 4 else None
    args = problem(features(40, 48, dtype), features(70, 48, dtype), 10, *ids, *options)
    check(args, rows, cols)


@dtypes
@pytest.mark.parametrize("D", [24, 384])
@pytest.mark.parametrize("N", [1, 2, 7, 130])
def test_symmetric(N, D, dtype):
    z = features(N, D, dtype)
    ids = torch.arange(N, device=DEVICE, dtype=torch.int32)
    args = problem(z, z, 10, ids, ids, None, (ids + N // 2) % N)
    got = check(args, cols=False, symmetric=True)
    both = kernels.contrastive_bwd(
        *args,
        *got[:2],
        torch.ones_like(got[0]),
        got[1],
        -torch.ones_like(got[2]),
        False,
        True,
        True,
    )
    one = kernels.contrastive_bwd(
        *args,
        *got[:2],
        torch.ones_like(got[0]),
        got[1],
        -torch.ones_like(got[2]),
        True,
        True,
        False,
    )
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(one[0], both[0] + both[1], rtol=8 * eps, atol=30 * eps)
    torch.testing.assert_close(one[2], both[2], rtol=1e-5, atol=1e-5)


@dtypes
@pytest.mark.parametrize("D", [32, 384])
@pytest.mark.parametrize("need_dq, need_dk", [(True, False), (False, True), (False, False)])
def test_needs(need_dq, need_dk, D, dtype):
    args = problem(features(40, D, dtype), features(70, D, dtype), 10, *extras(40, 70))
    check(args, need_dq=need_dq, need_dk=need_dk)


@dtypes
def test_several_panels(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "PANEL_ROWS", 128)
    monkeypatch.setattr(kernels, "PANEL_BYTES", 128 * 128 * dtype.itemsize)
    q, k = features(257, 384, dtype), features(130, 384, dtype)
    check(problem(q, k, 10, *extras(257, 130)))


@dtypes
@pytest.mark.parametrize("D", [40, 384])
def test_strided(D, dtype):
    q = features(33, 2 * D, dtype)[:, :D]
    check(problem(q, features(50, 2 * D, dtype)[::2, D:], 10, *extras(33, 25)))
    check(problem(q, features(D, 25, dtype).T, 10, *extras(33, 25)))


@dtypes
@pytest.mark.parametrize("rows, cols", DIRECTIONS)
def test_orthogonal_features(rows, cols, dtype):
    """Scale 100 and features that share nothing but one pair: a fixed maximum would lose them."""
    q, k = torch.eye(150, device=DEVICE).to(dtype).chunk(2)
    k = k.clone()
    k[3] = q[5]
    target = torch.arange(75, device=DEVICE, dtype=torch.int32)
    check(problem(q.contiguous(), k, 100, target=target), rows, cols)


@dtypes
@pytest.mark.parametrize("rows, cols", DIRECTIONS)
def test_large_logits(rows, cols, dtype):
    """Logits in the thousands, many exponents apart. Products of small integers are exact, so the
    comparison does not depend on the order of sums."""
    q, k = torch.randint(-8, 9, (2, 150, 64), device=DEVICE).to(dtype)
    q_ids, k_ids, bias, target = extras(150, 150)
    check(problem(q, k, 4, q_ids, k_ids, None, target), rows, cols)
    check(problem(q / 8, k / 8, 4, None, None, 1000 * bias.round(), target), rows, cols)


@dtypes
@pytest.mark.parametrize("D", [16, 384])
def test_nothing_left(D, dtype):
    """All pairs of a row, of a column, or of everything left out: -inf and no gradient."""
    q, k = features(20, D, dtype), features(30, D, dtype)
    q_ids, k_ids, bias, target = extras(20, 30)
    k_ids[:] = 1
    q_ids[:] = 0
    q_ids[4] = 1
    got = check(problem(q, k, 10, q_ids, k_ids, bias, None))
    assert got[0][4] == -torch.inf and got[0].isneginf().sum() == 1 and not got[3][4].any()
    q_ids[:] = 1
    got = check(problem(q, k, 10, q_ids, k_ids, bias, None))
    assert got[0].isneginf().all() and got[1].isneginf().all()
    assert not any(gradient.any() for gradient in got[3:])


@dtypes
@pytest.mark.parametrize("D", [16, 384])
def test_equal_and_zero_rows(D, dtype):
    q, k = features(20, D, dtype), features(30, D, dtype)
    q[3:9] = q[3]
    k[5:25] = q[3]
    q[11], k[2] = 0, 0
    check(problem(q, k, 100, None, None, None, integers(30, 20)))
    check(problem(q, k, 0, *extras(20, 30)))


@dtypes
@pytest.mark.parametrize("D", [16, 384])
def test_small_gradients(D, dtype):
    """Gradients of a mean over many rows are far below the smallest fp16 number."""
    args = problem(features(60, D, dtype), features(70, D, dtype), 5, *extras(60, 70))
    flags = True, True, False
    row_lse, col_lse, pos = kernels.contrastive_fwd(*args, *flags)
    grads = [torch.rand_like(x) * 1e-5 for x in (row_lse, col_lse, pos)]
    got = kernels.contrastive_bwd(*args, row_lse, col_lse, *grads, False, True, True)
    needs = False, True, True
    exact = contrastive_fwd_ref(*double(args), *flags)
    exact = contrastive_bwd_ref(*double(args), *exact[:2], *double(grads), *needs)
    plain = contrastive_bwd_ref(*args, row_lse, col_lse, *grads, *needs)
    tiny = 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for a, b, c in zip(got, exact, plain, strict=True):
        limit = 3 * (c.double() - b).abs().max() + 1e-6 * b.abs().max()
        assert (a.double() - b).abs().max() <= limit + (tiny if a.dtype == dtype else 0)


@dtypes
@pytest.mark.parametrize("D", [16, 384])
def test_nan(D, dtype):
    q, k = features(40, D, dtype), features(300, D, dtype)
    k[7, 3] = torch.nan
    ids = integers(3, 40), integers(3, 300)
    for args in (problem(q, k, 10), problem(k, q, 10), problem(q, k, 10, *ids)):
        forward = kernels.contrastive_fwd(*args, True, True, False)
        exact = contrastive_fwd_ref(*double(args), True, True, False)
        for a, b in zip(forward, exact, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
        grads = [torch.ones_like(x) for x in forward]
        got = kernels.contrastive_bwd(*args, *forward[:2], *grads, False, True, True)
        exact = contrastive_bwd_ref(*double(args), *exact[:2], *double(grads), False, True, True)
        for a, b in zip(got, exact, strict=True):
            assert (a.isnan() | ~b.isnan()).all()


@dtypes
@pytest.mark.parametrize("D", [64, 384])
def test_repeats_to_the_bit(D, dtype):
    args = problem(features(130, D, dtype), features(257, D, dtype), 10, *extras(130, 257))
    first, second = (kernels.contrastive_fwd(*args, True, True, False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    grads = [torch.randn_like(x) for x in first]
    first, second = (
        kernels.contrastive_bwd(*args, *first[:2], *grads, False, True, True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_target_out_of_range():
    q, k = features(5, 8, torch.float32), features(4, 8, torch.float32)
    target = torch.tensor([0, 4, -1, 3, 1 << 30], device=DEVICE, dtype=torch.int32)
    pos = kernels.contrastive_fwd(*problem(q, k, 1, target=target), True, False, False)[2]
    assert pos.isnan().tolist() == [False, True, True, False, True]
