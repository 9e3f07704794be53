"""The queue op against its fp64 reference, and `queue_nce` against the formula written out."""

import math

import pytest
import torch
from oracle import assert_no_worse, problem
from torch.nn.functional import normalize, softplus

from fastssl.ops import info_nce, queue_nce
from fastssl.ops.queue import queue_fwd_ref

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
fwd = torch.ops.fastssl.queue_fwd


def arguments(*args, **options):
    p = problem(*args, **options)
    del p["target"]
    return p


def left_out(p, groups):
    """The mask (G, N, M) of pairs that do not count."""
    q, k = (p[name].double().unflatten(0, (groups, -1)) for name in ("q", "k"))
    out = torch.zeros(len(q), q.shape[1], k.shape[1], dtype=torch.bool)
    if p["q_ids"] is not None:
        equal = p["q_ids"].view(groups, -1, 1) == p["k_ids"].view(groups, 1, -1)
        out |= equal != p["keep_equal"]
    if p["limit"] is not None:
        out |= q @ k.mT > p["limit"].double().view(groups, -1, 1)
    if p["bias"] is not None:
        out |= p["bias"].view(groups, 1, -1).isneginf()
    return out


def check(p, groups=1):
    """The raw op against fp64, no worse than plain torch in p's dtype."""
    cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in p.items()}
    floats = [n for n in ("q", "k", "scale", "bias") if cpu[n] is not None]
    p64 = cpu | {n: cpu[n].double() for n in floats}
    plain = cpu | {n: cpu[n].to(p["q"].dtype) for n in floats}
    q, k = (plain[n].unflatten(0, (groups, -1)) for n in ("q", "k"))
    logits = plain["scale"] * (q @ k.mT)
    if plain["bias"] is not None:
        logits = logits + plain["bias"].view(groups, 1, -1)
    logits = logits.masked_fill(left_out(cpu, groups), -torch.inf)
    peer = logits.logsumexp(2).flatten(), (logits.softmax(2).nan_to_num(0) @ k).flatten(0, 1)
    true = queue_fwd_ref(*p64.values(), groups)
    norm_q, norm_k = (p64[n].norm(dim=1).max().item() for n in ("q", "k"))
    largest = p64["scale"].item() * norm_q * norm_k
    got = fwd(*p.values(), groups)
    assert got[0].dtype == got[1].dtype == torch.float32
    for name, magnitude, *xs in zip(
        ("row_lse", "out"), (largest, norm_k), got, true, peer, strict=True
    ):
        print(name)
        assert_no_worse(xs[0].cpu(), *xs[1:], 2 if name == "row_lse" else 3, magnitude)


