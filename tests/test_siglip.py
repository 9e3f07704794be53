"""The sigmoid op against its fp64 reference, and `siglip` against the formula written out."""

import math
import sys

import pytest
import torch
from oracle import assert_no_worse, problem
from torch.nn.functional import logsigmoid, normalize, softplus

from fastssl.ops import siglip
from fastssl.ops.siglip import siglip_fwd_ref

module = sys.modules["fastssl.ops.siglip"]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
fwd = torch.ops.fastssl.siglip_fwd


@pytest.fixture(params=["few calls", "tiles"])
def form(request, monkeypatch):
    """Both forms at every size."""
    monkeypatch.setattr(module, "SMALL", {"few calls": 1 << 62, "tiles": 0}[request.param])


both_forms = pytest.mark.usefixtures("form")


def arguments(N, M, D, dtype, *, scale=10.0, bias=-10.0, ids=False, device="cpu", **options):
    """The op's tensors in its order; one row in five has no positive."""
    p = problem(N, M, D, dtype, scale=scale, ids=ids, device=device, **options)
    target = torch.randint(0, M, (N,), dtype=torch.int32)
    target[::5] = -1
    return {
        **{name: p[name] for name in ("q", "k", "scale")},
        "bias": torch.tensor(bias, device=device),
        "q_ids": p["q_ids"],
        "k_ids": p["k_ids"],
        "target": target.to(device),
        "weight": torch.rand(N, device=device) + 0.1,
    }


def losses_of(q, k, scale, bias, q_ids, k_ids, target):
    """Row losses by the paper's formula, positives +1 and negatives -1, all pairs in memory."""
    x = scale * (q @ k.T) + bias
    positive = target[:, None] == torch.arange(len(k), device=q.device)
    losses = -logsigmoid(torch.where(positive, x, -x))
    if q_ids is not None:
        losses = losses.masked_fill((q_ids[:, None] == k_ids[None]) & ~positive, 0)
    return losses.sum(1)


def check(p, need_dq=True, need_dk=True):
    """The raw op against fp64, no worse than plain torch in p's dtype."""
    cpu = {name: None if x is None else x.cpu() for name, x in p.items()}
    floats = "q", "k", "scale", "bias"
    p64 = cpu | {n: cpu[n].double() for n in (*floats, "weight")}
    dtype = p["q"].dtype
    leaves = [cpu[n].to(dtype, copy=True).requires_grad_() for n in floats]
    loss = losses_of(*leaves, *(cpu[n] for n in ("q_ids", "k_ids", "target")))
    total = (loss * cpu["weight"].to(dtype)).sum()
    peer = loss.detach(), *torch.autograd.grad(total, leaves)
    got = fwd(*p.values(), need_dq, need_dk)
    true = siglip_fwd_ref(*p64.values(), need_dq, need_dk)
    assert all(x.dtype == torch.float32 for x in got)
    weight, scale = p64["weight"], p64["scale"].item()
    norm_q, norm_k = (p64[n].norm(dim=1).max().item() for n in ("q", "k"))
    largest = scale * norm_q * norm_k + abs(p64["bias"].item())
    magnitude = {
        "loss": largest,
        "dq": scale * norm_k * weight.max().item(),
        "dk": scale * norm_q * weight.max().item(),
        "dscale": weight.norm().item() * norm_q * norm_k,
        "dbias": weight.norm().item(),
    }
    for name, *xs in zip(magnitude, got, true, peer, strict=True):
        print(name)
        if (name == "dq" and not need_dq) or (name == "dk" and not need_dk):
            assert xs[0].numel() == 0, "a gradient that was not asked for"
        elif name == "loss" or need_dq or need_dk:
            assert_no_worse(xs[0].cpu(), *xs[1:], 2 if name == "loss" else 3, magnitude[name])


