"""The losses over prototypes as modules, against lightly's and against DINOv2's formulas."""

import copy
import operator
import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastssl import LOCAL
from fastssl.losses import DINOLoss, IBOTPatchLoss, SwaVLoss, dinov2, power_law_marginal
from fastssl.losses.dinov2 import TeacherAssignment
from fastssl.ops import sinkhorn

K = 24


def scores(*shape, dtype=torch.float32):
    """In fp64 first: the same numbers in every dtype."""
    return (0.3 * torch.randn(*shape, K, dtype=torch.float64)).to(dtype)


def graded(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def same(ours, theirs, leaves):
    """Loss and gradients; lightly's losses have shape () or (1,)."""
    got, expected = graded(ours, *leaves), graded(theirs.squeeze(), *leaves)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def peer(name, *args):
    return getattr(pytest.importorskip("lightly.loss"), name)(*args)


def entropy(q, y, student_temp=0.1):
    """-sum_k q log softmax(y / T_s), of all teachers with all students: (T, S, B)."""
    return -torch.einsum("tbk,sbk->tsb", q, (y / student_temp).log_softmax(-1))


def mask_of(images, side=5, share=0.4):
    mask = torch.rand(images, side, side) < share
    mask[0] = False  # an image of which nothing is masked
    return mask


# ---------------------------------------------------------------------------------------- lightly


@pytest.mark.parametrize("low", [0, 3])
@pytest.mark.parametrize("queue", [None, 6])
@pytest.mark.parametrize("options", [(), (0.2, 5, 0.1), (0.1, 1, 0.05)])
def test_swav_equals_lightly(options, queue, low):
    theirs, ours = peer("SwaVLoss", *options), SwaVLoss(*options)
    crops = [scores(7).requires_grad_() for _ in range(2 + low)]
    queues = None if queue is None else [scores(queue) for _ in range(2)]
    same(ours(crops[:2], crops[2:], queues), theirs(crops[:2], crops[2:], queues), crops)
    same(ours(crops, []), theirs(crops, []), crops)


def test_swav_jointly_hard_and_by_a_power_law():
    student = scores(4, 7, dtype=torch.float64)
    queue = scores(2, 5, dtype=torch.float64)
    high, low = student[:2], student[2:]

    def written_out(codes):
        losses = entropy(codes, student)
        return (losses.sum() - losses.diagonal().sum()) / (7 * 6)

    torch.testing.assert_close(
        SwaVLoss(joint=True)(high, low, queue),
        written_out(
            sinkhorn(high.flatten(0, 1), 0.05, queue_scores=queue.flatten(0, 1)).view(2, 7, K)
        ),
    )
    for dtype in (torch.float64, torch.float32, torch.float16):
        codes = sinkhorn(high.to(dtype), 0.05, hard=True).double()
        assert codes.sum() == 2 * 7
        torch.testing.assert_close(
            SwaVLoss(hard=True)(high.to(dtype), low.to(dtype)).double(), written_out(codes),
            rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=0,
        )  # fmt: skip
    marginal = power_law_marginal(K, 0.25)
    assert marginal.sum().item() == pytest.approx(1)
    assert marginal[15] / marginal[0] == pytest.approx(0.5)
    loss = SwaVLoss(marginal=marginal, sinkhorn_iterations=20)
    codes = sinkhorn(high, 0.05, 20, marginal=marginal.double())
    torch.testing.assert_close(loss(high, low), written_out(codes))
    assert not loss.state_dict() and loss.double().marginal.dtype == torch.float64


@pytest.mark.parametrize("T,S", [(2, 5), (1, 2), (2, 1)])
def test_dino_equals_lightly(T, S):
    options = (K, 0.04, 0.07, 3, 0.2, 0.8)
    theirs, ours = peer("DINOLoss", *options), DINOLoss(*options)
    for epoch in range(5):
        leaves = [scores(6).requires_grad_() for _ in range(S)]
        call = [scores(6) for _ in range(T)], leaves
        given = {"teacher_temp": 0.05} if epoch == 4 else {"epoch": epoch}
        same(ours(*call, **given), theirs(*call, **given), leaves)
        torch.testing.assert_close(ours.center, theirs.center)
    same(ours(*call), theirs(*call), leaves)


def test_ibot_equals_lightly():
    options = (K, 0.05, 0.2, "mean", 0.8)
    theirs, ours = peer("IBOTPatchLoss", *options), IBOTPatchLoss(*options)
    for temperature in (None, 0.07, None):
        mask = mask_of(6)
        teacher, student = scores(2, int(mask.sum())).requires_grad_()
        same(
            ours(teacher, student, mask, temperature),
            theirs(teacher.detach(), student, mask, temperature), [student],
        )  # fmt: skip
        torch.testing.assert_close(ours.center.center, theirs.center.value)


@pytest.mark.parametrize("name, ours", [("DINOLoss", DINOLoss), ("IBOTPatchLoss", IBOTPatchLoss)])
def test_lightlys_checkpoints_load(name, ours):
    theirs, ours = peer(name, K), ours(K)
    for buffer in theirs.buffers():
        buffer.normal_()
    ours.load_state_dict(theirs.state_dict())
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("centering", ["sinkhorn", "none"])
def test_other_centerings(centering):
    mask = mask_of(4)
    teacher, student = scores(3, 6, dtype=torch.float64), scores(4, 6, dtype=torch.float64)
    tokens, masked = scores(2, int(mask.sum()), dtype=torch.float64)

    def codes(x):
        x = x.flatten(0, -2) if centering == "sinkhorn" else x
        return sinkhorn(x, 0.04, 5) if centering == "sinkhorn" else (x / 0.04).softmax(-1)

    losses = entropy(codes(teacher).view_as(teacher), student)
    expected = (losses.sum() - losses.diagonal().sum()) / (6 * (12 - 3))
    dino = DINOLoss(K, centering=centering, n_iters=5)
    torch.testing.assert_close(dino(teacher, student), expected)
    ibot = IBOTPatchLoss(K, centering=centering, n_iters=5)
    weight = (1 / mask.sum((1, 2), keepdim=True)).expand_as(mask)[mask].double()
    expected = (entropy(codes(tokens)[None], masked[None])[0, 0] * weight).sum() / 4
    torch.testing.assert_close(ibot(tokens, masked, mask), expected)
    assert not dino.center.any() and not ibot.center.center.any(), "nothing follows a centre"


def test_attributes_as_lightlys():
    theirs, ours = peer("DINOLoss", K, 0.04, 0.07, 4), DINOLoss(K, 0.04, 0.07, 4)
    assert theirs.warmup_teacher_temp_epochs == ours.warmup_teacher_temp_epochs == 4
    torch.testing.assert_close(ours.teacher_temp_schedule, theirs.teacher_temp_schedule)
    x = scores(2, 5)
    theirs.update_center(x)
    ours.update_center(x)
    torch.testing.assert_close(ours.center, theirs.center)
    theirs, ours = peer("IBOTPatchLoss", K), IBOTPatchLoss(K)
    theirs.center.update(x[0])
    ours.center.update(x[0])
    assert theirs.center.momentum == ours.center.momentum
    torch.testing.assert_close(ours.center.value, theirs.center.value)


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor])
def test_temperatures_of_other_types(number):
    x, y, mask = scores(2, 6), scores(4, 6), torch.ones(3, 2, 1, dtype=torch.bool)
    low, high = float(number(0.05)), float(number(0.2))
    same = torch.testing.assert_close
    same(SwaVLoss(number(0.2), 3, number(0.05))(y, []), SwaVLoss(high, 3, low)(y, []))
    expected = DINOLoss(K, low, high, 3, high)(x, y, epoch=1)
    same(DINOLoss(K, number(0.05), number(0.2), 3, number(0.2))(x, y, epoch=1), expected)
    same(DINOLoss(K)(x, y, number(0.05)), DINOLoss(K)(x, y, low))
    ours, expected = IBOTPatchLoss(K, number(0.05), number(0.2)), IBOTPatchLoss(K, low, high)
    same(ours(x[0], y[0], mask), expected(x[0], y[0], mask))
    same(ours(x[0], y[0], mask, number(0.2)), expected(x[0], y[0], mask, high))
    loss, other = dinov2.DINOLoss(K, number(0.2)), dinov2.DINOLoss(K, high)
    for make in ("softmax_center_teacher", "sinkhorn_knopp_teacher"):
        same(
            loss([*y], getattr(loss, make)(x, number(0.05))),
            other([*y], getattr(other, make)(x, low)),
        )