SIZES = [(1, 1), (2, 3), (7, 5), (33, 17), (257, 96), (256, 5000)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [7, 64, 100, 128, 384])
@pytest.mark.parametrize("N,M", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_oracle_sizes(N, M, D, dtype, device):
    if dtype == torch.float16 and N * M > 1_000_000:
        pytest.skip("plain torch multiplies fp16 on CPUs too slowly to compare with")
    variant = (N + M + D) % 4
    check(arguments(N, M, D, dtype, ids=variant == 1, bias=variant >= 2, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,M,D", [(1, 1, 1), (7, 5, 33), (33, 170, 100), (257, 600, 65)])
@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize("options", [
    {}, {"ids": True}, {"ids": True, "keep_equal": True, "bias": True}, {"limit": True},
])  # fmt: skip
def test_oracle_every_product_path(options, G, N, M, D, dtype, cpu_path):
    check(arguments(N, M, D, dtype, G=G, **options), groups=G)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("G,N,M", [(3, 70, 300), (40, 5, 6), (40, 1, 1)])
def test_groups_on_devices(G, N, M, dtype, device):
    check(arguments(N, M, 96, dtype, G=G, bias=True, limit=True, device=device), groups=G)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("filled", [0, 1, 200, 999])
def test_unfilled_rows_of_the_queue(filled, device):
    p = arguments(40, 1000, 64, torch.float32, bias=True, device=device)
    p["bias"][filled:] = -torch.inf
    check(p)
    lse, out = fwd(*p.values(), 1)
    if filled == 0:
        assert lse.isneginf().all() and (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["scale 100", "orthogonal", "rising", "falling", "thousands"])
def test_oracle_extremes(case, dtype, cpu_path):
    p = arguments(60, 3000, 96, dtype, scale=100.0, unit=case != "thousands")
    if case == "orthogonal":
        p["q"] = torch.eye(60, 96).to(dtype)
        p["k"] = -torch.eye(96).roll(1, 1).repeat(32, 1)[:3000].to(dtype)
        p["k"][0] = p["q"][0]
    elif case in ("rising", "falling"):
        # Every block of the queue has a new maximum, or none after the first.
        along = torch.linspace(-1, 1, 3000)[:, None] * (1 if case == "rising" else -1)
        p["k"] = (along * normalize(torch.ones(1, 96))).to(dtype)
        p["q"] = normalize(torch.rand(60, 96) + 0.1).to(dtype)
    check(p)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "stepped"])
def test_oracle_layouts(layout, device):
    p = arguments(130, 67, 100, torch.float32, ids=True, device=device)
    if layout == "transposed":
        p["q"], p["k"] = p["q"].T.contiguous().T, p["k"].T.contiguous().T
    elif layout == "sliced":
        p["q"] = torch.cat([p["q"], p["q"]], 1)[:, 100:]
        p["k"] = torch.cat([p["k"], p["k"]], 0)[67:]
    else:
        p["k"] = p["k"].repeat_interleave(2, 0)[::2]
    check(p)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_stay_visible(bad, device):
    p = arguments(50, 700, 16, torch.float32, device=device)
    p["q"][7, 3] = bad
    lse, out = fwd(*p.values(), 1)
    assert not lse[7].isfinite() and not out[7].isfinite().all()
    assert lse.isfinite().sum() == 49 and out.isfinite().all(1).sum() == 49
    p = arguments(50, 700, 16, torch.float32, device=device)
    p["k"][600, 3] = bad
    assert not fwd(*p.values(), 1)[1][:-1].isfinite().all(1).any(), "row -1 of q is zero"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeat(dtype, device):
    p = arguments(300, 5000, 100, dtype, ids=True, bias=True, device=device)
    for first, second in zip(fwd(*p.values(), 1), fwd(*p.values(), 1), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"ids": True, "bias": True}, {"limit": True, "G": 2}])
def test_opcheck(options, device):
    p = arguments(9, 7, 16, torch.float32, device=device, **options)
    torch.library.opcheck(fwd.default, (*p.values(), options.get("G", 1)))


# ---------------------------------------------------------------------------------- queue_nce


def written_out(
    q, k, queue, scale, q_ids=None, queue_ids=None, bias=None, sample_weight=None,
    normalize=False, reduction="mean",
):  # fmt: skip
    if normalize:
        q, k = (torch.nn.functional.normalize(x, dim=1) for x in (q, k))
    positive = scale * (q * k).sum(1, keepdim=True)
    negatives = scale * q @ queue.T
    if bias is not None:
        negatives = negatives + bias
    if q_ids is not None:
        negatives = negatives.masked_fill(q_ids[:, None] == queue_ids[None], -torch.inf)
    losses = torch.cat([positive, negatives], 1).logsumexp(1) - positive[:, 0]
    if sample_weight is not None:
        losses = losses * sample_weight
    return {"mean": losses.mean, "sum": losses.sum, "none": lambda: losses}[reduction]()