SIZES = [(1, 1), (2, 3), (7, 5), (33, 17), (257, 96), (200, 1100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [7, 64, 100, 128, 384])
@pytest.mark.parametrize("N,M", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_oracle_sizes(N, M, D, dtype, device):
    if dtype == torch.float16 and N * M > 100_000:
        pytest.skip("plain torch multiplies fp16 on CPUs too slowly to compare with")
    check(arguments(N, M, D, dtype, ids=(N + D) % 2 == 1, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,M,D", [(1, 1, 1), (7, 5, 33), (33, 170, 100), (257, 300, 65)])
@pytest.mark.parametrize("ids", [False, True])
def test_oracle_every_product_path(ids, N, M, D, dtype, cpu_path):
    check(arguments(N, M, D, dtype, ids=ids))


@pytest.mark.parametrize("need_dk", [True, False])
@pytest.mark.parametrize("need_dq", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_only_the_asked_gradients(device, dtype, need_dq, need_dk):
    check(arguments(70, 130, 48, dtype, ids=True, device=device), need_dq, need_dk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale,bias", [(200.0, 0.0), (100.0, -100.0), (0.01, 0.0), (1.0, 200.0)])
def test_oracle_extremes(scale, bias, dtype, cpu_path):
    check(arguments(60, 300, 96, dtype, scale=scale, bias=bias))


@pytest.mark.parametrize("bias", [-10.0, -20.0, -40.0])
def test_easy_negatives_keep_their_digits(bias, cpu_path):
    """A hundred losses of e^bias each: 1 + e^bias would have rounded them away."""
    p = arguments(40, 100, 64, torch.float32, bias=bias)
    p["k"] = normalize(torch.randn(100, 64))
    p["target"].fill_(-1)
    got = fwd(*p.values(), True, True)
    p64 = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in p.items()}
    true = siglip_fwd_ref(*p64.values(), True, True)
    assert 0 < true[0].max() < 100 * math.exp(bias + 10)
    for x, y in zip(got, true, strict=True):
        atol = 1e-5 * y.abs().max().item()
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=atol)
    torch.testing.assert_close(got[0].double(), true[0], rtol=2e-5, atol=0)


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
    p = arguments(50, 70, 16, torch.float32, device=device)
    p["q"][7, 3] = bad
    loss, dq, dk, *_ = fwd(*p.values(), True, True)
    assert not loss[7].isfinite() and loss.isfinite().sum() == 49
    assert dq.isfinite().all(1).sum() >= 49
    assert not dk[:, 3].isfinite().any(), "every key's gradient adds a multiple of that row"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeat(dtype, device):
    p = arguments(300, 1100, 100, dtype, ids=True, device=device)
    first, second = fwd(*p.values(), True, True), fwd(*p.values(), True, True)
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, False)])
def test_opcheck(ids, needs, device):
    p = arguments(9, 7, 16, torch.float32, ids=ids, device=device)
    torch.library.opcheck(fwd.default, (*p.values(), *needs))


# ------------------------------------------------------------------------------------- siglip


def written_out(
    q, k, scale, bias, target=None, q_ids=None, k_ids=None, sample_weight=None, normalize=False,
    reduction="mean",
):  # fmt: skip
    if normalize:
        q, k = (torch.nn.functional.normalize(x, dim=1) for x in (q, k))
    if target is None:
        target = torch.arange(len(q), device=q.device)
    losses = losses_of(q, k, scale, bias, q_ids, k_ids, target)
    if sample_weight is not None:
        losses = losses * sample_weight
    return {"mean": losses.mean, "sum": losses.sum, "none": lambda: losses}[reduction]()


VECTORS = {
    "plain": {},
    "target": {"target": torch.tensor([2, -1, 0, 2, 1])},
    "ids": {"q_ids": torch.randint(0, 3, (5,)), "k_ids": torch.randint(0, 3, (4,))},
    "weight": {"sample_weight": torch.rand(5)},
    "normalize": {"normalize": True},
}


@both_forms
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", VECTORS)
def test_gradcheck(options, reduction):
    q = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    options = VECTORS[options] | {"reduction": reduction}

    def loss(q, k, scale, bias):
        return siglip(q, k, logit_scale=scale, logit_bias=bias, **options)

    expected = written_out(q, k, scale, bias, **options)
    torch.testing.assert_close(loss(q, k, scale, bias), expected)
    torch.autograd.gradcheck(loss, (q, k, scale, bias))


@both_forms
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N,M,D", [(1, 1, 1), (7, 5, 33), (33, 17, 100), (128, 128, 128)])
def test_loss_and_gradients(N, M, D, dtype, device, reduction):
    inputs = [normalize(torch.randn(n, D)).to(dtype) for n in (N, M)]

    def run(call, dtype, device, wide):
        q, k = (x.to(device, dtype, copy=True) for x in inputs)
        scale, bias = (torch.tensor(x, device=device).to(wide) for x in (10.0, -10.0))
        leaves = [x.requires_grad_() for x in (q, k, scale, bias)]
        loss = call(*leaves)
        total = (loss * torch.linspace(0.5, 2, loss.numel()).to(loss)).sum()
        return [x.detach().cpu() for x in (loss, *torch.autograd.grad(total, leaves))]

    def ours(q, k, scale, bias):
        return siglip(q, k, logit_scale=scale, logit_bias=bias, reduction=reduction)

    def plain(*leaves):
        return written_out(*leaves, reduction=reduction)

    got = run(ours, dtype, device, torch.float32)
    true = run(plain, torch.float64, "cpu", torch.float64)
    peer = run(plain, dtype, "cpu", dtype)
    each = 2 / N if reduction == "mean" else 2.0
    magnitudes = 20.0, 10 * each, 10 * each, each * N, each * N
    for i, xs in enumerate(zip(got, true, peer, strict=True)):
        assert_no_worse(*xs, 2 if i == 0 else 3, magnitudes[i])
    assert got[1].dtype == got[2].dtype == dtype


@both_forms
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", range(4))
def test_each_input_alone_may_learn(wanted, reduction):
    inputs = [torch.randn(6, 8), torch.randn(6, 8), torch.tensor(3.0), torch.tensor(-2.0)]
    inputs[wanted].requires_grad_()
    loss = siglip(*inputs[:2], logit_scale=inputs[2], logit_bias=inputs[3], reduction=reduction)
    (got,) = torch.autograd.grad(loss.sum(), inputs[wanted])
    expected = written_out(*inputs, reduction=reduction).sum()
    torch.testing.assert_close(got, torch.autograd.grad(expected, inputs[wanted])[0])


@both_forms
@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_scale_reaches_the_gradient_before_it_is_rounded(device):
    N, D = 2000, 64
    q, k = (normalize(torch.randn(N, D)).to(device, torch.float16) for _ in range(2))
    q, k = q.requires_grad_(), k.requires_grad_()
    (65536 * siglip(q, k, logit_scale=1.0, logit_bias=-10.0)).backward()
    q64, k64 = (x.detach().double().requires_grad_() for x in (q, k))
    written_out(q64, k64, 1.0, -10.0).backward()
    assert q64.grad.abs().median() < 2**-13, "the gradients are no subnormals"
    for x, y in ((q, q64), (k, k64)):
        torch.testing.assert_close(x.grad.double() / 65536, y.grad, rtol=2e-3, atol=1e-9)


@both_forms
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device, reduction):
    q, k = (torch.randn(12, 16, device=device, requires_grad=True) for _ in range(2))
    scalars = [torch.tensor(x, device=device, requires_grad=True) for x in (3.0, -3.0)]
    leaves = q, k, *scalars

    def loss(q, k, scale, bias):
        return siglip(
            q, k, logit_scale=scale, logit_bias=bias, normalize=True, reduction=reduction
        ).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_one_tensor_in_both_roles():
    z = torch.randn(7, 8, requires_grad=True)
    ids = torch.arange(7) // 2

    def loss(z):
        return siglip(z, z, logit_scale=2.0, q_ids=ids, k_ids=ids)

    expected = written_out(z, z, 2.0, 0.0, q_ids=ids, k_ids=ids)
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(call(z), expected)
        got, true = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (call(z), expected))
        torch.testing.assert_close(got, true)


