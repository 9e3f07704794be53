"""The cross-entropy over prototypes against the formula written out, and against lightly's."""

import math

import pytest
import torch
from oracle import assert_no_worse

import fastssl
from fastssl.ops import prototype_cross_entropy, sinkhorn_bias

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ops = torch.ops.fastssl


def scores(crops, B, K, dtype=torch.float32, size=0.3):
    return (size * torch.randn(crops, B, K, dtype=torch.float64)).to(dtype)


def written_out(
    student, teacher, bias=None, student_temperature=0.1, teacher_temperature=0.04,
    ignore_diagonal=False, sample_weight=1.0, reduction="mean",
):  # fmt: skip
    x = teacher / teacher_temperature
    q = (x if bias is None else x + bias.to(x).view(-1, 1, x.shape[-1])).softmax(-1)
    losses = -torch.einsum("tbk,sbk->tsb", q, (student / student_temperature).log_softmax(-1))
    counts = torch.ones_like(losses)
    if ignore_diagonal:
        counts.diagonal().zero_()
    losses = (losses * counts).sum(0) * sample_weight
    if reduction == "none":
        return losses
    return losses.sum() / (counts.sum() if reduction == "mean" else 1)


def with_gradient(call, student, *args, **options):
    """Losses by row, and the gradient of their sum with some weights, without rounding these."""
    student = student.detach().requires_grad_()
    loss = call(student, *args, reduction="none", **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), device=loss.device).view(loss.shape).to(loss)
    return loss.detach(), torch.autograd.grad((loss * upstream).sum(), student)[0]


def check(student, teacher, device="cpu", **options):
    """Plain torch is given the kernel's inputs in fp32, and its gradient rounded once."""
    on = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    got = with_gradient(prototype_cross_entropy, student.to(device), teacher.to(device), **on)
    true = with_gradient(written_out, student.double(), teacher.double(), **options)
    peer = with_gradient(written_out, student.float(), teacher.float(), **options)
    assert got[0].dtype == torch.float32 and got[1].dtype == student.dtype
    assert_no_worse(got[0].cpu(), true[0], peer[0])
    assert_no_worse(got[1].cpu(), true[1], peer[1].to(student.dtype), 3, 20.0 * len(teacher))


PROBLEMS = {  # S, T, ignore_diagonal, bias, weight by
    "one": (1, 1, False, None, None),
    "dino": (5, 2, True, "centre", None),
    "swav": (3, 2, True, "sinkhorn", None),
    "ibot": (1, 1, False, "centre", "sample"),
    "more teachers": (2, 3, True, "sinkhorn", "row"),
    "crossed": (4, 3, False, None, "sample"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("B,K", [(1, 1), (5, 2), (33, 17), (6, 3000), (2, 65539)])
def test_oracle(B, K, kind, dtype, device):
    S, T, ignore_diagonal, bias, weight = PROBLEMS[kind]
    student = scores(S, B, K, dtype)
    teacher = scores(T, B, K, torch.float32 if kind == "crossed" else dtype)
    student[0, : B // 2] = teacher[0, : B // 2]
    options = {"ignore_diagonal": ignore_diagonal}
    if bias == "centre":
        options["bias"] = -0.1 * torch.randn(K) / 0.04
    elif bias == "sinkhorn":
        options["bias"] = sinkhorn_bias(teacher.float(), 0.04)
    if weight is not None:
        options["sample_weight"] = torch.rand((S, B) if weight == "row" else B)
    check(student, teacher, device, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "chunks"])
def test_layouts(layout, device):
    student, teacher = scores(4, 7, 50).to(device), scores(2, 7, 50).to(device)
    bias = torch.randn(2, 50)
    expected = with_gradient(prototype_cross_entropy, student, teacher, bias=bias)
    if layout == "transposed":
        student, teacher, bias = (x.mT.contiguous().mT for x in (student, teacher, bias))
    elif layout == "sliced":
        student, teacher = (torch.cat([x, x], 2)[..., 50:] for x in (student, teacher))
    else:  # samples first, as heads give crops of one sample
        student, teacher = (torch.stack([*x], 1).transpose(0, 1) for x in (student, teacher))
    got = with_gradient(prototype_cross_entropy, student, teacher, bias=bias)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{"ignore_diagonal": True}, {"sample_weight": torch.rand(3)}])