VECTORS = {
    "plain": {},
    "ids": {"q_ids": torch.randint(0, 3, (5,)), "queue_ids": torch.randint(0, 3, (9,))},
    "bias": {"bias": torch.randn(9).masked_fill(torch.arange(9) == 4, -torch.inf)},
    "weight": {"sample_weight": torch.rand(5)},
    "normalize": {"normalize": True},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", VECTORS)
def test_gradcheck(options, reduction):
    q, k = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    queue = torch.randn(9, 3, dtype=torch.float64)
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    options = VECTORS[options] | {"reduction": reduction}

    def loss(q, k, scale):
        return queue_nce(q, k, queue, logit_scale=scale, **options)

    torch.testing.assert_close(loss(q, k, scale), written_out(q, k, queue, scale, **options))
    torch.autograd.gradcheck(loss, (q, k, scale))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,M,D", [(1, 1, 1), (7, 5, 33), (33, 17, 100), (128, 1000, 128)])
@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_loss_and_gradients(scale, N, M, D, dtype, device):
    inputs = [normalize(torch.randn(n, D)).to(dtype) for n in (N, N, M)]
    inputs[1][: N // 2] = inputs[0][: N // 2]

    def run(call, dtype, device):
        q, k, queue = (x.to(device, dtype, copy=True) for x in inputs)
        s = torch.tensor(scale, device=device).to(torch.promote_types(dtype, torch.float32))
        leaves = [x.requires_grad_() for x in (q, k, s)]
        loss = call(q, k, queue, s)
        return [x.detach().cpu() for x in (loss, *torch.autograd.grad(loss, leaves))]

    def ours(q, k, queue, s):
        return queue_nce(q, k, queue, logit_scale=s)

    got = run(ours, dtype, device)
    true = run(written_out, torch.float64, "cpu")
    peer = run(lambda *args: written_out(*args[:3], args[3].to(dtype)), dtype, "cpu")
    magnitudes = scale, scale / N, scale / N, 1.0
    for i, xs in enumerate(zip(got, true, peer, strict=True)):
        assert_no_worse(*xs, 2 if i == 0 else 3, magnitudes[i])
    assert got[1].dtype == got[2].dtype == dtype


def test_queue_nce_is_info_nce_over_the_positive_and_the_queue():
    q, k, queue = torch.randn(6, 8), torch.randn(6, 8), torch.randn(20, 8)
    single = [
        info_nce(q[i : i + 1], torch.cat([k[i : i + 1], queue]), temperature=0.5) for i in range(6)
    ]
    got = queue_nce(q, k, queue, temperature=0.5, reduction="none")
    torch.testing.assert_close(got, torch.stack(single))


@pytest.mark.parametrize("device", DEVICES)
def test_the_queue_may_be_overwritten_before_the_backward(device):
    q, k = (torch.randn(9, 8, device=device, requires_grad=True) for _ in range(2))
    queue = torch.randn(30, 8, device=device)
    loss = queue_nce(q, k, queue, temperature=0.2)
    expected = torch.autograd.grad(loss, (q, k))
    loss = queue_nce(q, k, queue, temperature=0.2)
    queue[:9] = 0
    for x, y in zip(torch.autograd.grad(loss, (q, k)), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_scale_reaches_the_gradient_before_it_is_rounded(device):
    # Easy rows of a large batch: their gradients are fp16 subnormals until they are scaled.
    N, D = 2000, 64
    q = normalize(torch.randn(N, D)).to(device, torch.float16).requires_grad_()
    k = q.detach().clone().requires_grad_()
    queue = normalize(torch.randn(100, D)).to(device, torch.float16)
    (65536 * queue_nce(q, k, queue, temperature=0.1)).backward()
    q64, k64 = (x.detach().double().requires_grad_() for x in (q, k))
    written_out(q64, k64, queue.double(), 10.0).backward()
    assert q64.grad.abs().median() < 2**-14, "the gradients are no subnormals"
    for x, y in ((q, q64), (k, k64)):
        torch.testing.assert_close(x.grad.double() / 65536, y.grad, rtol=2e-3, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    q, k = (torch.randn(12, 16, device=device, requires_grad=True) for _ in range(2))
    queue = torch.randn(40, 16, device=device)
    scale = torch.tensor(3.0, device=device, requires_grad=True)

    def loss(q, k, scale):
        return queue_nce(q, k, queue, logit_scale=scale, normalize=True)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(q, k, scale), (q, k, scale))
    got = torch.autograd.grad(compiled(q, k, scale), (q, k, scale))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_whose_queue_is_all_left_out(device):
    q, k = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(2))
    losses = queue_nce(
        q, k, torch.randn(5, 8, device=device), temperature=0.1, reduction="none",
        q_ids=torch.tensor([1, 2, 1]), queue_ids=torch.ones(5, dtype=torch.long),
    )  # fmt: skip
    assert (losses[[0, 2]] == 0).all() and losses[1] > 0
    losses.sum().backward()
    for x in (q, k):
        assert (x.grad[[0, 2]] == 0).all() and (x.grad[1] != 0).any()


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_runs_the_products_in_bf16(device):
    q, k = (torch.randn(20, 32, device=device, requires_grad=True) for _ in range(2))
    queue = torch.randn(50, 32, device=device)
    with torch.autocast(device, torch.bfloat16):
        loss = queue_nce(q, k, queue, temperature=0.5)
    low = (x.detach().bfloat16() for x in (q, k, queue))
    assert loss.dtype == torch.float32 and torch.equal(loss, queue_nce(*low, temperature=0.5))
    loss.backward()
    assert q.grad.dtype == k.grad.dtype == torch.float32


def test_mixed_dtypes_run_in_the_wider_one():
    q, k = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8).bfloat16().requires_grad_()
    queue = torch.randn(9, 8).half()
    loss = queue_nce(q, k, queue, temperature=1.0)
    torch.testing.assert_close(loss, written_out(q, k.float(), queue.float(), 1.0))
    loss.backward()
    assert q.grad.dtype == torch.float32 and k.grad.dtype == torch.bfloat16


def test_closed_form():
    # One query, its key, and a queue of (e2, -e1): -1 + ln(e + 1 + 1/e).
    q, queue = torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 1], [-1, 0]])
    expected = math.log(math.e + 1 + 1 / math.e) - 1
    assert queue_nce(q, q, queue, temperature=1.0).item() == pytest.approx(expected, abs=1e-6)
    # An easy row: log(1 + e^-30) is 9.36e-14, not 0.
    tiny = queue_nce(q, q, queue[1:], temperature=1 / 15)
    torch.testing.assert_close(tiny, softplus(torch.tensor(-30.0)), rtol=1e-4, atol=0)