def no_masked_tokens(group, centering):
    """The losses, their gradients and centres, of ranks that have none."""
    x, y = torch.empty(2, 0, K, dtype=torch.float16), torch.empty(0, K).requires_grad_()
    masks = torch.zeros(3, 4, dtype=torch.bool)
    ours = IBOTPatchLoss(K, centering=centering, group=group)
    ours.center.center.fill_(0.5)
    objects = dinov2.iBOTPatchLoss(K, group=group)
    teachers = (
        objects.sinkhorn_knopp_teacher(x[0], 0.05), objects.softmax_center_teacher(x[0], 0.05),
        torch.empty(0, K),
    )  # fmt: skip
    losses = [ours(x[0], y, masks.view(3, 2, 2))]
    losses += [objects.forward_masked(y, teacher, masks) for teacher in teachers]
    return [graded(loss, y) for loss in losses], ours.center.value


@pytest.mark.parametrize("centering", ["mean", "sinkhorn", "none"])
def test_no_masked_tokens(centering, ranks):
    alone, over_ranks = (
        no_masked_tokens(LOCAL, centering),
        ranks.run(no_masked_tokens, 2, centering),
    )
    for found, center in (alone, *over_ranks):
        for value, gradient in found:
            assert value.dtype == torch.float32 and value == 0 and gradient.shape == (0, K)
        torch.testing.assert_close(center, torch.full_like(center, 0.5))