def test_gradcheck(options, reduction):
    student, teacher = (scores(n, 3, 5, torch.float64) for n in (3, 2))
    options = options | {"bias": torch.randn(2, 5).double(), "reduction": reduction}

    def loss(x):
        return prototype_cross_entropy(x, teacher, **options)

    torch.testing.assert_close(loss(student), written_out(student, teacher, **options))
    torch.autograd.gradcheck(loss, student.requires_grad_())


def test_one_crop_that_is_its_own_teacher():
    x, bias = scores(1, 4, 6)[0].requires_grad_(), torch.randn(6, requires_grad=True)
    crop = x.detach().unsqueeze(0)
    rows = prototype_cross_entropy(x, x, bias=bias, reduction="none")
    torch.testing.assert_close(rows, written_out(crop, crop, bias, reduction="none")[0])
    true = with_gradient(written_out, crop, crop, bias.detach())[1][0]
    (rows * torch.linspace(0.5, 2, 4)).sum().backward()
    torch.testing.assert_close(x.grad, true)
    assert bias.grad is None, "teacher and bias are constants"


def test_nothing_of_the_size_of_the_scores_is_kept():
    student, teacher = scores(4, 8, 100).requires_grad_(), scores(2, 8, 100)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        prototype_cross_entropy(student, teacher, bias=torch.randn(100))
    data = {student.data_ptr(), teacher.data_ptr()}
    assert sum(x.untyped_storage().nbytes() for x in kept if x.data_ptr() not in data) < 1000


# ------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("S", [3, None])
def test_the_gradient_in_place_of_the_scores(S, dtype, device):
    x, teacher = scores(S or 1, 5, 5000, dtype).to(device), scores(2, 5, 5000, dtype).to(device)
    x = (x if S else x[0]).requires_grad_()
    grads = []
    for inplace in (False, True):
        student = x.clone()
        loss = prototype_cross_entropy(student, teacher, ignore_diagonal=True, inplace=inplace)
        grads += torch.autograd.grad(loss, student, retain_graph=True)
    assert torch.equal(*grads) and grads[1].data_ptr() == student.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_who_saved_scores_that_became_a_gradient_hears_of_it():
    student = scores(2, 3, 8).requires_grad_().exp()  # whose gradient needs its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        prototype_cross_entropy(student, scores(1, 3, 8), inplace=True).backward()


# ------------------------------------------------------------------------------ op and compiler


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_opcheck(ignore_diagonal, dtype, device):
    student, teacher = scores(3, 4, 9, dtype).to(device), scores(2, 4, 9, dtype).to(device)
    args = student, teacher, torch.randn(9, device=device).expand(2, 9), 10.0, 25.0, ignore_diagonal
    torch.library.opcheck(ops.prototype_loss_fwd.default, args)
    loss, *stats = ops.prototype_loss_fwd(*args)
    args = *args, *stats, torch.rand_like(loss)
    torch.library.opcheck(ops.prototype_loss_bwd.default, args)
    torch.library.opcheck(ops.prototype_loss_bwd_.default, args)
    with pytest.raises(RuntimeError, match="student must be contiguous"):
        ops.prototype_loss_bwd_(student.mT.contiguous().mT, *args[1:])


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_a_graph_break(inplace):
    student, teacher = scores(3, 4, 9).requires_grad_(), scores(2, 4, 9)
    bias, weight = torch.randn(9), torch.rand(4)

    def loss(x, inplace):
        return prototype_cross_entropy(x, teacher, bias=bias, sample_weight=weight, inplace=inplace)

    expected = torch.autograd.grad(loss(student, False), student)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    before = student.detach().clone()
    assert torch.equal(torch.autograd.grad(compiled(student, inplace), student)[0], expected)
    assert torch.equal(student, before), "in place has no effect there"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_any_number_of_threads(dtype):
    student, teacher = scores(3, 13, 5000, dtype), scores(2, 13, 5000, dtype)
    found = []
    for n in (1, 2, 3, torch.get_num_threads()):
        torch.set_num_threads(n)
        found.append(with_gradient(prototype_cross_entropy, student, teacher))
    assert all(all(map(torch.equal, other, found[0])) for other in found[1:])


