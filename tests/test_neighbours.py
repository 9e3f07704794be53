"""KoLeo and top-k search against their formulas written out in fp64."""

import math
from functools import partial

import pytest
import torch
from test_gram import DEVICES, DTYPES, Largest, check, with_gradients
from torch.nn import functional as F

from fastssl import losses
from fastssl.ops import blocks, koleo, neighbours, topk_cosine


@pytest.fixture(params=["few calls", "blocks"])
def form(request, monkeypatch):
    """Both forms at every size."""
    monkeypatch.setattr(neighbours, "SMALL", {"few calls": 1 << 62, "blocks": 0}[request.param])


both_forms = pytest.mark.usefixtures("form")


def koleo_naive(x, p=2, topk=1, eps=1e-8, normalize=True):
    y = F.normalize(x, eps=eps) if normalize else x
    index = (y @ y.T).detach().fill_diagonal_(-torch.inf).topk(topk, dim=1).indices
    distance = torch.linalg.vector_norm(y[:, None] - y[index] + eps, ord=p, dim=2)
    return -(distance + eps).log().mean()


@both_forms
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"p": 1}, {"p": 3.5}, {"topk": 3}, {"normalize": False}])
@pytest.mark.parametrize("N,D", [(4, 3), (7, 5), (33, 17), (257, 96)])
def test_koleo(N, D, options, dtype, device, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 * D * 20)
    x = (torch.randn(N, D, dtype=torch.float64) * 3).to(dtype)
    check(partial(koleo, **options), partial(koleo_naive, **options), x, device=device)


@pytest.mark.parametrize("spread", [1, 0.1, 1e-3])  # of bf16 ever more rows are in doubt
def test_nearest_by_bf16(spread, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 16)
    x = torch.randn(10, 48).repeat(30, 1) + spread * torch.randn(300, 48)
    x[150:], x[0] = x[:150].clone(), 0
    for every in (F.normalize(x), x):
        products = (every.double() @ every.double().T).fill_diagonal_(-torch.inf)
        for y, first in ((every, 0), (every[70:90], 70)):
            index = neighbours._nearest_by_bf16(y, every, first)[:, None]
            exact, own = products[first : first + len(y)], slice(first, first + len(y))
            short = exact.amax(1) - exact.gather(1, index)[:, 0]
            assert (short <= 1e-6 * every.norm(dim=1)[own] * every.norm(dim=1).max()).all()
    index = neighbours._nearest_by_bf16(*[F.normalize(x[1:9]).repeat(3, 1)] * 2, 0)
    assert index.tolist() == [*range(8, 16), *range(8), *range(8)]


@both_forms
def test_gradcheck():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"p": 3}, {"topk": 2}, {"normalize": False}):
        assert torch.autograd.gradcheck(partial(koleo, **options), (x,))


@both_forms
def test_layouts():
    x = torch.randn(9, 12)
    for y in (torch.stack([x, x], 2)[..., 0], x.T.contiguous().T):
        for loss in (koleo, partial(koleo, normalize=False), partial(koleo, topk=2)):
            torch.testing.assert_close(with_gradients(loss, y), with_gradients(loss, x))
        for found, true in zip(topk_cosine(y, y, 3), topk_cosine(x, x, 3), strict=True):
            torch.testing.assert_close(found, true)


@both_forms
def test_parity_with_lightly():
    lightly = pytest.importorskip("lightly.loss")
    x = torch.randn(24, 40)
    for args in ((), (1, 1e-6)):
        ours, theirs = (library.KoLeoLoss(*args) for library in (losses, lightly))
        expected = with_gradients(theirs, x)
        torch.testing.assert_close(with_gradients(ours, x), expected, rtol=1e-5, atol=1e-5)


@both_forms
def test_koleo_in_closed_form():
    assert float(koleo(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))) == pytest.approx(-math.log(2) / 2)


@both_forms
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_equal_rows_and_one_row(dtype):
    x = torch.randn(9, 6).to(dtype)
    x[3:6], x[7:] = x[2].clone(), 0
    value, dx = with_gradients(koleo, x)
    assert value.isfinite() and dx.isfinite().all()
    _, scaled = with_gradients(lambda x: koleo(x) * 1e6, x)  # as by a loss scale
    assert scaled.isfinite().all()
    if dtype == torch.float16:
        assert scaled.abs().max() == torch.finfo(dtype).max
    zero, dzero = with_gradients(koleo, x[:1])
    assert zero == 0 and (dzero == 0).all()
    torch.testing.assert_close(koleo(x[:2], topk=5), koleo(x[:2]))
    x[0, 0] = torch.nan
    value, dx = with_gradients(koleo, x)
    assert value.isnan() and dx[0].isnan().all()


def test_forms(monkeypatch):
    """Which one a size takes; and that without a gradient the value is the same to the bit."""
    monkeypatch.setattr(neighbours, "SMALL", 8 * 8 * 6)
    for N, node in ((8, "WithGradient"), (9, "KoLeo")):
        x = torch.randn(N, 6, requires_grad=True)
        value = koleo(x)
        assert value.grad_fn.name() == f"{node}Backward"
        assert torch.equal(koleo(x.detach()), value)
        with torch.no_grad():
            assert torch.equal(koleo(x), value)
    for options in ({"p": 3}, {"topk": 2}):
        assert koleo(x[:8], **options).grad_fn.name() == "KoLeoBackward"


