"""What every contrastive loss must satisfy, whoever's formula it is."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from fastssl.losses import (
    ClipLoss,
    DCLLoss,
    DCLWLoss,
    InfoNCELoss,
    NTXentLoss,
    QueueNCELoss,
    SigLipLoss,
    SupConLoss,
    pml,
)
from fastssl.ops import info_nce, queue_nce, siglip, sup_con

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
queue = normalize(torch.randn(30, 12, generator=torch.Generator().manual_seed(1)))


def views(x, y):
    return torch.stack([normalize(x), normalize(y)], 1)


# Losses of two views x, y (N, D) and of ids (N,) of the samples, at a temperature t.
LOSSES = {
    "ClipLoss": lambda x, y, ids, t: ClipLoss()(normalize(x), normalize(y), 1 / t),
    "SigLipLoss": lambda x, y, ids, t: SigLipLoss()(normalize(x), normalize(y), 1 / t, -2.0),
    "NTXentLoss": lambda x, y, ids, t: NTXentLoss(t)(x, y),
    "DCLLoss": lambda x, y, ids, t: DCLLoss(t)(x, y),
    "DCLWLoss": lambda x, y, ids, t: DCLWLoss(t)(x, y),
    "SupConLoss, labels": lambda x, y, ids, t: SupConLoss(t)(views(x, y), ids),
    "SupConLoss, one": lambda x, y, ids, t: SupConLoss(t, "one")(views(x, y), ids),
    "SupConLoss, mask": lambda x, y, ids, t: SupConLoss(t)(views(x, y), mask=ids[:, None] <= ids),
    "pml.NTXentLoss": lambda x, y, ids, t: pml.NTXentLoss(t)(torch.cat([x, y]), ids.repeat(2)),
    "pml.SupConLoss": lambda x, y, ids, t: pml.SupConLoss(t)(torch.cat([x, y]), ids.repeat(2)),
    "pml, references": lambda x, y, ids, t: pml.NTXentLoss(t)(x, ids, None, y, ids + 0),
    "InfoNCE": lambda x, y, ids, t: InfoNCELoss(t)(x, y, q_ids=ids),
    "InfoNCE, margin": lambda x, y, ids, t: InfoNCELoss(t, margin=0.1)(x, y),
    "InfoNCE, symmetric": lambda x, y, ids, t: InfoNCELoss(t, symmetric=True)(x, y, q_ids=ids),
    "InfoNCE, decoupled": lambda x, y, ids, t: InfoNCELoss(t, decoupled=True)(x, y),
    "InfoNCE, smoothed": lambda x, y, ids, t: InfoNCELoss(t, label_smoothing=0.1)(x, y),
    "QueueNCE": lambda x, y, ids, t: QueueNCELoss(t)(x, y, queue.to(x)),
    "sup_con, in": lambda x, y, ids, t: sup_con(
        x, y, labels=ids, temperature=t, normalize=True, positives="in"
    ),
}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


def two_views(N=13, D=12, device="cpu", dtype=torch.float32):
    x = torch.randn(2, N, D, dtype=dtype)
    x[1] += x[0]
    ids = torch.arange(N) % 5
    return [*(v.to(device).requires_grad_() for v in x), ids.to(device)]


def grads(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("device", DEVICES)
def test_order_does_not_matter(loss, device):
    x, y, ids = two_views(device=device)
    order = torch.randperm(len(x), device=device)
    value, dx, dy = grads(loss(x, y, ids, 0.1), x, y)
    permuted = grads(loss(x[order], y[order], ids[order], 0.1), x, y)
    for got, expected in zip(permuted, (value, dx, dy), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("device", DEVICES)
def test_temperatures_and_duplicates(loss, scale, device):
    """In float32 as in float64, also where rows are equal; gradients are normal to their rows."""
    x, y, ids = two_views(device=device)
    with torch.no_grad():
        x[3], y[3], x[7], y[7] = x[4], x[4], x[0], y[0]
    got = grads(loss(x, y, ids, 1 / scale), x, y)
    x64, y64 = (v.detach().double().requires_grad_() for v in (x, y))
    expected = grads(loss(x64, y64, ids, 1 / scale), x64, y64)
    for value, true in zip(got, expected, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=1e-4, atol=1e-6 * scale)
    for v, dv in zip((x64, y64), expected[1:], strict=True):
        assert (v * dv).sum(1).abs().max() < 1e-9 * scale


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_length_does_not_matter(loss, factor):
    x, y, ids = two_views()
    torch.testing.assert_close(loss(factor * x, y, ids, 0.1), loss(x, y, ids, 0.1))


def test_bitwise_repeat(loss):
    x, y, ids = two_views()
    for first, second in zip(*(grads(loss(x, y, ids, 0.1), x, y) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("device", DEVICES)
def test_equal_rows(device):
    # All logits are equal, so each sum counts its keys.
    N, t = 6, 0.01
    x, ids = torch.ones(N, 4, device=device), torch.arange(N, device=device)
    cases = {
        "ClipLoss": math.log(N),
        "NTXentLoss": math.log(2 * N - 1),
        "DCLLoss": math.log(2 * N - 2),
        "DCLWLoss": math.log(2 * N - 2),
        "SupConLoss, labels": math.log(2 * N - 1) * t / 0.07,
        "SupConLoss, one": math.log(2 * N - 1) * t / 0.07,
        "pml.NTXentLoss": math.log(2 * N - 1),
        "pml.SupConLoss": math.log(2 * N - 1),
        "InfoNCE, decoupled": math.log(N - 1),
        "InfoNCE, smoothed": math.log(N),
        "sup_con, in": math.log(N),
    }
    for name, expected in cases.items():
        got = LOSSES[name](x, x.clone(), ids, t)
        torch.testing.assert_close(got.cpu(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_orthogonal_rows(device):
    # The positive's logit is s = 1/t, all others 0.
    N, t = 6, 0.01
    s = 1 / t
    x, ids = torch.eye(N, device=device), torch.arange(N, device=device)
    cases = {
        "ClipLoss": math.log1p((N - 1) * math.exp(-s)),
        "SigLipLoss": math.log1p(math.exp(2 - s)) + (N - 1) * math.log1p(math.exp(-2)),
        "NTXentLoss": math.log1p((2 * N - 2) * math.exp(-s)),
        "DCLLoss": math.log(2 * N - 2) - s,
        "DCLWLoss": math.log(2 * N - 2) - s,
        "pml.NTXentLoss": 0.0,
        "InfoNCE, decoupled": math.log(N - 1) - s,
        "InfoNCE, smoothed": 0.1 * s * (N - 1) / N,
    }
    for name, expected in cases.items():
        got = LOSSES[name](x, x.clone(), ids, t)
        torch.testing.assert_close(got.cpu(), torch.tensor(expected), rtol=1e-6, atol=1e-5)
    # And no positive that agrees: every row prefers another's key.
    got = LOSSES["ClipLoss"](x, x.roll(1, 0), ids, t)
    torch.testing.assert_close(got.cpu(), torch.tensor(s))


@pytest.mark.parametrize("device", DEVICES)
def test_keys_left_out_take_no_gradient(device):
    q, k = torch.randn(5, 8, device=device), torch.randn(9, 8, device=device, requires_grad=True)
    q_ids = torch.full((5,), 3, device=device)
    k_ids = torch.tensor([3, 0, 3, 1, 2, 3, 4, 3, 5], device=device)
    target = torch.tensor([1, 3, 3, 8, 4], device=device)
    for loss in (
        info_nce(q, k, temperature=0.1, target=target, q_ids=q_ids, k_ids=k_ids),
        siglip(q, k, temperature=0.1, target=target, q_ids=q_ids, k_ids=k_ids),
    ):
        (dk,) = torch.autograd.grad(loss, k)
        assert (dk[k_ids == 3] == 0).all() and (dk[k_ids != 3] != 0).any(1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_every_negative_left_out(device):
    q, k = (torch.randn(5, 8, device=device, requires_grad=True) for _ in range(2))
    ids = torch.zeros(5, dtype=torch.long, device=device)
    loss = info_nce(q, k, temperature=0.1, q_ids=ids, symmetric=True)
    loss = loss + queue_nce(q, k, k.detach(), temperature=0.1, q_ids=ids, queue_ids=ids)
    loss = loss + pml.NTXentLoss()(q, ids) + pml.SupConLoss()(q, ids)
    loss = loss + info_nce(q, temperature=0.1, target=ids.new_tensor([1, 0, 3, 2, 0]), q_ids=ids)
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (q, k)))


@pytest.mark.parametrize("V", [2, 3])
def test_views_of_sup_con(V):
    """V views: the mean NT-Xent over pairs of views if the others stayed in the sum, so for V=2
    NT-Xent itself."""
    z = normalize(torch.randn(V, 7, 5), dim=2).requires_grad_()
    flat, ids = z.flatten(0, 1), torch.arange(7).repeat(V)
    got = sup_con(flat, labels=ids, temperature=0.2)
    logits = (flat @ flat.T / 0.2).fill_diagonal_(-torch.inf)
    pairs = [
        torch.nn.functional.cross_entropy(logits, torch.arange(V * 7).roll(7 * shift))
        for shift in range(1, V)
    ]
    expected = sum(pairs) / len(pairs)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (got, expected)))
    if V == 2:
        torch.testing.assert_close(got, NTXentLoss(0.2)(*z))


# NT-Xent of labels counts them on the host.
CAPTURED = [
    name for name in LOSSES if not name.startswith("pml.NTXent") and name != "pml, references"
]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CAPTURED)
def test_cuda_graph_replays_with_new_features(name):
    ids = torch.arange(16, device="cuda") // 2
    x, y = torch.randn(2, 16, 12, device="cuda").unbind()

    def run(x, y):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        loss = LOSSES[name](x, y, ids, 0.2)
        return loss.detach(), *torch.autograd.grad(loss, (x, y), allow_unused=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(x, y)
    for values in (x, y):
        values.copy_(torch.randn_like(values))
    graph.replay()
    for replayed, expected in zip(got, run(x, y), strict=True):
        torch.testing.assert_close(replayed, expected)
