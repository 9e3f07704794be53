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


@pytest.mark.parametrize("n_iters", [1, 3, 50])
def test_closed_forms(n_iters):
    sure = 1 / (1 + math.exp(-1))
    want = torch.tensor([[sure, 1 - sure], [1 - sure, sure]])
    torch.testing.assert_close(sinkhorn(torch.eye(2), epsilon=1.0, n_iters=n_iters), want)
    even = sinkhorn(torch.full((6, 4), 0.7), 0.05, n_iters=n_iters)  # no difference to tell
    torch.testing.assert_close(even, torch.full((6, 4), 0.25))


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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_layouts(layout, dtype, device):
    scores = cosines(33, 50, dtype).to(device)
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
    for bad in (torch.nan, torch.inf):
        assert sinkhorn(scores.index_fill(1, torch.tensor(1), bad), 0.05).isnan().all()
    assert sinkhorn(scores.index_fill(0, torch.tensor(4), -torch.inf), 0.05).isnan().all()
    assert sinkhorn(scores[:0], 0.05).shape == (0, 5) and not sinkhorn_bias(scores[:0], 0.05).any()
    share = torch.tensor([1.0, 2, 1, 0, 3])
    got = sinkhorn(scores, 0.05, marginal=share)
    assert (got[:, 2:4] == 0).all() and sinkhorn_bias(scores, 0.05, marginal=share)[3] == -torch.inf
    rest = [0, 1, 4]
    torch.testing.assert_close(got[:, rest], sinkhorn(scores[:, rest], 0.05, marginal=share[rest]))
    assert sinkhorn(torch.zeros(3, 4, dtype=dtype, requires_grad=True), 0.1).requires_grad is False
    torch.testing.assert_close(
        sinkhorn(torch.zeros(3, 4, dtype=dtype), 0.1), torch.full((3, 4), 0.25).to(dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("B,K", [(70, 3000), (2, 65539)])
def test_threads_share_the_rows(B, K, threads, dtype):
    before, scores = torch.get_num_threads(), cosines(B, K, dtype)
    torch.set_num_threads(threads)
    try:
        got = sinkhorn(scores, 0.05)
    finally:
        torch.set_num_threads(before)
    true = loop(scores, 0.05, 3)
    assert (got - true).abs().max() <= 3e-6 * true.max()


def test_scores_and_queue_of_two_dtypes():
    scores = cosines(20, 7, torch.float64)
    true = sinkhorn(scores, 0.1)[12:]
    for dtypes in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        own, queue = scores[12:].to(dtypes[0]), scores[:12].to(dtypes[1])
        got = sinkhorn(own, 0.1, queue_scores=queue)
        assert got.dtype == own.dtype
        torch.testing.assert_close(got.double(), true, atol=1e-6, rtol=1e-5)


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
    marginal = torch.arange(1.0, 22)

    def run(x):
        return sinkhorn(x, 0.05, marginal=marginal, queue_scores=x[:2])

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(scores), run(scores))


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
            lambda x: sinkhorn(x, 0.1, marginal=torch.tensor([1.0, -1, 1, 1])),
            ValueError,
            "^sinkhorn: marginal must hold finite numbers >= 0.*got -1 to 1",
        ),
        (
            lambda x: sinkhorn(x, 0.1, queue_scores=torch.ones(2, 5)),
            ValueError,
            r"^sinkhorn: queue_scores must have scores's groups, prototypes and device, "
            r"got \(2, 5\)",
        ),
    ],
)
def test_error_messages(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.randn(3, 4))


# --------------------------------------------------------------------------------- several ranks


def on_rank(group, sizes, K, dtype):
    """Two problems at once; each rank has its rows of the batch and two of the queue."""
    generator = torch.Generator().manual_seed(1)
    rows = sum(sizes), 2 * len(sizes)
    batch, queue = (
        torch.randn(2, n, K, generator=generator, dtype=torch.float64).to(dtype) for n in rows
    )
    options = {"marginal": torch.arange(1.0, K + 1), "n_iters": 4}
    truth = sinkhorn(batch, 0.3, queue_scores=queue, group=fastssl.LOCAL, **options)
    rank, first = group.rank(), sum(sizes[: group.rank()])
    own = slice(first, first + sizes[rank])
    options |= {"queue_scores": queue[:, 2 * rank : 2 * rank + 2], "group": group}
    got = sinkhorn(batch[:, own], 0.3, **options)
    return got, truth[:, own], sinkhorn_bias(batch[:, own], 0.3, **options)


@pytest.mark.parametrize(
    "sizes, K", [((5,), 11), ((6, 3), 11), ((4, 0, 7), 11), ((1, 2, 3, 4), 11), ((1, 0, 3, 4), 1)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_over_ranks_as_in_one_process(sizes, K, dtype, ranks):
    found = ranks.run(on_rank, len(sizes), sizes, K, dtype)
    for got, truth, bias in found:
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(got, truth, atol=tolerance, rtol=tolerance)
        assert torch.equal(bias, found[0][2]), "the bias must be equal on all ranks"


def that_differ(group):
    scores = torch.randn(3, 4 + group.rank())
    with pytest.raises(ValueError, match="sinkhorn: the groups and prototypes must be the same"):
        sinkhorn(scores, 0.1, group=group)
    with pytest.raises(ValueError, match="epsilon must be the same on all ranks, got 0.1 on rank"):
        sinkhorn_bias(scores[:, :4], 0.1 + group.rank(), group=group)
    for marginal in (torch.arange(1.0, 5) + group.rank(), torch.ones(4) if group.rank() else None):
        with pytest.raises(ValueError, match="the marginal must be the same on all ranks"):
            sinkhorn_bias(scores[:, :4], 0.1, marginal=marginal, group=group)


def test_ranks_that_differ(ranks):
    ranks.run(that_differ, 2)