# ------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype, device):
    student, teacher = ((40 * torch.rand(n, 5, 9000) - 20).to(dtype) for n in (3, 2))
    check(student, teacher, device, student_temperature=0.04, ignore_diagonal=True)
    # Each row rises by blocks: the running maximum is replaced again and again.
    student, teacher = student.sort(-1).values, teacher.sort(-1, descending=True).values
    check(student, teacher, device, student_temperature=0.04)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_stay_visible(bad, dtype, device):
    for at in (1, 5500):
        student, teacher = (scores(n, 4, 6000, dtype).to(device) for n in (3, 2))
        student[2, 1, at] = teacher[1, 3, at] = bad
        loss, grad = with_gradient(prototype_cross_entropy, student, teacher, ignore_diagonal=True)
        expected = torch.zeros(3, 4, dtype=torch.bool, device=device)
        expected[2, 1] = expected[0, 3] = expected[2, 3] = True  # student 1 leaves teacher 1 out
        for found in (loss.isnan(), grad.isnan().all(-1), grad.isnan().any(-1)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_scores_of_minus_infinity(dtype):
    student, teacher = scores(2, 3, 10000, dtype), scores(1, 3, 10000, dtype)
    student[..., :9000] = teacher[..., :9000] = -math.inf  # as if these were not there
    rest = slice(9000, 10000)
    got = with_gradient(prototype_cross_entropy, student, teacher)
    true = with_gradient(written_out, student[..., rest].double(), teacher[..., rest].double())
    torch.testing.assert_close(got[0].double(), true[0], rtol=1e-5, atol=1e-5)
    assert (got[1][..., :9000] == 0).all() and got[1].isfinite().all()
    student[0, 0, 9000] = -math.inf  # where the teacher has weight
    student[1, 1] = -math.inf  # nothing is left
    loss = prototype_cross_entropy(student, teacher, reduction="none")
    assert loss[0, 0] == math.inf and loss[1, 1].isnan() and loss.isfinite().sum() == 4


def test_a_student_crop_without_a_pair():
    student, teacher = scores(2, 3, 8), scores(1, 3, 8)
    student[0, 0, 0] = math.nan  # not looked at
    for dtype in (torch.float32, torch.float64):
        crops = student.to(dtype), teacher.to(dtype)
        loss, grad = with_gradient(prototype_cross_entropy, *crops, ignore_diagonal=True)
        assert (loss[0] == 0).all() and (grad[0] == 0).all() and (loss[1] > 0).all()


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda x: prototype_cross_entropy(x.int(), x), TypeError, "student must be a.*int32"),
        (lambda x: prototype_cross_entropy(x, [x]), TypeError, "teacher must be one.*list.*stack"),
        (lambda x: prototype_cross_entropy(x[0, 0], x), ValueError, r"must be \(B, K\).*\(4,\)"),
        (lambda x: prototype_cross_entropy(x, x[..., :2]), ValueError,
         r"\(B, K\)=\(3, 4\), got \(2, 3, 2\)"),
        (lambda x: prototype_cross_entropy(x[:, :0], x[:, :0]), ValueError, "must have a row"),
        (lambda x: prototype_cross_entropy(x, x, student_temperature=0), ValueError,
         "student_temperature must be a positive number, got 0"),
        (lambda x: prototype_cross_entropy(x, x, teacher_temperature=math.nan), ValueError, "nan"),
        (lambda x: prototype_cross_entropy(x, x, bias=torch.ones(3)), ValueError,
         r"bias must be a tensor of shape \(4,\), or \(2, 4\).*got \(3,\)"),
        (lambda x: prototype_cross_entropy(x, x, sample_weight=torch.ones(2)), ValueError,
         r"sample_weight must be a tensor of shape \(3,\) or \(2, 3\), got \(2,\)"),
        (lambda x: prototype_cross_entropy(x[0], x[0], ignore_diagonal=True), ValueError,
         "must leave a pair"),
        (lambda x: prototype_cross_entropy(x, x, reduction="avg"), ValueError, "got 'avg'"),
        (lambda x: prototype_cross_entropy(x.mT, x.mT, inplace=True), ValueError,
         r"student must be contiguous for inplace=True, got strides \(12, 1, 4\)"),
        (lambda x: prototype_cross_entropy(x.requires_grad_(), x, inplace=True), ValueError,
         "student must be computed by a model for inplace=True, got a leaf"),
        (lambda x: prototype_cross_entropy(x[0].requires_grad_(), x, inplace=True), ValueError,
         "got a leaf"),
        (lambda x: prototype_cross_entropy(x.requires_grad_()[:1], x, inplace=True), ValueError,
         "got a leaf"),
    ],
)  # fmt: skip
def test_error_messages(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.randn(2, 3, 4))