@both_forms
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_runs_the_products_in_bf16(device):
    q, k = (torch.randn(20, 32, device=device, requires_grad=True) for _ in range(2))
    with torch.autocast(device, torch.bfloat16):
        loss = siglip(q, k, logit_scale=2.0, logit_bias=-3.0)
    low = q.detach().bfloat16(), k.detach().bfloat16()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, siglip(*low, logit_scale=2.0, logit_bias=-3.0))
    loss.backward()
    assert q.grad.dtype == k.grad.dtype == torch.float32


@both_forms
def test_closed_form():
    # One aligned pair at scale 10 and bias -10: log 2. Two orthogonal ones: log 2 + log(1 + e^-10).
    one = siglip(torch.eye(1), torch.eye(1), logit_scale=10.0, logit_bias=-10.0)
    assert one.item() == pytest.approx(math.log(2))
    two = siglip(torch.eye(2), torch.eye(2), logit_scale=10.0, logit_bias=-10.0)
    assert two.item() == pytest.approx(math.log(2) + math.log1p(math.exp(-10)))


def test_equal_ids_are_no_negatives_but_the_positive_counts():
    q, k, ids = torch.randn(4, 8), torch.randn(4, 8), torch.zeros(4, dtype=torch.long)
    got = siglip(q, k, logit_scale=2.0, q_ids=ids, reduction="none")
    torch.testing.assert_close(got, softplus(-2 * (q * k).sum(1)))


