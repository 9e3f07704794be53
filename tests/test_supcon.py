"""sup_con against the papers' formula written with a mask of all pairs."""

import importlib
import math

import pytest
import torch
from oracle import assert_no_worse
from torch.nn.functional import normalize

from fastssl.ops import info_nce, sup_con

by_label = importlib.import_module("fastssl.ops.labels")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
POSITIVES = ["out", "in", "sum"]


@pytest.fixture(autouse=True, params=["compared", "sorted"])
def label_sums(request, monkeypatch):
    """Both ways to sum by label, whatever the size."""
    monkeypatch.setattr(by_label, "SMALL", 1 << 30 if request.param == "compared" else 0)


def plain(q, k, labels, k_labels, scale, positives, own_key=None):
    """Losses by row, from the matrix of logits."""
    itself = k is None
    k, k_labels = (q, labels) if itself else (k, k_labels)
    logits = scale * (q @ k.T)
    counts = torch.ones(logits.shape, dtype=torch.bool, device=q.device)
    if itself:
        counts.fill_diagonal_(False)
    if own_key is not None:
        counts &= torch.arange(len(k), device=q.device) != own_key[:, None]
    positive = (labels[:, None] == k_labels[None]) & counts
    lse = logits.masked_fill(~counts, -torch.inf).logsumexp(1)
    n = positive.sum(1)
    if positives == "out":
        mean = logits.masked_fill(~positive, 0).sum(1) / n.clamp(min=1)
    else:
        mean = logits.masked_fill(~positive, -torch.inf).logsumexp(1)
        if positives == "in":
            mean = mean - n.clamp(min=1).log()
    return torch.where(n > 0, lse - mean, 0)