good, queue = torch.randn(4, 8), torch.randn(6, 8)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: queue_nce(good, good[:3], queue, temperature=1), ValueError, r"both be \(N, D\)"),
        (lambda: queue_nce(good, good, queue[:, :5], temperature=1), ValueError, "width D=8, got"),
        (lambda: queue_nce(good, good, queue[:0], temperature=1), ValueError, "queue must be"),
        (lambda: queue_nce(good.long(), good, queue, temperature=1), TypeError, "torch.int64"),
        (lambda: queue_nce(good[None], good[None], queue[None], temperature=1), ValueError,
         r"got \(1, 4, 8\)"),
        (lambda: queue_nce(good, good, queue), ValueError, "exactly one of temperature"),
        (lambda: queue_nce(good, good, queue, temperature=0), ValueError, "must be positive"),
        (lambda: queue_nce(good, good, queue, temperature=1, reduction="avg"), ValueError,
         "got 'avg'"),
        (lambda: queue_nce(good, good, queue.clone().requires_grad_(), temperature=1), ValueError,
         "queue must not require a gradient.*detach"),
        (lambda: queue_nce(good, good, queue, temperature=1,
                           bias=torch.zeros(6, requires_grad=True)), ValueError,
         "bias must not require a gradient"),
        (lambda: queue_nce(good, good, queue, temperature=1, bias=torch.zeros(4)), ValueError,
         r"bias must be a tensor of shape \(6,\), got \(4,\)"),
        (lambda: queue_nce(good, good, queue, temperature=1, sample_weight=torch.ones(6)),
         ValueError, r"sample_weight must be a tensor of shape \(4,\)"),
        (lambda: queue_nce(good, good, queue, temperature=1, q_ids=torch.arange(4)), ValueError,
         "q_ids and queue_ids go together"),
        (lambda: queue_nce(good, good, queue[:4], temperature=1, q_ids=torch.arange(4)),
         ValueError, "q_ids and queue_ids go together"),
        (lambda: queue_nce(good, good, queue, temperature=1, q_ids=torch.arange(4),
                           queue_ids=torch.arange(4)), ValueError,
         r"queue_ids must have shape \(6,\)"),
    ],
)  # fmt: skip
def test_error_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