# --------------------------------------------------------------------------- lightly, and ranks


def assert_equal(ours, theirs, student):
    torch.testing.assert_close(ours, theirs)
    grads = (torch.autograd.grad(loss, student)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_equals_lightlys_dino_loss():
    peer = pytest.importorskip("lightly.loss").DINOLoss(output_dim=500)
    peer.center.normal_().mul_(0.1)
    student, teacher = scores(4, 6, 500).requires_grad_(), scores(2, 6, 500)
    options = {"bias": -peer.center.flatten() / 0.04, "ignore_diagonal": True}
    ours = prototype_cross_entropy(student, teacher, **options)
    assert_equal(ours, peer(list(teacher), list(student)), student)


def test_equals_lightlys_ibot_loss():
    peer = pytest.importorskip("lightly.loss").IBOTPatchLoss(output_dim=500)
    mask = torch.rand(6, 4, 4) < 0.4
    student, teacher = scores(2, int(mask.sum()), 500)
    student.requires_grad_()
    each = (1.0 / mask.sum((1, 2), keepdim=True)).expand_as(mask)[mask]
    ours = prototype_cross_entropy(student, teacher, sample_weight=each, reduction="sum")
    assert_equal(ours, len(mask) * peer(teacher, student, mask), student)


def on_rank(group, sizes, dtype, reduction):
    total, first = sum(sizes), sum(sizes[: group.rank()])
    own = slice(first, first + sizes[group.rank()])
    student, teacher = scores(4, total, 11, dtype), scores(2, total, 11, dtype)
    weight = torch.rand(total)
    found = []
    for rows, where in ((own, group), (slice(None), fastssl.LOCAL)):
        x = student[:, rows].clone().requires_grad_()
        loss = prototype_cross_entropy(
            x, teacher[:, rows], sample_weight=weight[rows], ignore_diagonal=True,
            reduction=reduction, group=where,
        )  # fmt: skip
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    (got, grad), (true, true_grad) = found
    if reduction == "none":
        return (got, grad), (true[:, own], true_grad[:, own])
    return (got, grad), (true, len(sizes) * true_grad[:, own])


@pytest.mark.parametrize("sizes", [(5,), (3, 3), (6, 3), (4, 0, 7), (1, 2, 3, 4)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_over_ranks_as_in_one_process(sizes, reduction, ranks):
    for dtype in (torch.float64, torch.float32):
        found = ranks.run(on_rank, len(sizes), sizes, dtype, reduction)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        for got, true in found:
            torch.testing.assert_close(got, true, atol=tolerance, rtol=tolerance)
