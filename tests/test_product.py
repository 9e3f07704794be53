"""The passes that the losses on whole products share, against plain torch, on every path."""

import pytest
import torch
from oracle import assert_no_worse

from fastssl.ops import gram, neighbours
from fastssl.ops.product import product, product_

ops = torch.ops.fastssl
SIZES = [
    (1, 5, 7),
    (3, 70, 50),
    (10, 33, 400),
    (24, 16, 32),
    (25, 17, 33),
    (100, 1000, 70),
    (300, 64, 600),
    (900, 40, 20),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m,k,n", SIZES)
def test_products(m, k, n, dtype, cpu_path):
    x, y = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    for a in (x, x.T.contiguous().T):
        for b in (y, y.T.contiguous().T):
            whole = torch.randn(m, n + 3)
            before = whole.clone()
            true, plain = before[:, :n] + a.double() @ b.double(), a.float() @ b.float()
            product_(whole[:, :n], a, b, add=True)
            assert_no_worse(whole[:, :n], true, before[:, :n] + plain)
            assert torch.equal(whole[:, n:], before[:, n:])
            assert_no_worse(product(a, b), a.double() @ b.double(), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_any_layout(dtype, cpu_path):
    for m, k, n in ((30, 20, 40), (70, 90, 80)):
        x, y = (
            torch.randn(m, 2 * k).to(dtype)[:, ::2],
            torch.randn(2 * n, k, 3).to(dtype)[::2, :, 1],
        )
        for a in (x, x[:1].expand(m, k), x[:, :1].expand(m, k)):
            for c in (y, y[:1].expand(n, k), y[:, :1].expand(n, k)):
                b = c.T
                true, plain = a.double() @ b.double(), a.float() @ b.float()
                assert_no_worse(product(a, b), true, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_nothing_and_of_nan(dtype, cpu_path):
    for m, k, n in ((0, 5, 40), (40, 5, 0), (40, 0, 40), (3, 0, 2)):
        out, a, b = torch.ones(m, n), torch.ones(m, 9).to(dtype)[:, :k], torch.ones(n, 9).to(dtype)
        assert torch.equal(product_(out, a, b[:, :k].T, add=True), torch.ones(m, n).add(k))
        assert torch.equal(product_(out, a, b[:, :k].T), torch.full((m, n), float(k)))
    a, b = torch.ones(40, 65).to(dtype), torch.ones(70, 65).to(dtype)
    a[7, 64], b[69, 0] = torch.nan, torch.inf
    expected = (a.float() @ b.float().T).isnan()
    assert expected.sum() == 70 and torch.equal(product(a, b.T).isnan(), expected)
    assert (product(a, b.T)[:, 69].isposinf()).sum() == 39


def test_long_sums_err_no_more_than_the_library():
    x = torch.rand(64, 1 << 16)
    assert_no_worse(product(x, x.T), x.double() @ x.double().T, x @ x.T)


OPS = [
    (ops.product_, (torch.randn(3, 4), torch.randn(3, 5), torch.randn(5, 4), True)),
    (ops.column_moments, (torch.randn(7, 5), torch.randn(5))),
    (ops.column_moments, (torch.randn(7, 5).half(), None)),
    (ops.column_dots, (torch.randn(7, 5), torch.randn(7, 5))),
    (ops.standardise, (torch.randn(7, 5).bfloat16(), *torch.randn(3, 5).unbind())),
    (ops.inverse_lengths, (torch.randn(7, 5).bfloat16(),)),
    (ops.topk_, (torch.full((3, 2), neighbours.NOT_YET), torch.randn(3, 9), torch.rand(9), 4)),
    (ops.topk_result, (torch.arange(6).view(3, 2),)),
]


@pytest.mark.parametrize("op, args", OPS)
def test_opcheck(op, args):
    torch.library.opcheck(op.default, args)


def at_threads(count, call):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def test_threads_change_no_bit():
    x, y = torch.randn(1500, 800), torch.randn(800, 700)

    def run():
        found = [product(x, y), product(x.bfloat16(), y.bfloat16().T.contiguous().T)]
        found += [ops.column_moments(x, x[0]), ops.column_dots(x, x), ops.inverse_lengths(x)]
        return found + [ops.standardise(x, x[0], x[1], x[2])]

    one = at_threads(1, run)
    for count in (2, 3):
        assert all(map(torch.equal, one, at_threads(count, run)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N,D", [(1, 1), (7, 5), (65, 33), (600, 300)])
def test_passes_over_features(N, D, dtype):
    z, mean = torch.randn(N, D).add(3).to(dtype), torch.full((D,), 3.0)
    scale, shift = torch.randn(2, D).unbind()
    for x in (z, z.T.contiguous().T, torch.stack([z, z], 2)[..., 0]):
        for given in (None, mean):
            true = gram.column_moments_ref(z.double(), None if given is None else mean.double())
            torch.testing.assert_close(ops.column_moments(x, given), true, rtol=1e-6, atol=1e-3)
        y = gram.standardise_ref(z, mean, scale, shift)
        torch.testing.assert_close(ops.standardise(x, mean, scale, shift), y)
        if dtype == torch.float32:
            true = gram.column_dots_ref(z.double(), y.double())
            torch.testing.assert_close(ops.column_dots(x, y), true, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("k", [1, 4, 60])
def test_topk_keeps_what_sorting_keeps(k):
    x = torch.randint(-9, 9, (20, 300)).float() / 4  # many equal ones
    x[0, 5:200:7], x[1] = torch.nan, torch.nan
    x[2], x[3], x[4, 10:20] = -torch.inf, x[3].sort().values, torch.inf
    scale = torch.randint(1, 4, (300,)).float()
    for factors in (None, scale):
        best = torch.full((20, k), neighbours.NOT_YET)
        expected = best.clone()
        for first, last in ((0, 70), (70, 71), (71, 300)):
            own = None if factors is None else factors[first:last]
            ops.topk_(best, x[:, first:last], own, first)
            neighbours.topk_ref_(expected, x[:, first:last], own, first)
        found = ops.topk_result(best)
        for got, true in zip(found, neighbours.topk_result_ref(expected), strict=True):
            torch.testing.assert_close(got, true, rtol=0, atol=0, equal_nan=True)
        y = x if factors is None else x * factors
        order = y.sort(dim=1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(found[1], order)


@pytest.mark.parametrize("mean", [0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_about_large_means(mean, dtype):
    z = (torch.randn(700, 40) + mean).to(dtype)
    sums = ops.column_moments(z, None)[0]
    assert_no_worse(sums / 700, z.double().mean(0), z.float().mean(0))


def test_lengths():
    x = torch.randn(9, 70)
    x[3] = 0
    for y in (x, x.bfloat16()):
        torch.testing.assert_close(ops.inverse_lengths(y), neighbours.inverse_lengths_ref(y))