def problem(N, M, D, device="cpu"):
    """Unit rows, labels with singletons and negative values, and own keys that lack here and
    there; M = 0 stands for q against itself."""
    q = normalize(torch.randn(N, D, dtype=torch.float64))
    k = normalize(torch.randn(M, D, dtype=torch.float64)) if M else None
    labels = torch.randint(-1, max(2, N // 4), (N,))
    k_labels = own_key = None
    if M:
        k_labels = torch.randint(-1, max(2, N // 4), (M,))
        own_key = torch.full((N,), -1)
        n = min(N, M) // 2
        own_key[:n] = torch.randperm(M)[:n]
        k_labels[own_key[: n // 2]] = labels[: n // 2]
    vectors = (None if x is None else x.to(device) for x in (k, labels, k_labels, own_key))
    return q.to(device), *vectors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positives", [*POSITIVES, "out without own keys"])
@pytest.mark.parametrize(
    "N,M,D",
    [(1, 0, 3), (2, 0, 3), (33, 0, 17), (257, 0, 100), (1, 1, 1), (7, 5, 33), (96, 257, 64)],
)
def test_oracle(N, M, D, positives, dtype, device):
    if positives not in POSITIVES and not M:
        pytest.skip("the same as above")
    q, k, labels, k_labels, own_key = problem(N, M, D, device)
    if positives != "out":
        positives, own_key = positives[:3].strip(), None
    weight = torch.randn(N, dtype=torch.float64, device=device)

    def run(loss_of, dtype, device):
        q_ = q.to(dtype).to(device).requires_grad_()
        k_ = None if k is None else k.to(dtype).to(device).requires_grad_()
        scale = torch.tensor(20.0, dtype=dtype, device=device, requires_grad=True)
        vectors = (None if x is None else x.to(device) for x in (labels, k_labels, own_key))
        loss = loss_of(q_, k_, scale, *vectors)
        leaves = [x for x in (q_, k_, scale) if x is not None]
        grads = torch.autograd.grad((loss * weight.to(loss)).sum(), leaves)
        return [x.detach().cpu() for x in (loss, *grads)]

    def ours(q, k, scale, labels, k_labels, own_key):
        return sup_con(
            q, k, labels=labels, k_labels=k_labels, own_key=own_key,
            logit_scale=scale, positives=positives, reduction="none",
        )  # fmt: skip

    def peer(q, k, scale, labels, k_labels, own_key):
        return plain(q, k, labels, k_labels, scale, positives, own_key)

    # Logits reach 20; a gradient adds terms of weight * scale, that of the scale N of them.
    sizes = [20.0, 20.0 * weight.abs().max().item()] + [20.0 * weight.abs().max().item()] * bool(M)
    results = run(ours, dtype, device), run(peer, torch.float64, "cpu"), run(peer, dtype, "cpu")
    for i, xs in enumerate(zip(*results, strict=True)):
        last = i == len(results[0]) - 1
        magnitude = weight.norm().item() if last else sizes[i]
        assert_no_worse(*xs, 2 if i == 0 else 3, magnitude)


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("positives", POSITIVES)
def test_gradcheck(positives, itself):
    q, k, labels, k_labels, own_key = problem(8, 0 if itself else 9, 3)
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64)

    def loss(q, scale, k=None):
        return sup_con(
            q, k, labels=labels, k_labels=k_labels, logit_scale=scale, positives=positives,
            own_key=own_key if positives == "out" else None, sample_weight=weight,
            normalize=True, reduction="sum",
        )  # fmt: skip

    inputs = (q.requires_grad_(), scale) + (() if itself else (k.requires_grad_(),))
    torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_oracle_near_convergence(dtype, positives, itself, device):
    """Rows of one label equal up to little: what the sums pull and push cancels."""
    labels = torch.arange(6).repeat_interleave(7)
    centres = normalize(torch.randn(6, 32, dtype=torch.float64))
    x = normalize(centres[labels] + 0.01 * torch.randn(42, 32, dtype=torch.float64))
    y = normalize(centres[labels] + 0.01 * torch.randn(42, 32, dtype=torch.float64))
    x, y = x.to(dtype), y.to(dtype)

    def run(loss_of, dtype, device):
        leaves = [x.to(device, dtype, copy=True).requires_grad_()]
        leaves += [] if itself else [y.to(device, dtype, copy=True).requires_grad_()]
        loss = loss_of(*leaves, *([None] if itself else []), labels.to(device)).mean()
        return [g.cpu() for g in torch.autograd.grad(loss, leaves)]

    def ours(q, k, labels):
        options = {"positives": positives, "temperature": 0.05, "reduction": "none"}
        return sup_con(q, k, labels=labels, **options)

    def peer(q, k, labels):
        return plain(q, k, labels, labels, 20.0, positives)

    results = run(ours, dtype, device), run(peer, torch.float64, "cpu"), run(peer, dtype, "cpu")
    for xs in zip(*results, strict=True):
        assert_no_worse(*xs, 3)


def test_closed_form():
    # Three equal rows, two of one label: log 2 + 1 - 1 for those, nothing for the third.
    z = torch.ones(3, 1)
    got = sup_con(z, labels=torch.tensor([5, 5, 7]), temperature=1.0, reduction="none")
    torch.testing.assert_close(got, torch.tensor([math.log(2), math.log(2), 0.0]))


@pytest.mark.parametrize("positives", POSITIVES)
def test_two_views_are_nt_xent(positives):
    z = normalize(torch.randn(10, 6)).requires_grad_()
    partner, ids = torch.arange(10).roll(5), torch.arange(5).repeat(2)
    expected = info_nce(z, target=partner, temperature=0.2)
    got = sup_con(z, labels=ids, temperature=0.2, positives=positives)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (got, expected)))


def test_reductions_and_weights():
    z, labels = normalize(torch.randn(9, 4)), torch.arange(9) % 3
    rows = sup_con(z, labels=labels, temperature=0.5, reduction="none")
    weight = torch.rand(9)
    for reduction, expected in (("mean", (rows * weight).mean()), ("sum", (rows * weight).sum())):
        got = sup_con(z, labels=labels, temperature=0.5, sample_weight=weight, reduction=reduction)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("positives", POSITIVES)
def test_rows_without_positives(positives, device):
    z = torch.randn(5, 4, device=device, requires_grad=True)
    for x, labels in ((z, torch.arange(5)), (z[:1], torch.zeros(1).long())):
        loss = sup_con(x, labels=labels.to(device), temperature=0.1, positives=positives)
        assert loss == 0 and (torch.autograd.grad(loss, z)[0] == 0).all()
    labels = torch.tensor([0, 0, 1, 2, 3], device=device)
    loss = sup_con(z, labels=labels, temperature=0.1, positives=positives, reduction="none")
    assert (loss[2:] == 0).all() and (loss[:2] > 0).all()
    keys = torch.randn(3, 4, device=device, requires_grad=True)
    loss = sup_con(z, keys, labels=labels, k_labels=labels[:3] + 9, temperature=0.1,
                   positives=positives)  # fmt: skip
    assert loss == 0 and (torch.autograd.grad(loss, keys)[0] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break_and_repeats_bitwise(device):
    q, k, labels, k_labels, own_key = problem(40, 60, 16, device)
    q, k = q.float().requires_grad_(), k.float().requires_grad_()

    def loss(q, k):
        return (
            sup_con(q, labels=labels, temperature=0.3)
            + sup_con(q, k, labels=labels, k_labels=k_labels, own_key=own_key, temperature=0.3)
            + sup_con(q, k, labels=labels, k_labels=k_labels, temperature=0.3, positives="in")
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), loss(q, k))
    grads = [torch.autograd.grad(f(q, k), (q, k)) for f in (loss, loss, compiled)]
    for first, second, third in zip(*grads, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(third, first)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_compiles_with_one_tensor_in_both_roles(dtype):
    z, labels = torch.randn(12, 16, requires_grad=True), (torch.arange(12) % 5).to(dtype)

    def loss(z):
        return sup_con(z, z, labels=labels, k_labels=labels, temperature=0.3)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), loss(z))
    got, expected = (torch.autograd.grad(f(z), z)[0] for f in (compiled, loss))
    torch.testing.assert_close(got, expected)


@pytest.mark.gpu
def test_no_host_sync():
    q, k, labels, k_labels, own_key = problem(40, 60, 16, "cuda")
    q, k = q.float().requires_grad_(), k.float().requires_grad_()
    sup_con(q, labels=labels, temperature=0.3)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        sup_con(q, labels=labels, temperature=0.3).backward()
        sup_con(q, k, labels=labels, k_labels=k_labels, own_key=own_key, temperature=0.3).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast_runs_the_products_in_bf16():
    z, labels = torch.randn(12, 8, requires_grad=True), torch.arange(12) % 4
    with torch.autocast("cpu", torch.bfloat16):
        loss = sup_con(z, labels=labels, temperature=0.5)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, sup_con(z.bfloat16(), labels=labels, temperature=0.5))


def test_nan_stays_visible():
    z = torch.randn(6, 4)
    z[2, 1] = math.nan
    assert sup_con(z, labels=torch.arange(6) % 2, temperature=0.1).isnan()


z = torch.randn(4, 8)
labels = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"labels": labels.float()}, TypeError, "labels must be an integer tensor, got torch.floa"),
        ({"labels": labels[:3]}, ValueError, r"labels must have shape \(4,\).*got \(3,\)"),
        ({"labels": labels * 2**33}, ValueError, "labels must fit into 32 bits"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"positives": "all"}, ValueError, 'must be "out", "in" or "sum", got \'all\''),
        ({"reduction": "avg"}, ValueError, "got 'avg'"),
        ({"k_labels": labels}, ValueError, "takes no k_labels"),
        ({"k": z[:3]}, ValueError, "k_labels is needed where k has not q's rows, got 4 and 3"),
        ({"k": z[:3], "k_labels": labels}, ValueError, r"k_labels must have shape \(3,\)"),
        ({"k": z[:, :5], "k_labels": labels}, ValueError, "q's width D=8"),
        ({"k": z.to("meta"), "k_labels": labels}, ValueError, "one device, got cpu and meta"),
        ({"own_key": labels}, ValueError, "own_key needs k"),
        ({"k": z, "own_key": labels, "positives": "in"}, ValueError, 'positives="out"'),
        ({"sample_weight": torch.ones(3)}, ValueError, r"tensor of shape \(4,\)"),
    ],
)
def test_error_messages(options, error, message):
    with pytest.raises(error, match=message):
        sup_con(z, **{"labels": labels, "temperature": 0.1} | options)


@pytest.mark.parametrize("bad", [z[:0], z[0], z[None]])
def test_error_of_shape(bad):
    with pytest.raises(ValueError, match=r"q must be \("):
        sup_con(bad, labels=labels[: len(bad)], temperature=0.1)