@both_forms
def test_autocast_has_no_effect():
    a, b = torch.randn(2, 20, 30).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        inside = with_gradients(koleo, a) + topk_cosine(a, b, 3)
    assert all(map(torch.equal, inside, with_gradients(koleo, a) + topk_cosine(a, b, 3)))


@both_forms
def test_compiles_without_a_graph_break():
    a, b = torch.randn(2, 9, 6).unbind()
    loss, search = (
        torch.compile(f, fullgraph=True, backend="aot_eager") for f in (koleo, topk_cosine)
    )
    torch.testing.assert_close(with_gradients(loss, a), with_gradients(koleo, a))
    assert torch.equal(search(a, b, 2)[1], topk_cosine(a, b, 2)[1])


def test_memory(monkeypatch):
    """No N x N products."""
    monkeypatch.setattr(neighbours, "SMALL", 0)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 14)
    a, b = torch.randn(2, 1100, 50).unbind()
    with Largest() as largest:
        with_gradients(lambda x: koleo(x) + koleo(x, topk=2), a)
        topk_cosine(a, b, 5, chunk=64)
    assert largest.numel <= a.numel()


@both_forms
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("N,M,D,k", [(1, 1, 1, 1), (7, 33, 5, 33), (37, 500, 16, 20)])
def test_topk(N, M, D, k, dtype, device, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4096)
    queries, bank = torch.randn(N, D).to(dtype), torch.randn(M, D).to(dtype)
    bank[M // 2 :] = bank[: M - M // 2].clone()  # each cosine twice, rows apart
    true = F.normalize(queries.double()) @ F.normalize(bank.double()).T
    for chunk in (None, 1, 64):
        values, rows = topk_cosine(queries.to(device), bank.to(device), k, chunk=chunk)
        best = true.sort(dim=1, descending=True).values[:, :k]
        torch.testing.assert_close(values.cpu().double(), best, rtol=0, atol=5e-7)
        torch.testing.assert_close(true.gather(1, rows.cpu()), best, rtol=0, atol=5e-7)
        assert all(len(set(row)) == k for row in rows.tolist())


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_takes_the_lowest_of_equal_rows(dtype):
    x = torch.tensor([[1, -0.0, 0, 1, torch.inf, -2, torch.nan, -torch.inf, -1, 1]]).to(dtype)
    order = [6, 4, 0, 3, 9, 1, 2, 8, 5, 7]
    for k in range(1, 11):
        assert neighbours._largest(x, k).tolist() == [sorted(order[:k])]
    bank = torch.eye(4, dtype=dtype)[[1, 0, 1, 0, 0, 2, 3, 0]]
    for chunk in (None, 1, 3):
        _, rows = topk_cosine(torch.eye(4, dtype=dtype)[:2], bank, 5, chunk=chunk)
        assert rows.tolist() == [[1, 3, 4, 7, 0], [0, 2, 1, 3, 4]]


ERRORS = [
    (lambda x: koleo(x[0]), r"x must be \(rows, D\).* got \(4,\)"),
    (lambda x: koleo(x[None]), r"x must be \(N, D\), got \(1, 3, 4\)"),
    (lambda x: koleo(x, p=0.5), "p must be a finite number >= 1, got 0.5"),
    (lambda x: koleo(x, topk=0), "topk must be an integer >= 1, got 0"),
    (lambda x: topk_cosine(x, x, 4), "k must be an integer from 1 to the bank's 3 rows, got 4"),
    (lambda x: topk_cosine(x, x, 1, chunk=0), "chunk must be an integer >= 1, got 0"),
    (lambda x: topk_cosine(x, x[:, 1:], 1), "bank must have queries's width D=4"),
]


@pytest.mark.parametrize("call, text", ERRORS)
def test_error_messages(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.randn(3, 4))


def on_rank(group, sizes, D, dtype):
    x = torch.randn(sum(sizes), D).double().requires_grad_()
    close = 1e-10 if dtype == torch.float64 else 1e-4
    own = slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1]))
    for topk in (1, 2):
        truth = koleo_naive(x, topk=topk)
        true = len(sizes) * torch.autograd.grad(truth, x)[0][own]
        loss = partial(koleo, topk=topk, group=group)
        found = with_gradients(loss, x[own].to(dtype))
        for got, expected in zip(found, (truth.detach(), true), strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=close, atol=close)
    return found[0]


@pytest.mark.parametrize("sizes", [(5,), (6, 6), (7, 3), (4, 0, 6), (2, 2, 3, 5)])
@pytest.mark.parametrize("D", [9, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_over_ranks_as_in_one_process(D, sizes, dtype, ranks):
    values = ranks.run(on_rank, len(sizes), sizes, D, dtype)
    assert all(torch.equal(value, values[0]) for value in values)