def test_rows_beyond_the_keys_have_no_positive():
    q, k = torch.randn(5, 8), torch.randn(3, 8)
    got = siglip(q, k, logit_scale=1.0, reduction="none")
    torch.testing.assert_close(got[3:], softplus(q[3:] @ k.T).sum(1))
    none = siglip(q, k, logit_scale=1.0, target=torch.full((5,), -1), reduction="none")
    torch.testing.assert_close(none, softplus(q @ k.T).sum(1))
    with pytest.raises(ValueError, match=r"target must lie in \[0, 3\)"):
        siglip(q, k, logit_scale=1.0, target=torch.full((5,), 2**40))


good = torch.randn(4, 8)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: siglip(good, good[:, :5], logit_scale=1), ValueError, "width D=8, got"),
        (lambda: siglip(good[:0], good, logit_scale=1), ValueError, "at least one row"),
        (lambda: siglip(good.long(), good, logit_scale=1), TypeError, "torch.int64"),
        (lambda: siglip(good[None], good[None], logit_scale=1), ValueError, r"q must be \(N, D\)"),
        (lambda: siglip(good, good), ValueError, "exactly one of temperature and logit_scale"),
        (lambda: siglip(good, good, logit_scale=0.0), ValueError, "logit_scale must be positive"),
        (lambda: siglip(good, good, logit_scale=1, reduction="avg"), ValueError, "got 'avg'"),
        (lambda: siglip(good, good, logit_scale=1, logit_bias=torch.ones(2)), ValueError,
         "logit_bias must hold one number"),
        (lambda: siglip(good, good, logit_scale=1, logit_bias="low"), TypeError,
         "logit_bias must be a number or a tensor, got str"),
        (lambda: siglip(good, good, logit_scale=1, target=torch.zeros(3).long()), ValueError,
         r"target must have shape \(4,\).*got \(3,\)"),
        (lambda: siglip(good, good, logit_scale=1, target=torch.zeros(4)), TypeError,
         "target must be an integer tensor"),
        (lambda: siglip(good, good[:3], logit_scale=1, q_ids=torch.arange(4)), ValueError,
         "q_ids and k_ids go together"),
        (lambda: siglip(good, good, logit_scale=1, sample_weight=torch.ones(3)), ValueError,
         r"sample_weight must be a tensor of shape \(4,\)"),
    ],
)  # fmt: skip
def test_error_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_forms(monkeypatch):
    """Which one a problem takes; and that without gradients the value is the same to the bit."""
    monkeypatch.setattr(module, "SMALL", 6 * 8)
    q, scale = torch.randn(6, 5, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    for M, options, node in (
        (8, {}, "WithGradient"),
        (8, {"reduction": "sum"}, "WithGradient"),
        (9, {}, "SigLIP"),
        (8, {"reduction": "none"}, "SigLIP"),
        (8, {"sample_weight": torch.rand(6)}, "SigLIP"),
        (8, {"target": torch.arange(6)}, "SigLIP"),
        (8, {"q_ids": torch.arange(6), "k_ids": torch.arange(8)}, "SigLIP"),
    ):
        k = torch.randn(M, 5)
        value = siglip(q, k, logit_scale=scale, **options)
        assert value.grad_fn.name() == f"{node}Backward"
        with torch.no_grad():
            assert torch.equal(siglip(q, k, logit_scale=scale, **options), value)


@both_forms
def test_a_second_backward_gives_the_same():
    q, k = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
    weight = torch.rand(6)
    loss = siglip(q, k, logit_scale=3.0, logit_bias=-1.0, sample_weight=weight)
    first = torch.autograd.grad(2 * loss, (q, k), retain_graph=True)
    for x, y in zip(torch.autograd.grad(2 * loss, (q, k)), first, strict=True):
        torch.testing.assert_close(x, y)