# -------------------------------------------------------------------------------- lists and tensors


def test_crops_of_a_generator():
    x, y = scores(2, 6), scores(4, 6)
    assert torch.equal(DINOLoss(K)((c for c in x), (c for c in y)), DINOLoss(K)(x, y))


def test_made_and_run_without_memory():
    for device in (torch.device("meta"), FakeTensorMode()):
        with device:
            loss = DINOLoss(K, 0.04, 0.07, 3)
            assert loss(torch.randn(2, 6, K), torch.randn(4, 6, K), epoch=1).shape == ()


LAYOUTS = {
    "separate": lambda x: [crop.clone() for crop in x],
    "chunks": lambda x: x.flatten(0, 1).chunk(len(x)),
    "samples first": lambda x: x.transpose(0, 1).contiguous().unbind(1),
    "backwards": lambda x: x.flip(0).unbind()[::-1],
    "uneven": lambda x: operator.itemgetter(0, 1, 3, 4)(x[[0, 1, 0, 2, 3]]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_crops_in_one_storage(layout):
    teacher, student = scores(2, 6), scores(4, 6).requires_grad_()
    expected = graded(DINOLoss(K)(teacher, student), student)
    crops = LAYOUTS[layout](student)
    loss = DINOLoss(K)([*teacher], crops)
    by_crop = torch.autograd.grad(loss, crops, retain_graph=True)
    torch.testing.assert_close(graded(loss, student), expected)
    torch.testing.assert_close(torch.stack(by_crop), expected[1])


def test_chunks_are_not_copied():
    student, kept = scores(4 * 6).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        DINOLoss(K)(scores(2, 6), student.chunk(4))
    assert student.untyped_storage().data_ptr() in {x.untyped_storage().data_ptr() for x in kept}
    loss = DINOLoss(K)(scores(2, 6), student.chunk(4))
    with torch.no_grad():
        student.add_(1)
    with pytest.raises(RuntimeError, match="modified inplace"):
        loss.backward()


# ----------------------------------------------------------------------------------------- DINOv2


class Centre:
    """DINOv2's: a batch's mean is put aside, and enters at the beginning of the next softmax."""

    def __init__(self, momentum):
        self.value, self.momentum, self.waiting = torch.zeros(K).double(), momentum, None

    def softmax(self, x, temperature):
        if self.waiting is not None:
            self.value = self.value * self.momentum + self.waiting * (1 - self.momentum)
            self.waiting = None
        return ((x - self.value) / temperature).softmax(-1)

    def update(self, x):
        self.waiting = x.mean(0)


def test_dinov2_step_by_step():
    """A training step as DINOv2's: local crops, crossed global crops, masked tokens."""
    centres = Centre(0.9), Centre(0.8)
    dino = dinov2.DINOLoss(out_dim=K, student_temp=0.2)
    ibot = dinov2.iBOTPatchLoss(patch_out_dim=K, student_temp=0.2, center_momentum=0.8)
    for temperature in np.linspace(0.04, 0.07, 3):  # as DINOv2's schedule
        masks = mask_of(6).flatten(1)
        M = int(masks.sum())
        cls, tokens, masked = scores(2 * 3), scores(M), scores(M + 4).requires_grad_()
        local, crossed = scores(4 * 3).requires_grad_(), scores(2 * 3).requires_grad_()
        before = [x.clone() for x in (cls, tokens, local, crossed, masked)]

        teacher = dino.softmax_center_teacher(cls, teacher_temp=temperature)
        teacher = teacher.view(2, -1, *cls.shape[1:])
        dino.update_center(cls)
        patches = ibot.softmax_center_teacher(tokens[None][:, :M], teacher_temp=temperature)
        ibot.update_center(tokens[None])
        got = [
            dino(
                student_output_list=local.chunk(4), teacher_out_softmaxed_centered_list=teacher
            ),
            dino([crossed], [teacher.flatten(0, 1)]),
            ibot.forward_masked(
                masked, patches.squeeze(0), student_masks_flat=masks, n_masked_patches=M,
            ),
        ]  # fmt: skip

        q = centres[0].softmax(cls.double(), temperature)
        centres[0].update(cls.double())
        p = centres[1].softmax(tokens.double(), temperature)
        centres[1].update(tokens.double())
        each = (1 / masks.sum(1, keepdim=True)).expand_as(masks)[masks]
        expected = [
            entropy(q.view(2, 3, K), local.double().view(4, 3, K), 0.2).mean(-1).sum(),
            entropy(q[None], crossed.double()[None], 0.2).mean(),
            (entropy(p[None], masked.double()[None, :M], 0.2)[0, 0] * each).sum() / 6,
        ]
        for x, loss, truth in zip((local, crossed, masked), got, expected, strict=True):
            for a, b in zip(graded(loss, x), graded(truth, x), strict=True):
                torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)
        weighted = ibot.forward_masked(masked[:M], patches[0], masks, masks_weight=each)
        torch.testing.assert_close(weighted, got[2])
        assert all(map(torch.equal, before, (cls, tokens, local, crossed, masked)))
    for ours, centre, shape in ((dino, centres[0], (1, K)), (ibot, centres[1], (1, 1, K))):
        centre.softmax(cls.double(), 0.04)  # what waits comes in
        assert ours.center.shape == shape
        torch.testing.assert_close(ours.center.flatten().double(), centre.value)
    dino.init_weights()
    assert not dino.center.any()


def test_the_peers_names_of_arguments():
    loss, x = dinov2.iBOTPatchLoss(K), scores(5)
    loss.update_center(teacher_patch_tokens=x[None])
    loss.apply_center_update()
    torch.testing.assert_close(loss.center, 0.1 * x.mean(0).view(1, 1, K))
    teacher = loss.softmax_center_teacher(
        teacher_patch_tokens=x, teacher_temp=0.05, update_centers=True
    )
    torch.testing.assert_close(teacher.dense(), ((x - loss.center[0]) / 0.05).softmax(-1))
    teacher = loss.sinkhorn_knopp_teacher(
        teacher_output=x, teacher_temp=0.05, n_masked_patches_tensor=torch.tensor([5])
    )
    torch.testing.assert_close(teacher.dense(), sinkhorn(x, 0.05))
    loss = dinov2.DINOLoss(K)
    loss.update_center(teacher_output=x)
    loss.apply_center_update()
    teacher = loss.softmax_center_teacher(teacher_output=x, teacher_temp=0.05, update_centers=True)
    torch.testing.assert_close(teacher.dense(), ((x - loss.center) / 0.05).softmax(-1))


@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_dinov3(ignore_diagonal):
    dino, ibot = dinov2.DINOLoss(K), dinov2.iBOTPatchLoss(K)
    student, cls = scores(5, 3, dtype=torch.float64), scores(2, 3, dtype=torch.float64)
    teacher = dino.sinkhorn_knopp_teacher(cls.flatten(0, 1), teacher_temp=0.07)
    losses = entropy(sinkhorn(cls.flatten(0, 1), 0.07).view(2, 3, K), student)
    left_out = losses.diagonal().sum() if ignore_diagonal else 0
    got = dino(
        student_logits=student, teacher_probs=teacher.unflatten(0, (2, 3)),
        ignore_diagonal=ignore_diagonal,
    )  # fmt: skip
    pairs = 10 - 2 * ignore_diagonal
    expected = (losses.sum() - left_out) / (3 * pairs)
    torch.testing.assert_close(got, expected)
    got = dino([*student], teacher.chunk(2), ignore_diagonal)
    torch.testing.assert_close(got, pairs * expected)

    masks = mask_of(4).flatten(1)
    tokens, patches = scores(2, 4, masks.shape[1], dtype=torch.float64)
    count = masks.sum()
    masked = ibot.sinkhorn_knopp_teacher(
        tokens[masks], np.float64(0.07), n_masked_patches_tensor=count, n_iterations=4
    )
    assert count == masks.sum()
    q = sinkhorn(tokens[masks], 0.07, 4)
    each = (1 / masks.sum(1, keepdim=True)).expand_as(masks)[masks]
    expected = (entropy(q[None], patches[masks][None])[0, 0] * each).sum() / 4
    torch.testing.assert_close(ibot.forward_masked(patches[masks], masked, masks), expected)
    everywhere = torch.full_like(patches, 1 / K)
    everywhere[masks] = q
    torch.testing.assert_close(ibot(patches, everywhere, masks), expected)
    all_tokens = ibot.softmax_center_teacher(tokens, 0.07)
    per_token = entropy((tokens / 0.07).softmax(-1).view(1, -1, K), patches.view(1, -1, K))
    means = (per_token.view(4, -1) * masks).sum(1) / masks.sum(1).clamp(min=1)
    torch.testing.assert_close(ibot(patches, all_tokens, masks), means.mean())


def test_teachers_given_in_other_ways():
    loss, student = dinov2.DINOLoss(K), scores(3, 4, dtype=torch.float64)
    x = scores(2, 4, dtype=torch.float64)
    each = [loss.sinkhorn_knopp_teacher(crop, 0.05) for crop in x]  # each with its own bias
    warmer = [each[0], loss.sinkhorn_knopp_teacher(x[1], 0.07)]
    for teachers in (each, warmer, [each[0], warmer[1].dense()]):
        dense = torch.stack([t if isinstance(t, torch.Tensor) else t.dense() for t in teachers])
        expected = entropy(dense, student).mean()
        for given in (teachers, dense):
            torch.testing.assert_close(loss(student, given), expected)
            torch.testing.assert_close(loss([*student], given), 6 * expected)


def test_an_assignment_is_dense_only_when_it_must_be():
    x, bias = scores(8, dtype=torch.float16), torch.randn(K)
    teacher = TeacherAssignment(x, bias, 0.07)
    true = (x.float() / 0.07 + bias).softmax(-1)
    cases = [
        (lambda t: t.view(2, -1, *t.shape[1:])), (lambda t: t.reshape(2, 4, K).flatten(0, 1)),
        (lambda t: t.unflatten(0, (2, 4))[1]), (lambda t: t[:5]), (lambda t: t[-1]),
        (lambda t: t.unsqueeze(0).squeeze(0).detach()), (lambda t: t[torch.tensor([3, 0, 3])]),
        (lambda t: t[torch.arange(8) < 3]), (lambda t: t.chunk(3)[2]), (lambda t: t.split(5)[1]),
        (lambda t: [*t.view(2, 4, K)][1]),
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in cases:
            got = case(teacher)
            assert isinstance(got, TeacherAssignment) and got.made_dense is None
            assert got.shape == case(true).shape and got.dtype == torch.float32
            torch.testing.assert_close(got.dense(), case(true))
    assert teacher.made_dense is None
    assert (len(teacher), teacher.ndim, teacher.size(1)) == (8, 2, K)
    assert repr(teacher) == f"TeacherAssignment((8, {K}), temperature=0.07)"
    assert copy.deepcopy(teacher).shape == (8, K) and not hasattr(teacher, "no_such_thing")
    row = teacher[0]
    for case in (
        (lambda t: t.mT), (lambda t: t.sum(0)), (lambda t: t * torch.ones(K)), (lambda t: t[:, 1]),
        (lambda t: t.view(-1)), (lambda t: torch.cat([t, t])), (lambda t: t.chunk(2, dim=-1)[0]),
        (lambda t: t[torch.ones(8, K, dtype=torch.bool)]), (lambda t: t[..., torch.arange(K)]),
    ):  # fmt: skip
        with pytest.warns(UserWarning, match=r"made its \(8, 24\) probabilities. Write .dense"):
            got = case(TeacherAssignment(x, bias, 0.07))
        torch.testing.assert_close(got, case(true))
    with pytest.warns(UserWarning, match="an index made"):
        torch.testing.assert_close(row[3], true[0, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert row.sum().item() == pytest.approx(1), "dense by now"


OPERATORS = {
    "A * 2": lambda a: a * 2, "2 * A": lambda a: 2 * a, "A + 0": lambda a: a + 0,
    "1 + A": lambda a: 1 + a, "A - 1": lambda a: a - 1, "1 - A": lambda a: 1 - a,
    "A / 2": lambda a: a / 2, "2 / A": lambda a: 2 / a, "A // 0.1": lambda a: a // 0.1,
    "1 // A": lambda a: 1 // a, "A % 0.1": lambda a: a % 0.1, "1 % A": lambda a: 1 % a,
    "A**2": lambda a: a**2, "2**A": lambda a: 2**a, "A @ x": lambda a: a @ torch.ones(K),
    "x @ A": lambda a: torch.ones(8) @ a, "-A": lambda a: -a, "+A": lambda a: +a, "abs": abs,
    "A == 0.1": lambda a: a == 0.1, "A != 0.1": lambda a: a != 0.1, "A < 0.1": lambda a: a < 0.1,
    "A <= 0.1": lambda a: a <= 0.1, "A > 0.1": lambda a: a > 0.1, "A >= 0.1": lambda a: a >= 0.1,
    "A + A": lambda a: a + a, "A *= 2": lambda a: operator.imul(a, 2),
    "numpy's 2 * A": lambda a: np.float32(2) * a, "in": lambda a: torch.tensor(2.0 in a),
    "as an array": lambda a: torch.from_numpy(np.asarray(a)),
}  # fmt: skip


@pytest.mark.parametrize("case", OPERATORS)
def test_operators_take_an_assignment_as_a_tensor(case):
    x, bias = scores(8), torch.randn(K)
    with pytest.warns(UserWarning, match=r"made its \(8, 24\) probabilities"):
        got = OPERATORS[case](TeacherAssignment(x, bias, 0.07))
    true = OPERATORS[case]((x / 0.07 + bias).softmax(-1))
    torch.testing.assert_close(got, true)


def test_gradcheck():
    student, x = scores(2, 3, dtype=torch.float64).requires_grad_(), scores(2, 3).double()
    swav, masks = SwaVLoss(), torch.ones(2, 3, dtype=torch.bool)
    loss, ibot = dinov2.DINOLoss(K), dinov2.iBOTPatchLoss(K)
    teacher = loss.sinkhorn_knopp_teacher(x.flatten(0, 1), 0.07).view(2, 3, K)
    assert torch.autograd.gradcheck(lambda y: loss(y.unbind(), teacher), student)
    assert torch.autograd.gradcheck(lambda y: ibot(y, teacher, masks), student)
    assert torch.autograd.gradcheck(lambda y: swav(x, [*y]), student)


# ------------------------------------------------------------------------------ as modules at large


def test_what_repr_shows():
    group = "group=fastssl.LOCAL"
    assert repr(SwaVLoss(joint=True, sinkhorn_gather_distributed=False)) == (
        "SwaVLoss(temperature=0.1, sinkhorn_iterations=3, sinkhorn_epsilon=0.05, joint=True, "
        f"{group})"
    )
    assert repr(DINOLoss(9, centering="sinkhorn", group=LOCAL)) == (
        f"DINOLoss(9, teacher_temp=0.04, student_temp=0.1, centering='sinkhorn', {group})"
    )
    assert "9, teacher_temp=0.04, student_temp=0.1, centering='mean'" in repr(IBOTPatchLoss(9))
    assert repr(dinov2.DINOLoss(9)) == "DINOLoss(9, student_temp=0.1, center_momentum=0.9)"


def test_compiles_without_a_graph_break():
    mask = mask_of(4)
    student, tokens = scores(3, 6).requires_grad_(), scores(int(mask.sum())).requires_grad_()
    teacher, taught = scores(2, 6), scores(int(mask.sum()))
    modules = DINOLoss(K), IBOTPatchLoss(K, centering="sinkhorn"), SwaVLoss(), dinov2.DINOLoss(K)
    others = copy.deepcopy(modules)

    def step(dino, ibot, swav, objects):
        q = objects.softmax_center_teacher(teacher.flatten(0, 1), 0.05)
        p = objects.sinkhorn_knopp_teacher(teacher, 0.05)
        objects.update_center(teacher)
        return (
            dino([*teacher], [*student]) + ibot(taught, tokens, mask)
            + swav([*student[:2]], [student[2]])
            + objects([*student], q.view(2, 6, K)) + objects(student, p, True)
        )  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        got = graded(compiled(*others), student, tokens)
        torch.testing.assert_close(got, graded(step(*modules), student, tokens))
    for one, other in zip(modules, others, strict=True):
        torch.testing.assert_close([*one.buffers()], [*other.buffers()])


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda x, m: SwaVLoss()([x], []), ValueError, "another one, got 1 of high and 0 of low"),
        (lambda x, m: SwaVLoss()([], [x, x]), ValueError, "got 0 of high and 2 of low"),
        (lambda x, m: SwaVLoss()([x, x[1:]], []), ValueError,
         r"SwaVLoss: crops must be tensors \(B, K\) of one shape.*\(9, 24\), \(8, 24\)"),
        (lambda x, m: SwaVLoss()([x, x], [], [x]), ValueError, "each of the 2 high-.*got 1"),
        (lambda x, m: SwaVLoss()([x, x], [], [x[:, 1:]] * 2), ValueError, "groups, prototypes"),
        (lambda x, m: SwaVLoss(sinkhorn_gather_distributed=True)([x, x], []), ValueError,
         "SwaVLoss: sinkhorn_gather_distributed=True needs.*leave sinkhorn_gather_distributed out"),
        (lambda x, m: SwaVLoss(0.1, 3, 0.05, True, group=LOCAL), ValueError,
         "SwaVLoss: sinkhorn_gather_distributed=True contradicts group"),
        (lambda x, m: SwaVLoss(0.0), ValueError, "SwaVLoss: temperature must be.*got 0.0"),
        (lambda x, m: SwaVLoss(sinkhorn_epsilon=0), ValueError, "SwaVLoss: sinkhorn_epsilon must"),
        (lambda x, m: SwaVLoss("0.1"), ValueError, "must be a positive number.*got '0.1'"),
        (lambda x, m: SwaVLoss()([x[:0], x[:0]], []), ValueError, "must have a row"),
        (lambda x, m: SwaVLoss()([x.int(), x.int()], []), TypeError, "float32.*got torch.int32"),
        (lambda x, m: DINOLoss(K)([x], [x]), ValueError, "must be two crops, got one"),
        (lambda x, m: DINOLoss(K)([], [x]), ValueError, "teacher_out must be.*got none"),
        (lambda x, m: DINOLoss(K)(x, [x, x]), ValueError, r"teacher_out must.*one tensor \(crops"),
        (lambda x, m: DINOLoss(9)([x], [x, x]), ValueError, r"prototypes, 9, got \(1, 9, 24\)"),
        (lambda x, m: DINOLoss(K)([x], [x[1:]] * 2), ValueError, "teacher must have student's"),
        (lambda x, m: DINOLoss(K, teacher_temp=0), ValueError, "DINOLoss: teacher_temp must.*t 0"),
        (lambda x, m: DINOLoss(K, 0.0)([x], [x, x], epoch=0), ValueError, "teacher_temp must.*0.0"),
        (lambda x, m: DINOLoss(K)([x], [x, x], torch.full((2,), 0.1)), ValueError,
         r"teacher_temp must be a positive number.*got tensor\(\[0.1000, 0.1000\]\)"),
        (lambda x, m: dinov2.DINOLoss(K).sinkhorn_knopp_teacher(x, float("nan")), ValueError,
         "DINOLoss: teacher_temp must be.*got nan"),
        (lambda x, m: dinov2.iBOTPatchLoss(K, -1), ValueError, "iBOTPatchLoss: student_temp must"),
        (lambda x, m: DINOLoss(center_mode="max"), ValueError, "must be \"mean\", got 'max'"),
        (lambda x, m: DINOLoss(centering="both"), ValueError, "centering must be.*got 'both'"),
        (lambda x, m: DINOLoss(group=3), TypeError, "DINOLoss: group must be"),
        (lambda x, m: IBOTPatchLoss(K)(x, x, m[1:]), ValueError,
         "one True for each of the 9 rows of scores, got 6"),
        (lambda x, m: IBOTPatchLoss(K)(x, x, m.int()), TypeError, "must be a bool tensor.*int32"),
        (lambda x, m: IBOTPatchLoss(K)(x[:1], x[:0], m[:1, :1]), ValueError, "student's batch"),
        (lambda x, m: IBOTPatchLoss(K)(x[:, 1:], x, m), ValueError, "as many columns"),
        (lambda x, m: dinov2.DINOLoss(9).softmax_center_teacher(x, 0.1), ValueError,
         r"DINOLoss: the teacher's scores.*9, got \(9, 24\)"),
        (lambda x, m: dinov2.DINOLoss(K)([x], x), ValueError,
         r"teacher of a list of student crops must be \(T, B, K\).*got \(9, 24\)"),
        (lambda x, m: dinov2.DINOLoss(K)(student_output_list=[x]), TypeError, "Give both"),
        (lambda x, m: dinov2.iBOTPatchLoss(K).forward_masked(x, x.softmax(1), m[1:]), ValueError,
         "iBOTPatchLoss: mask must have one True for each of the 9"),
    ],
)  # fmt: skip
def test_error_messages(call, error, text):
    with pytest.raises(error, match=text):
        call(scores(9), torch.ones(3, 3, 1, dtype=torch.bool))


# ----------------------------------------------------------------------------------- several ranks


def swav(x, y, mask, group):
    return SwaVLoss(joint=True, group=group)(y[:2], y[2:], x), None


def swav_by_crop(x, y, mask, group):
    return SwaVLoss(group=group)(y[:2], y[2:]), None


def dino(x, y, mask, group):
    loss = DINOLoss(K, group=group)
    return loss(x, y) + loss(x + 1, y), loss.center


def dino_by_sinkhorn(x, y, mask, group):
    return DINOLoss(K, centering="sinkhorn", group=group)(x, y), None


def objects(x, y, mask, group):
    loss = dinov2.DINOLoss(K, group=group)
    loss.update_center(x)
    return loss([*y], loss.softmax_center_teacher(x, 0.05)), loss.center


def ibot(x, y, mask, group):
    """Masked tokens of as many images as there are rows, of some of them none."""
    loss, place = IBOTPatchLoss(K, group=group), torch.linspace(0.5, 2, mask.shape[1])
    x, y = ((z.unsqueeze(1) * place.view(1, -1, 1))[mask] for z in (x[0], y[0]))
    return loss(x, y, mask) + loss(x + 1, y, mask), loss.center.center


def on_rank(group, sizes, case):
    total, first = sum(sizes), 0 if group is LOCAL else sum(sizes[: group.rank()])
    own = slice(first, total if group is LOCAL else first + sizes[group.rank()])
    x, y = scores(2, total, dtype=torch.float64), scores(4, total, dtype=torch.float64)
    mask = torch.rand(total, 5) < 0.4
    y.requires_grad_()
    loss, center = case(x[:, own], y[:, own], mask[own], group)
    return loss.detach(), torch.autograd.grad(loss, y)[0][:, own], center


@pytest.mark.parametrize("sizes", [(5,), (6, 3), (4, 0, 7), (3, 1, 2, 4)])
@pytest.mark.parametrize("case", [swav, swav_by_crop, dino, dino_by_sinkhorn, objects, ibot])
def test_over_ranks_as_in_one_process(case, sizes, ranks):
    found = ranks.run(on_rank, len(sizes), sizes, case)
    torch.manual_seed(0)
    value, gradient, center = on_rank(LOCAL, sizes, case)
    for got, _, moved in found:
        torch.testing.assert_close(got, value, rtol=1e-10, atol=0)
        torch.testing.assert_close(moved, center)
    gradients = torch.cat([own for _, own, _ in found], 1)
    torch.testing.assert_close(gradients, len(sizes) * gradient, rtol=1e-9, atol=1e-12)
