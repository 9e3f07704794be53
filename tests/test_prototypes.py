"""Sinkhorn-Knopp against the loop on the K x B matrix, in fp64."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import fastssl
from fastssl.ops import sinkhorn, sinkhorn_bias
from fastssl.ops.prototypes import sinkhorn_codes_ref, sinkhorn_pass_ref

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def loop(scores, epsilon, n_iters, marginal=None):
    """The published iteration on all of M = e^(scores / epsilon), transposed; codes (B, K)."""
    x = scores.double() / epsilon
    M = (x - x.max()).exp().T  # one shift for all of M changes nothing
    K, B = M.shape
    r = (
        torch.full((K,), 1 / K, dtype=torch.float64)
        if marginal is None
        else marginal / marginal.sum()
    )
    M = M / M.sum()
    for _ in range(n_iters):
        M = M / M.sum(1, keepdim=True) * r[:, None]
        M = M / M.sum(0, keepdim=True) / B
    return (M / M.sum(0, keepdim=True)).T


def in_logs(scores, epsilon, n_iters):
    """The same in the log domain, in the dtype of the scores."""
    M = scores.T / epsilon
    for _ in range(n_iters):
        M = M - M.logsumexp(1, keepdim=True)
        M = M - M.logsumexp(0, keepdim=True)
    return M.softmax(0).T


def cosines(B, K, dtype, D=64):
    return (normalize(torch.randn(B, D)) @ normalize(torch.randn(K, D)).T).to(dtype)


def codes(scores, epsilon, *args, **options):
    bias = sinkhorn_bias(scores, epsilon, *args, **options)
    return (scores.double() / epsilon + bias.double().unsqueeze(-2)).softmax(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", [0.02, 0.04, 0.05])
@pytest.mark.parametrize("B,K", [(1, 17), (37, 17), (130, 3000), (33, 8192), (5, 65539)])
def test_oracle(B, K, epsilon, dtype, device):
    scores = cosines(B, K, dtype)
    for n_iters in (0, 1, 3, 10):
        true = loop(scores, epsilon, n_iters)
        allowed = (in_logs(scores.float(), epsilon, n_iters) - true).abs().max()
        allowed = max(3e-6 * true.max(), 2 * allowed)
        for got in (
            sinkhorn(scores.to(device), epsilon, n_iters),
            codes(scores.to(device), epsilon, n_iters),
        ):
            assert (got.cpu() - true).abs().max() <= allowed, n_iters


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_layouts(layout, device):
    scores = cosines(33, 50, torch.float32).to(device)
    other = (
        scores.T.contiguous().T if layout == "transposed" else torch.cat([scores] * 2, 1)[:, 50:]
    )
    assert torch.equal(sinkhorn(scores, 0.05), sinkhorn(other, 0.05))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores(dtype, device):
    scores = (40 * torch.rand(64, 100) - 20).to(dtype)
    true = in_logs(scores.double(), 0.04, 3)
    got = sinkhorn(scores.to(device), 0.04).cpu()
    assert got.isfinite().all() and (got - true).abs().max() <= 5e-5


def test_a_shift_of_rows_changes_few_iterations_but_not_one_of_prototypes():
    scores = cosines(256, 300, torch.float64)
    true = sinkhorn(scores, 0.05)
    by_row = sinkhorn(scores - scores.amax(1, keepdim=True), 0.05)
    assert (by_row - true).abs().max() > 1e-3
    for shifted in (scores - scores.max(), scores - scores.amax(0)):
        torch.testing.assert_close(sinkhorn(shifted, 0.05), true)


def test_marginal_queue_groups_and_hard_codes():
    scores = cosines(40, 12, torch.float64)
    marginal = torch.arange(1.0, 13).double() ** -0.5
    torch.testing.assert_close(
        sinkhorn(scores, 0.05, marginal=marginal), loop(scores, 0.05, 3, marginal)
    )
    together = sinkhorn(scores, 0.05)
    apart = sinkhorn(scores[25:], 0.05, queue_scores=scores[:25])
    torch.testing.assert_close(apart, together[25:])
    stacked = torch.stack([scores, scores.roll(3, 1) * 0.5])
    for x, y in zip(sinkhorn(stacked, 0.05), stacked, strict=True):
        torch.testing.assert_close(x, sinkhorn(y, 0.05))
    torch.testing.assert_close(sinkhorn_bias(stacked, 0.05)[1], sinkhorn_bias(stacked[1], 0.05))
    hard = sinkhorn(scores, 0.05, hard=True)
    assert torch.equal(hard.argmax(1), together.argmax(1)) and bool((hard.sum(1) == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_defined_results(dtype):
    scores = cosines(9, 5, dtype)
    scores[:, 2] = -torch.inf  # a prototype without mass
    got = sinkhorn(scores, 0.05)
    assert (got[:, 2] == 0).all() and sinkhorn_bias(scores, 0.05)[2] == 0
    rest = [0, 1, 3, 4]
    torch.testing.assert_close(got[:, rest], sinkhorn(scores[:, rest], 0.05))
    torch.testing.assert_close(sinkhorn(scores[:, :1], 0.05), torch.ones(9, 1, dtype=dtype))
    scores[4, 1] = torch.nan
    assert sinkhorn(scores, 0.05)[:, 1].isnan().all()
    assert sinkhorn(torch.zeros(3, 4, dtype=dtype, requires_grad=True), 0.1).requires_grad is False
    torch.testing.assert_close(
        sinkhorn(torch.zeros(3, 4, dtype=dtype), 0.1), torch.full((3, 4), 0.25).to(dtype)
    )


def test_underflow_of_a_prototype_corrects_itself():
    scores = torch.full((6, 4), 1.0)
    scores[:, 3] = -9.0  # e^(-10 / 0.05) is no float32
    torch.testing.assert_close(
        sinkhorn(scores, 0.05, 10).double(),
        in_logs(scores.double(), 0.05, 10),
        atol=1e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_and_repeat(dtype, device):
    scores = cosines(9, 21, dtype).to(device)
    bias = torch.randn(21, device=device)
    ops = torch.ops.fastssl
    for args in ((scores, 20.0, None), (scores, 20.0, bias)):
        torch.library.opcheck(ops.sinkhorn_pass.default, args)
        assert torch.equal(ops.sinkhorn_pass(*args), ops.sinkhorn_pass(*args))
        true = sinkhorn_pass_ref(
            scores.cpu().double(), 20.0, None if args[2] is None else bias.cpu()
        )
        torch.testing.assert_close(
            ops.sinkhorn_pass(*args).cpu().double(), true, atol=2e-6, rtol=1e-6
        )
    torch.library.opcheck(ops.sinkhorn_codes.default, (scores, 20.0, bias))
    true = sinkhorn_codes_ref(scores.cpu().double(), 20.0, bias.cpu())
    got = ops.sinkhorn_codes(scores, 20.0, bias).cpu().double()
    torch.testing.assert_close(got, true, atol=1e-6, rtol=1e-5)


def test_compiles_without_a_graph_break():
    scores = cosines(9, 21, torch.float32)
    compiled = torch.compile(lambda x: sinkhorn(x, 0.05), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores), sinkhorn(scores, 0.05))


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda x: sinkhorn(x.int(), 0.1), TypeError, "scores must be a float32.*int32"),
        (lambda x: sinkhorn(x, 0), ValueError, "epsilon must be a positive number, got 0"),
        (lambda x: sinkhorn(x, math.nan), ValueError, "epsilon must be a positive number, got nan"),
        (lambda x: sinkhorn(x[0], 0.1), ValueError, r"must be \(B, K\).*got \(4,\)"),
        (
            lambda x: sinkhorn_bias(x, 0.1, -1),
            ValueError,
            "n_iters must be an integer >= 0, got -1",
        ),
        (
            lambda x: sinkhorn(x, 0.1, marginal=torch.ones(3)),
            ValueError,
            r"marginal must be a tensor of shape \(4,\), got \(3,\)",
        ),
        (
            lambda x: sinkhorn(x, 0.1, queue_scores=torch.ones(2, 5)),
            ValueError,
            r"queue_scores must have scores's groups and prototypes, got \(2, 5\)",
        ),
    ],
)
def test_error_messages(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.randn(3, 4))


# --------------------------------------------------------------------------------- several ranks


def on_rank(group, sizes, dtype):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(sum(sizes), 11, generator=generator, dtype=torch.float64).to(dtype)
    queue = torch.randn(2 * len(sizes), 11, generator=generator, dtype=torch.float64).to(dtype)
    options = {"marginal": torch.arange(1.0, 12), "n_iters": 4}
    truth = sinkhorn(scores, 0.3, queue_scores=queue, group=fastssl.LOCAL, **options)
    rank, first = group.rank(), sum(sizes[: group.rank()])
    own, queue = scores[first : first + sizes[rank]], queue[2 * rank : 2 * rank + 2]
    got = sinkhorn(own, 0.3, queue_scores=queue, group=group, **options)
    bias = sinkhorn_bias(own, 0.3, queue_scores=queue, group=group, **options)
    return got, truth[first : first + sizes[rank]], bias


@pytest.mark.parametrize("sizes", [(5,), (6, 3), (4, 0, 7), (1, 2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_over_ranks_as_in_one_process(sizes, dtype, ranks):
    found = ranks.run(on_rank, len(sizes), sizes, dtype)
    for got, truth, bias in found:
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(got, truth, atol=tolerance, rtol=tolerance)
        assert torch.equal(bias, found[0][2]), "the bias must be equal on all ranks"
