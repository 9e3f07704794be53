"""The cross-entropy over prototypes from features: what the scores written out give, in blocks."""

import pytest
import torch
from oracle import assert_no_worse
from torch.nn.functional import linear, normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastssl
from fastssl.ops import (
    linear_prototype_cross_entropy,
    linear_prototypes,
    product,
    prototype_cross_entropy,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
S, T, B, D, E, K = 4, 2, 9, 6, 5, 37
ROWS = [1, 4 * (S + T), 1000]  # of a block: one sample, four (the last block is smaller), all


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """Blocks of so many rows, and never whole, though the problems are small."""

    def of(rows):
        monkeypatch.setattr(linear_prototypes, "BLOCK_BYTES", 0)
        monkeypatch.setattr(linear_prototypes, "LEAST_ROWS", rows)
        monkeypatch.setattr(linear_prototypes, "PROTOTYPES", 10)

    of(4 * (S + T))
    return of


def problem(dtype=torch.float64, B=B, device="cpu"):
    """student, its prototypes, teacher, its prototypes, bias; scores are of the order of 1."""
    sizes = (S, B, D), (K, D), (T, B, E), (K, E)
    inputs = [normalize(torch.randn(size, dtype=torch.float64), dim=-1) for size in sizes]
    return *(x.to(device, dtype) for x in inputs), torch.randn(T, K).to(device)


def unfused(student, W, teacher, V, **options):
    return prototype_cross_entropy(
        linear(student, W), teacher if V is None else linear(teacher, V), **options
    )


def with_gradients(call, student, W, *rest, **options):
    """The loss, and its gradients, from an upstream gradient that no dtype rounds."""
    student, W = (x.detach().requires_grad_() for x in (student, W))
    loss = call(student, W, *rest, **options)
    upstream = 2.0 ** torch.arange(loss.numel(), device=loss.device).remainder(3).view(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, (student, W), upstream.to(loss))


OPTIONS = [
    {},
    {"ignore_diagonal": True, "sample_weight": torch.rand(B, generator=torch.manual_seed(1))},
    {"sample_weight": torch.rand(S, B, generator=torch.manual_seed(2)), "student_temperature": 0.2},
]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "diagonal", "weights"])
def test_equals_the_unfused_form(options, reduction, rows, blocks):
    blocks(rows)
    *inputs, bias = problem()
    options = options | {"bias": bias, "reduction": reduction}
    got = with_gradients(linear_prototype_cross_entropy, *inputs, **options)
    for x, true in zip(got, with_gradients(unfused, *inputs, **options), strict=True):
        torch.testing.assert_close(x, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_errs_no_more_than_the_unfused_form(reduction, rows, dtype, device, blocks):
    blocks(rows)
    *inputs, bias = problem(dtype, device=device)
    options = {"bias": bias, "reduction": reduction, "ignore_diagonal": True}
    got = with_gradients(linear_prototype_cross_entropy, *inputs, **options)
    plain = with_gradients(unfused, *inputs, **options)
    true = with_gradients(unfused, *(x.double() for x in inputs), **options)
    for name, x, x64, p, factor in zip(
        ("loss", "dstudent", "dW"), got, true, plain, (2, 3, 3), strict=True
    ):
        assert x.dtype == p.dtype, name
        assert_no_worse(x.cpu(), x64.cpu(), p.cpu(), factor)


def test_float16_gradients_meet_the_loss_scale_before_they_are_rounded():
    *inputs, _ = problem(torch.float16)
    student, W = (x.requires_grad_() for x in inputs[:2])
    loss = linear_prototype_cross_entropy(*inputs, sample_weight=torch.full((B,), 1e-5))
    found = torch.autograd.grad(loss * 2.0**16, (student, W))
    true = with_gradients(unfused, *(x.detach().double() for x in inputs))[1:]
    for x, y in zip(found, true, strict=True):
        scale = float(y.abs().max())
        torch.testing.assert_close(x.double() / 0.65536, y, rtol=0.03, atol=0.03 * scale)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    student, W, teacher, V, bias = problem(B=3)

    def loss(student, W):
        return linear_prototype_cross_entropy(
            student, W, teacher, V, bias=bias, reduction=reduction, ignore_diagonal=True
        )

    # A second backward makes the gradient again, with the upstream factor at another place.
    torch.autograd.gradcheck(loss, (student.requires_grad_(), W.requires_grad_()), nondet_tol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_alone_none_and_a_second_time(reduction):
    inputs = problem()[:4]
    _, *true = with_gradients(unfused, *inputs, reduction=reduction)
    for i in (0, 1):
        inputs = [x.detach().requires_grad_(j == i) for j, x in enumerate(inputs)]
        loss = linear_prototype_cross_entropy(*inputs, reduction=reduction)
        upstream = 2.0 ** torch.arange(loss.numel()).remainder(3).view(loss.shape).to(loss)
        for _ in range(2):
            (found,) = torch.autograd.grad(loss, inputs[i], upstream, retain_graph=True)
            torch.testing.assert_close(found, true[i], rtol=1e-10, atol=1e-10)
    assert not linear_prototype_cross_entropy(*(x.detach() for x in inputs)).requires_grad


def test_teacher_scores_and_one_crop():
    student, W, teacher, V, bias = problem()
    true = with_gradients(unfused, student, W, teacher, V, bias=bias)
    found = with_gradients(
        linear_prototype_cross_entropy, student, W, linear(teacher, V), None, bias=bias
    )
    for x, y in zip(found, true, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    one = student[0], W, teacher[0], V
    rows = linear_prototype_cross_entropy(*one, reduction="none")
    torch.testing.assert_close(rows, unfused(*one, reduction="none"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layouts(dtype):
    *inputs, bias = problem(dtype)
    expected = with_gradients(linear_prototype_cross_entropy, *inputs, bias=bias)
    for change in (
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x if x.dim() == 2 else torch.stack([*x], 1).transpose(0, 1),
    ):
        got = with_gradients(linear_prototype_cross_entropy, *map(change, inputs), bias=bias)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_weight_norm():
    student, _, teacher, V, _ = problem(torch.float32)
    head = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(D, K, bias=False))
    found = []
    for loss in (
        linear_prototype_cross_entropy(student, head.weight, teacher, V),
        prototype_cross_entropy(head(student), linear(teacher, V)),
    ):
        found.append(torch.autograd.grad(loss, list(head.parameters())))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_autocast_as_of_a_linear_layer(monkeypatch):
    monkeypatch.setitem(product.NARROW_PRODUCTS, torch.bfloat16, True)
    *inputs, bias = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(linear_prototype_cross_entropy, *inputs, bias=bias)
        plain = with_gradients(unfused, *inputs, bias=bias)
    true = with_gradients(unfused, *(x.double() for x in inputs), bias=bias)
    for x, x64, p in zip(got, true, plain, strict=True):
        assert x.dtype == torch.float32
        assert_no_worse(x, x64, p, 3, magnitude=float(x64.abs().max()))
    exact = with_gradients(linear_prototype_cross_entropy, *inputs, bias=bias)
    assert not torch.equal(got[0], exact[0]), "scores are those of bfloat16 products"


class Largest(TorchDispatchMode):
    """The most elements that a result has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [False, True])
def test_float32_products_where_the_cpu_has_none_of_16_bits(whole, dtype, monkeypatch):
    student, W, teacher, V, _ = problem(dtype)
    if whole:
        monkeypatch.setattr(linear_prototypes, "BLOCK_BYTES", 1 << 20)
    monkeypatch.setitem(product.NARROW_PRODUCTS, dtype, False)
    loss, *grads = with_gradients(linear_prototype_cross_entropy, student, W, teacher, V)
    wide = [x.float() for x in (student, W, teacher, V)]
    same, *like = with_gradients(linear_prototype_cross_entropy, *wide)
    assert torch.equal(loss, same)
    with torch.autocast("cpu", dtype):
        assert torch.equal(linear_prototype_cross_entropy(*wide), same)
    assert all(x.dtype == dtype for x in grads)
    assert all(torch.equal(x, y.to(dtype)) for x, y in zip(grads, like, strict=True))
    monkeypatch.setitem(product.NARROW_PRODUCTS, dtype, True)
    assert not torch.equal(linear_prototype_cross_entropy(student, W, teacher, V), loss)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scores_of_all_rows_never_exist(reduction, blocks):
    *inputs, bias = problem(torch.float32, B=40)
    blocks(3 * (S + T))
    with Largest() as largest:
        with_gradients(linear_prototype_cross_entropy, *inputs, bias=bias, reduction=reduction)
    assert largest.numel == max(3 * S * K, S * 40 * D)


def test_small_scores_are_made_whole_and_are_the_same(monkeypatch):
    *inputs, bias = problem()
    blocked = with_gradients(linear_prototype_cross_entropy, *inputs, bias=bias)
    monkeypatch.setattr(linear_prototypes, "BLOCK_BYTES", 8 * (S + T) * B * K)
    with monkeypatch.context() as patch:
        patch.setattr(linear_prototypes, "_pass", None)  # not called
        whole = with_gradients(linear_prototype_cross_entropy, *inputs, bias=bias)
    for x, y in zip(blocked, whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_small_scores_are_made_whole_whosever_products_are_wider(monkeypatch):
    monkeypatch.setattr(linear_prototypes, "BLOCK_BYTES", 8 * (S + T) * B * K)
    monkeypatch.setattr(linear_prototypes, "_pass", None)  # not called
    with_gradients(linear_prototype_cross_entropy, *problem(torch.float32)[:4])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(reduction):
    student, W, teacher, V, bias = problem(torch.float32)
    weight = torch.rand(B)

    def loss(student, W):
        return linear_prototype_cross_entropy(
            student, W, teacher, V, bias=bias, sample_weight=weight, reduction=reduction
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(*(with_gradients(call, student, W) for call in (loss, compiled)), strict=True):
        assert torch.equal(x, y)


def test_nan_stays_visible():
    student, W, teacher, V, _ = problem(torch.float32)
    student[1, 3, 2] = teacher[0, 7, 0] = torch.nan
    loss, dstudent, dW = with_gradients(
        linear_prototype_cross_entropy, student, W, teacher, V, reduction="none"
    )
    expected = torch.zeros(S, B, dtype=torch.bool)
    expected[1, 3] = expected[:, 7] = True
    assert torch.equal(loss.isnan(), expected)
    assert torch.equal(dstudent.isnan().all(-1), expected) and dW.isnan().all()


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"student": torch.ones(2, 3, 4).int()}, TypeError, "student must be a.*got torch.int32"),
        ({"student": torch.ones(4)}, ValueError, r"student must be \(B, D\).*got \(4,\)"),
        ({"W": torch.ones(7, 5)}, ValueError, r"student_prototypes.*width D=4.*got \(7, 5\)"),
        ({"V": torch.ones(7, 3)}, ValueError, r"teacher_prototypes.*width D=4.*got \(7, 3\)"),
        ({"V": torch.ones(8, 4)}, ValueError, r"teacher must have.*\(3, 7\), got \(3, 8\)"),
        ({"V": None}, ValueError, r"teacher must have.*\(3, 7\), got \(3, 4\)"),
        ({"teacher": torch.ones(2, 5, 4)}, ValueError, r"teacher must.*\(3, 7\), got \(5, 7\)"),
        ({"V": torch.ones(7, 4, device="meta")}, ValueError, "on one device, got cpu and meta"),
        ({"teacher": torch.ones(2, 3, 7, device="meta"), "V": None}, ValueError,
         "student and teacher must be on one device, got cpu and meta"),
        ({"student": torch.ones(2, 0, 4), "teacher": torch.ones(2, 0, 4)}, ValueError,
         "must have a row"),
        ({"bias": torch.ones(6)}, ValueError, r"bias must be.*\(7,\).*got \(6,\)"),
        ({"sample_weight": torch.ones(2)}, ValueError, r"sample_weight must be.*got \(2,\)"),
        ({"sample_weight": torch.ones(3, requires_grad=True)}, ValueError, "takes no gradient"),
        ({"student_temperature": 0}, ValueError, "student_temperature must be a positive"),
        ({"reduction": "avg"}, ValueError, "got 'avg'"),
        ({"student": torch.ones(3, 4), "teacher": torch.ones(3, 4), "ignore_diagonal": True},
         ValueError, "must leave a pair"),
    ],
)  # fmt: skip
def test_error_messages(change, error, text):
    inputs = {"student": torch.ones(2, 3, 4), "W": torch.ones(7, 4)}
    inputs |= {"teacher": torch.ones(2, 3, 4), "V": torch.ones(7, 4)} | change
    args = [inputs.pop(name) for name in ("student", "W", "teacher", "V")]
    with pytest.raises(error, match=f"^linear_prototype_cross_entropy: .*{text}"):
        linear_prototype_cross_entropy(*args, **inputs)


# --------------------------------------------------------------------------------------- ranks


def on_rank(group, sizes, rows, reduction):
    linear_prototypes.BLOCK_BYTES, linear_prototypes.LEAST_ROWS = 0, rows
    own = slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1]))
    student, W, teacher, V, bias = problem(B=sum(sizes))
    weight = torch.rand(sum(sizes), dtype=torch.float64)
    options = {"bias": bias, "ignore_diagonal": True, "reduction": reduction}
    loss, dstudent, dW = with_gradients(
        linear_prototype_cross_entropy, student[:, own], W, teacher[:, own], V,
        sample_weight=weight[own], group=group, **options,
    )  # fmt: skip
    torch.distributed.all_reduce(dW, group=group)
    if reduction != "none":  # ranks' gradients are averaged
        dstudent, dW = dstudent / len(sizes), dW / len(sizes)
    true = with_gradients(
        unfused, student, W, teacher, V, sample_weight=weight, group=fastssl.LOCAL, **options
    )
    loss_true = true[0] if true[0].dim() == 0 else true[0][:, own]
    return (loss, dstudent, dW), (loss_true, true[1][:, own], true[2])


@pytest.mark.parametrize("sizes", [(5,), (6, 3), (4, 0), (1, 2, 0, 6)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_over_ranks_as_in_one_process(sizes, reduction, ranks):
    for found, true in ranks.run(on_rank, len(sizes), sizes, 2 * (S + T), reduction):
        for x, y in zip(found, true, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def differing(group):
    student, W, teacher, V, _ = problem()
    with pytest.raises(ValueError, match="the crops and prototypes must be the same on all ranks"):
        linear_prototype_cross_entropy(
            student[: group.rank() + 1], W, teacher, V, group=group
        )  # fmt: skip


def test_ranks_that_differ_are_told(ranks):
    ranks.run(differing, 2)
