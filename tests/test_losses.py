"""The loss modules against the libraries they replace."""

import math
import warnings

import pytest
import torch
from oracle import assert_no_worse
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from fastssl import LOCAL
from fastssl.losses import (
    ClipLoss,
    DCLLoss,
    DCLWLoss,
    InfoNCELoss,
    NTXentLoss,
    QueueNCELoss,
    SigLipLoss,
    SupConLoss,
)
from fastssl.ops import info_nce, queue_nce

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def grads(loss, leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_same(ours, peer, leaves):
    """Loss and gradients to 1e-5 of their largest element, and the rounding of logits near 14,
    which is what remains of a loss near 0."""
    with warnings.catch_warnings():  # lightly's own
        warnings.filterwarnings("ignore", "To copy construct from a tensor")
        expected = grads(peer(*leaves), leaves)
    for got, value in zip(grads(ours(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(
            got, value, rtol=1e-5, atol=1e-5 * value.abs().max().item() + 2e-6
        )


def assert_oracle(ours, peer, tensors, dtype, magnitude):
    """Against fp64, ours errs at most 2 times (3 in gradients) as much as the peer in dtype."""

    def run(loss, dtype):
        return grads(loss(*(leaves := [x.to(dtype).requires_grad_() for x in tensors])), leaves)

    rounded = [x.to(dtype) for x in tensors]
    tensors = rounded
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "To copy construct from a tensor")
        results = run(ours, dtype), run(peer, torch.float64), run(peer, dtype)
    for i, xs in enumerate(zip(*results, strict=True)):
        assert_no_worse(*xs, 2 if i == 0 else 3, magnitude if i == 0 else 0.0)


def plain_sup_con(z, labels, mask, temperature, mode, base_temperature):
    """The script's formula: z (B, V, D)."""
    B, V = z.shape[:2]
    if labels is not None:
        mask = labels[:, None] == labels[None]
    elif mask is None:
        mask = torch.eye(B, device=z.device)
    rows = z.transpose(0, 1).reshape(V * B, -1)
    anchors = rows if mode == "all" else rows[:B]
    logits = anchors @ rows.T / temperature
    self_pairs = torch.eye(V * B, dtype=torch.bool, device=z.device)[: len(anchors)]
    mask = mask.to(z.dtype).repeat(len(anchors) // B, V).masked_fill(self_pairs, 0)
    logprob = logits - logits.masked_fill(self_pairs, -torch.inf).logsumexp(1, keepdim=True)
    logprob = logprob.masked_fill(self_pairs, 0)
    count = mask.sum(1)
    mean = (mask * logprob).sum(1) / torch.where(count == 0, 1, count)
    return -(temperature / base_temperature) * mean.mean()


# ------------------------------------------------------------------------------------ open_clip


def clip_leaves(N, D, scalars, device="cpu"):
    features = [normalize(torch.randn(N, D)) for _ in range(2)]
    return [x.to(device).requires_grad_() for x in (*features, *(torch.tensor(x) for x in scalars))]


@pytest.mark.parametrize("N,D", [(1, 8), (2, 3), (33, 17), (64, 100), (300, 256)])
@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_clip_loss_equals_open_clip(N, D, learnable, device):
    peer = pytest.importorskip("open_clip.loss").ClipLoss()
    image, text, scale = clip_leaves(N, D, [14.3], device)
    for ours in (ClipLoss(), ClipLoss(store_logits=True)):
        if learnable:
            assert_same(ours, peer, [image, text, scale])
        else:
            assert_same(lambda x, y, f=ours: f(x, y, 14.3), lambda x, y: peer(x, y, 14.3),
                        [image, text])  # fmt: skip


def test_clip_loss_output_dict_and_shared_bias():
    image, text = (normalize(torch.randn(6, 8)) for _ in range(2))
    bias = torch.tensor(-3.0, requires_grad=True)
    out = ClipLoss()(image, text, 10.0, bias, output_dict=True)
    torch.testing.assert_close(out["contrastive_loss"], ClipLoss()(image, text, 10.0) + 0 * bias)
    out["contrastive_loss"].backward()
    assert bias.grad == 0


def test_clip_loss_label_smoothing():
    def plain(image, text, scale):
        logits, labels = scale * image @ text.T, torch.arange(len(image))
        losses = (cross_entropy(x, labels, label_smoothing=0.1) for x in (logits, logits.T))
        return sum(losses) / 2

    assert_same(ClipLoss(label_smoothing=0.1), plain, clip_leaves(12, 8, [14.3]))


@pytest.mark.parametrize("N,D", [(1, 8), (2, 3), (33, 17), (300, 256)])
@pytest.mark.parametrize("scalars", [[10.0, -10.0], [100.0, 3.0]])
@pytest.mark.parametrize("device", DEVICES)
def test_siglip_loss_equals_open_clip(N, D, scalars, device):
    peer = pytest.importorskip("open_clip.loss").SigLipLoss()
    leaves = clip_leaves(N, D, scalars, device)
    ours = SigLipLoss(dist_impl="gather", chunk_size=16)
    assert_same(ours, peer, leaves)
    features = leaves[:2]
    assert_same(lambda x, y: ours(x, y, 10.0, None), lambda x, y: peer(x, y, 10.0, None), features)
    loss = ours(*leaves, output_dict=True)["contrastive_loss"]
    assert torch.equal(loss, ours(*leaves))


# -------------------------------------------------------------------------------------- lightly


def two_views(N, D, device="cpu"):
    return [torch.randn(N, D, device=device, requires_grad=True) for _ in range(2)]


SIZES = [(2, 3), (33, 17), (256, 128)]


@pytest.mark.parametrize("N,D", SIZES)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("device", DEVICES)
def test_nt_xent_equals_lightly(N, D, temperature, device):
    peer = pytest.importorskip("lightly.loss").NTXentLoss(temperature)
    assert_same(NTXentLoss(temperature), peer, two_views(N, D, device))


def test_nt_xent_in_half_precision_normalises_in_fp32():
    # 1e-4 squared underflows in fp16: normalised there, such a row would become NaN or zero.
    z0, z1 = torch.randn(2, 16, 32)
    expected = NTXentLoss(0.5)(z0, z1)
    got = NTXentLoss(0.5)((1e-4 * z0).half(), (1e-4 * z1).half())
    assert got.isfinite()
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize("B", [1, 4, 12])
def test_memory_bank_equals_lightly(B):
    peer = pytest.importorskip("lightly.loss").NTXentLoss(0.1, memory_bank_size=(12, 8))
    ours = NTXentLoss(0.1, memory_bank_size=(12, 8))
    ours.bank.features.copy_(peer.memory_bank.bank)
    for step in range(5):
        leaves = two_views(B, 8)
        assert_same(ours, peer, leaves)
        if step == 3:  # without a gradient nothing is stored
            with torch.no_grad():
                torch.testing.assert_close(ours(*leaves), peer(*leaves))
            detached = leaves[0].detach(), leaves[1]
            torch.testing.assert_close(ours(*detached), peer(*detached))
        torch.testing.assert_close(ours.bank.features, peer.memory_bank.bank)
        assert ours.bank.pointer == int(peer.memory_bank.bank_ptr)


def test_memory_bank_wraps_where_lightly_truncates():
    loss = NTXentLoss(memory_bank_size=(7, 4))
    assert torch.allclose(loss.bank.features.norm(dim=1), torch.ones(7))
    expected, slot = loss.bank.features.clone(), 0
    for B in (3, 3, 3, 7, 9, 16):
        z0, z1 = two_views(B, 4)
        before = loss.bank.features.clone()
        torch.testing.assert_close(
            loss(z0, z1), queue_nce(z0, z1, before, temperature=0.5, normalize=True)
        )
        for row in normalize(z1.detach()):
            expected[slot], slot = row, (slot + 1) % 7
        torch.testing.assert_close(loss.bank.features, expected)
    copy = NTXentLoss(memory_bank_size=(7, 4))
    copy.load_state_dict(loss.state_dict())
    z0, z1 = two_views(2, 4)
    assert torch.equal(copy(z0, z1), loss(z0, z1)) and torch.equal(
        copy.bank.features, loss.bank.features
    )


def test_memory_bank_may_change_before_the_backward():
    loss = NTXentLoss(memory_bank_size=(8, 4))
    z0, z1 = two_views(3, 4)
    bank = loss.bank.features.clone()
    first = loss(z0, z1)
    loss(*two_views(3, 4))
    expected = queue_nce(z0, z1, bank, temperature=0.5, normalize=True)
    for got, value in zip(grads(first, [z0, z1]), grads(expected, [z0, z1]), strict=True):
        torch.testing.assert_close(got, value)


@pytest.mark.gpu
def test_memory_bank_follows_the_features():
    loss = NTXentLoss(memory_bank_size=(8, 4))
    assert loss(*two_views(3, 4, "cuda")).device == loss.bank.features.device


def squared_distance(z0, z1):
    return ((z0 - z1) ** 2).sum(1)


DCL = {
    "plain": lambda module: module.DCLLoss(),
    "warm": lambda module: module.DCLLoss(0.5),
    "weight_fn": lambda module: module.DCLLoss(weight_fn=squared_distance),
    "DCLW": lambda module: module.DCLWLoss(),
    "DCLW, sigma": lambda module: module.DCLWLoss(temperature=0.2, sigma=0.1),
}


@pytest.mark.parametrize("N,D", SIZES)
@pytest.mark.parametrize("variant", DCL)
@pytest.mark.parametrize("device", DEVICES)
def test_dcl_equals_lightly(N, D, variant, device):
    import fastssl.losses as ours

    peer = pytest.importorskip("lightly.loss")
    assert_same(DCL[variant](ours), DCL[variant](peer), two_views(N, D, device))


def test_dclw_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DCLWLoss()(*two_views(4, 3))


# ------------------------------------------------------------------------------- SupCon's script


@pytest.mark.parametrize("B,V,D", [(1, 1, 3), (1, 2, 3), (2, 1, 5), (7, 3, 4), (33, 2, 16)])
@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("kind", ["labels", "mask", "neither"])
@pytest.mark.parametrize("device", DEVICES)
def test_sup_con_equals_the_script(B, V, D, mode, kind, device):
    z = normalize(torch.randn(B, V, D, device=device), dim=2).requires_grad_()
    given = {"labels": None, "mask": None}
    if kind == "labels":
        given["labels"] = torch.randint(0, max(1, B // 3), (B,), device=device)
    if kind == "mask":  # asymmetric, with weights and an empty row
        given["mask"] = torch.rand(B, B, device=device) * (torch.rand(B, B, device=device) < 0.4)
        given["mask"][0] = 0
    ours = SupConLoss(0.1, mode, base_temperature=0.05)
    arguments = (0.1, mode, 0.05)
    expected = grads(plain_sup_con(z, *given.values(), *arguments), [z])
    for got, value in zip(grads(ours(z, **given), [z]), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5)


def test_sup_con_flattens_and_takes_a_column_of_labels():
    z, labels = torch.randn(6, 2, 2, 3), torch.tensor([0, 1, 0, 1, 2, 2])
    expected = SupConLoss()(z.flatten(2), labels)
    assert torch.equal(SupConLoss()(z, labels), expected)
    assert torch.equal(SupConLoss()(z, labels[:, None]), expected)
    mask = (labels[:, None] == labels).float()
    torch.testing.assert_close(SupConLoss()(z, mask=mask), expected)


# ---------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N,D", [(2, 8), (33, 17), (129, 64)])
@pytest.mark.parametrize(
    "name", ["ClipLoss", "SigLipLoss", "NTXentLoss", "DCLLoss", "DCLWLoss", "SupConLoss"]
)
def test_half_precision_errs_no_more_than_the_peer(name, N, D, dtype):
    import fastssl.losses

    loss = getattr(fastssl.losses, name)()
    unit = [normalize(torch.randn(N, D)) for _ in range(2)]
    scale, bias = torch.tensor(14.0), torch.tensor(-10.0)
    if name in ("ClipLoss", "SigLipLoss"):
        peer = getattr(pytest.importorskip("open_clip.loss"), name)()
        tensors = [*unit, scale] if name == "ClipLoss" else [*unit, scale, bias]
        magnitude = 14.0 if name == "ClipLoss" else 24.0
    elif name == "SupConLoss":
        labels = torch.arange(N) % max(2, N // 4)
        tensors, magnitude = unit[:1], 14.0
        loss = lambda z, f=loss: f(z[:, None], labels)  # noqa: E731
        peer = lambda z: plain_sup_con(z[:, None], labels, None, 0.07, "all", 0.07)  # noqa: E731
    else:
        peer = getattr(pytest.importorskip("lightly.loss"), name)()
        tensors, magnitude = [torch.randn(N, D) for _ in range(2)], 10.0
    assert_oracle(loss, peer, tensors, dtype, magnitude)


# ------------------------------------------------------------------------------------------- ours


def test_own_modules_are_their_ops():
    q, k, queue = torch.randn(5, 8), torch.randn(5, 8), torch.randn(9, 8)
    ids = torch.tensor([0, 1, 0, 2, 3])
    loss = InfoNCELoss(0.2, symmetric=True, margin=0.1)
    expected = info_nce(
        q, k, temperature=0.2, symmetric=True, margin=0.1, normalize=True, q_ids=ids
    )
    torch.testing.assert_close(loss(q, k, q_ids=ids), expected)
    loss = QueueNCELoss(0.2, normalize=False, reduction="none")
    bias = torch.randn(9)
    expected = queue_nce(q, k, queue, temperature=0.2, bias=bias, reduction="none")
    torch.testing.assert_close(loss(q, k, queue, bias=bias), expected)
    assert not list(loss.parameters())
    assert "temperature=0.2, learnable=False, normalize=False" in repr(loss)


@pytest.mark.parametrize("Loss,extra", [(InfoNCELoss, []), (QueueNCELoss, [torch.randn(9, 8)])])
def test_learnable_temperature(Loss, extra):
    q, k = torch.randn(5, 8), torch.randn(5, 8)
    loss = Loss(0.25, learnable=True)
    assert loss.logit_scale.item() == pytest.approx(math.log(4))
    torch.testing.assert_close(loss(q, k, *extra), Loss(0.25)(q, k, *extra))
    loss(q, k, *extra).backward()
    tau = torch.tensor(0.25, requires_grad=True)
    op = queue_nce if extra else info_nce
    op(q, k, *extra, temperature=tau, normalize=True).backward()
    torch.testing.assert_close(loss.logit_scale.grad, -0.25 * tau.grad)
    with torch.no_grad():
        loss.logit_scale.fill_(9.0)
    loss.zero_grad()
    loss(q, k, *extra).backward()
    assert loss.logit_scale.item() == pytest.approx(math.log(100))
    assert loss.logit_scale.grad != 0, "at the bound it must find its way back"


# -------------------------------------------------------------------------------- defined corners


@pytest.mark.parametrize(
    "loss", [ClipLoss(), NTXentLoss(), DCLLoss(), DCLWLoss(), InfoNCELoss(symmetric=True)]
)
def test_one_row_is_zero_with_zero_gradient(loss):
    leaves = two_views(1, 4)
    extra = [10.0] if isinstance(loss, ClipLoss) else []
    for x in grads(loss(*leaves, *extra), leaves):
        assert (x == 0).all()


@pytest.mark.parametrize(
    "loss", [NTXentLoss(), NTXentLoss(memory_bank_size=(16, 4)), DCLWLoss(), SupConLoss()]
)
def test_compiles_without_a_graph_break(loss):
    leaves = two_views(6, 4)
    if isinstance(loss, SupConLoss):
        given = [leaves[0].view(3, 2, 4), torch.tensor([0, 1, 0])]
    else:
        given = leaves
    state = {name: x.clone() for name, x in loss.state_dict().items()}
    expected = loss(*given)
    after = {name: x.clone() for name, x in loss.state_dict().items()}
    loss.load_state_dict(state)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), expected)
    for name, x in loss.state_dict().items():
        torch.testing.assert_close(x, after[name])


def test_hyper_parameters_are_shown():
    assert "temperature=0.2, memory_bank_size=(16, 4)" in repr(NTXentLoss(0.2, (16, 4)))
    assert "contrast_mode='one'" in repr(SupConLoss(contrast_mode="one"))
    assert "temperature=0.1" in repr(nn.Sequential(DCLLoss()))


x23, x24 = torch.ones(2, 3), torch.ones(2, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: NTXentLoss(temperature=0), "NTXentLoss: temperature must be positive, got 0"),
        (lambda: NTXentLoss(memory_bank_size=64), r"must be 0 or \(rows, D\), got 64"),
        (lambda: NTXentLoss(memory_bank_size=(64, -8)), r"\(rows, D\), got \(64, -8\)"),
        (lambda: NTXentLoss(gather_distributed=True)(x23, x23), "torch.distributed, which is not"),
        (lambda: NTXentLoss(gather_distributed=True, group=LOCAL), "True contradicts group=fast"),
        (lambda: NTXentLoss(exchange="rings"), 'exchange must be "auto", "gather" or "ring"'),
        (lambda: NTXentLoss()(x23, torch.ones(3, 3)), "NTXentLoss: both views must have one shape"),
        (lambda: NTXentLoss(memory_bank_size=(9, 3))(x24, x24), "queue must have q's width D=4"),
        (lambda: DCLLoss(temperature=-1.0), "DCLLoss: temperature must be positive, got -1.0"),
        (lambda: DCLLoss(gather_distributed=True)(x23, x23), "DCLLoss: gather_distributed=True"),
        (lambda: DCLLoss()(x23, x24), "DCLLoss: both views must have one shape"),
        (lambda: DCLWLoss(sigma=0.0), "DCLWLoss: sigma must be positive, got 0.0"),
        (lambda: DCLWLoss(temperature=0.0), "DCLWLoss: temperature must be positive"),
        (lambda: ClipLoss(world_size=2), "group's, 0 and 1, got 0 and 2. Leave"),
        (lambda: ClipLoss(rank=1), "ClipLoss: rank and world_size .* got 1 and 1"),
        (lambda: ClipLoss()(x23, x24, 1.0), "q's width D=3"),
        (lambda: ClipLoss()(x23, x23, 0.0), "logit_scale must be positive"),
        (lambda: ClipLoss()(x23, x23.to("meta"), 1.0), "one device, got cpu and meta"),
        (lambda: SigLipLoss(world_size=2), "SigLipLoss: rank and world_size must"),
        (lambda: SigLipLoss(dist_impl="ring"), "dist_impl must be None.*got 'ring'"),
        (lambda: SigLipLoss()(x23, torch.ones(5, 3), 1.0, 0.0), "must have one shape"),
        (lambda: SupConLoss(temperature=0.0), "SupConLoss: temperature and base_temp"),
        (lambda: SupConLoss(contrast_mode="two"), "got 'two'"),
        (lambda: SupConLoss()(x23), r"features must be \(B, V, ...\), got \(2, 3\)"),
        (lambda: SupConLoss()(x23[:, None], torch.arange(2), torch.eye(2)), "got both"),
        (lambda: SupConLoss()(x23[:, None], mask=torch.eye(3)), r"mask must be \(2, 2\)"),
        (lambda: SupConLoss()(x23[:, None], torch.arange(3)), r"labels must have shape \(2,\)"),
        (lambda: InfoNCELoss(0.0), "InfoNCELoss: temperature must be positive, got 0.0"),
        (lambda: InfoNCELoss(0.001, learnable=True), "must start at 0.01 or more, got 0.001"),
        (lambda: InfoNCELoss(reduction="avg")(x23, x23), "got 'avg'"),
        (lambda: QueueNCELoss(-1.0), "QueueNCELoss: temperature must be positive"),
    ],
)
def test_error_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_repr_names_what_is_not_the_default():
    assert repr(ClipLoss()) == "ClipLoss()"
    assert repr(NTXentLoss(0.5)) == "NTXentLoss(temperature=0.5)"
    assert repr(SigLipLoss(group=LOCAL)) == "SigLipLoss(group=fastssl.LOCAL)"
    assert repr(NTXentLoss(0.5, gather_distributed=False)).endswith("0.5, group=fastssl.LOCAL)")
    assert repr(InfoNCELoss(exchange="ring")).endswith("reduction='mean', exchange='ring')")


def test_float_labels_are_refused():
    with pytest.raises(TypeError, match="labels must be an integer tensor"):
        SupConLoss()(x23[:, None], torch.zeros(2))
