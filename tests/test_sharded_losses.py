"""The loss modules over several processes: equal to one process with the whole batch."""

import types
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

import fastssl
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

D = 8


def squared_distance(z0, z1):
    return ((z0 - z1) ** 2).sum(1)


# How each is called with a rank's rows of two views and of labels, and with learnable numbers.


def clip(loss, x, y, labels, scale, bias):
    return loss(normalize(x, dim=1), normalize(y, dim=1), scale, bias)


def views(loss, x, y, *_):
    return loss(x, y)


def three_steps(loss, x, y, labels, *_):
    second = labels.unsqueeze(1) if isinstance(loss, pml.CrossBatchMemory) else y
    second = [second.roll(step, 1).squeeze(1) for step in range(3)]
    return sum((step + 1) * loss(x.roll(step, 1), second[step]) for step in range(3))


def script(loss, x, y, labels, *_):
    z = normalize(torch.stack([x, y], 1), dim=2)
    return loss(z) if loss.base_temperature == 1 else loss(z, labels)


def queue(loss, x, y, *_):
    return loss(x, y, torch.linspace(-1, 1, 11 * D, dtype=x.dtype).sin().view(11, D))


def pairs(loss, x, y, labels, *_):
    return loss(x, labels)


def references(loss, x, y, labels, *_):
    return loss(x, labels, ref_emb=y, ref_labels=(labels + 1) % 3)


def own_keys(loss, x, y, labels, *_):
    return loss(x, labels, ref_emb=y, ref_labels=labels)


def stored_and_not(loss, x, y, labels, *_):
    mask = labels > 0
    return sum(loss(x.roll(step, 1), labels, enqueue_mask=mask) for step in range(3))


def wrapped(wrapper, loss, *arguments, **options):
    def make(**sharding):
        return wrapper(loss(0.2), *arguments, **options, **sharding)

    return make


CASES = {
    "ClipLoss": (ClipLoss, {}, clip),
    "ClipLoss, smoothing": (ClipLoss, {"label_smoothing": 0.1}, clip),
    "SigLipLoss": (SigLipLoss, {}, clip),
    "NTXentLoss": (NTXentLoss, {}, views),
    "NTXentLoss, bank": (NTXentLoss, {"memory_bank_size": (13, D)}, three_steps),
    "DCLLoss": (DCLLoss, {}, views),
    "DCLLoss, weight_fn": (DCLLoss, {"weight_fn": squared_distance}, views),
    "DCLWLoss": (DCLWLoss, {"sigma": 0.1}, views),
    "SupConLoss": (SupConLoss, {}, script),
    "SupConLoss, one": (SupConLoss, {"contrast_mode": "one"}, script),
    "SupConLoss, neither": (SupConLoss, {"base_temperature": 1.0}, script),
    "InfoNCELoss": (InfoNCELoss, {"symmetric": True, "learnable": True}, views),
    "InfoNCELoss, margin": (InfoNCELoss, {"margin": 0.1, "learnable": True}, views),
    "QueueNCELoss": (QueueNCELoss, {"learnable": True}, queue),
    "pml.NTXentLoss": (pml.NTXentLoss, {}, pairs),
    "pml.NTXentLoss, references": (pml.NTXentLoss, {}, references),
    "pml.NTXentLoss, own keys": (pml.NTXentLoss, {}, own_keys),
    "pml.SupConLoss": (pml.SupConLoss, {}, pairs),
    "pml.SupConLoss, references": (pml.SupConLoss, {}, references),
    "pml.SupConLoss, own keys": (pml.SupConLoss, {}, own_keys),
}
for Loss in (pml.NTXentLoss, pml.SupConLoss):
    of = f" of {Loss.__name__}"
    CASES |= {
        "SelfSupervisedLoss" + of: (wrapped(pml.SelfSupervisedLoss, Loss), {}, views),
        "SelfSupervisedLoss, one way" + of: (
            wrapped(pml.SelfSupervisedLoss, Loss, symmetric=False), {}, views,
        ),
        "CrossBatchMemory" + of: (wrapped(pml.CrossBatchMemory, Loss, D, 13), {}, three_steps),
        "CrossBatchMemory, mask" + of: (
            wrapped(pml.CrossBatchMemory, Loss, D, 13), {}, stored_and_not,
        ),
    }  # fmt: skip


def batch(N, dtype=torch.float64):
    """Two views of N samples and their labels."""
    torch.manual_seed(N)
    x, y = torch.randn(2, N, D, dtype=torch.float64).unbind()
    return x.to(dtype), (x + y).to(dtype), torch.arange(N) % 3


def result(group, case, sizes, exchange="auto", dtype=torch.float64):
    """Loss, the gradients of this rank's rows, those of what all share, and the buffers."""
    make, options, call = CASES[case]
    if make is not QueueNCELoss:
        options = options | {"exchange": exchange}
    loss = make(**options, group=group).to(torch.promote_types(dtype, torch.float32))
    rank = 0 if group is fastssl.LOCAL else dist.get_rank(group)
    first, data = sum(sizes[:rank]), batch(sum(sizes), dtype)
    x, y, labels = (part[first : first + sizes[rank]].clone() for part in data)
    shared = [torch.tensor(value, dtype=x.dtype) for value in (9.0, -3.0)]
    leaves = [leaf.requires_grad_() for leaf in (x, y, *shared)]
    value = call(loss, x, y, labels, *shared)
    leaves += loss.parameters()
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return value.detach(), gradients[:2], gradients[2:], list(loss.buffers())


def assert_close(got, expected, dtype):
    """To a share of the largest element; logits, of up to 30, are rounded before they cancel."""
    share = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    largest = expected.abs().max().item() if expected.numel() else 0.0
    floor = 60 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, expected, rtol=0, atol=share * largest + floor)


@pytest.mark.parametrize(
    "sizes, exchange, dtype",
    [
        ((5,), "auto", torch.float64),
        ((4, 4), "gather", torch.float64),
        ((7, 2), "auto", torch.float32),
        ((3, 1, 4), "ring", torch.float64),
        ((5, 0, 2), "gather", torch.float64),
        ((3, 3, 3, 3), "ring", torch.float32),
        ((0, 6, 1, 4), "auto", torch.float64),
        ((4, 2), "auto", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process(ranks, case, sizes, exchange, dtype):
    W = len(sizes)
    results = ranks.run(result, W, case, sizes, exchange, dtype)
    value, features, shared, buffers = result(fastssl.LOCAL, case, (sum(sizes),), dtype=dtype)
    for got, *_, got_buffers in results:
        for x, y in zip((got, *got_buffers), (value, *buffers), strict=True):
            assert_close(x, y, dtype)
    for i in range(2):
        assert_close(torch.cat([own[i] for _, own, *_ in results]), W * features[i], dtype)
    for i in range(len(shared)):
        assert_close(torch.stack([own[i] for *_, own, _ in results]).mean(0), shared[i], dtype)


# -------------------------------------------------------------------------------------- the peers
# They gather over all processes there are: four, with equal shards.


def beside(group, make, call, dtype=torch.float64):
    """(value, gradients of a rank's rows, those of what all share) of the peer and of ours."""
    results = []
    for loss in make():
        torch.manual_seed(dist.get_rank())
        leaves = [*torch.randn(2, 3, D, dtype=dtype).unbind()]
        leaves += [torch.tensor(value, dtype=dtype) for value in (9.0, -3.0)]
        for leaf in leaves:
            leaf.requires_grad_()
        x, y, scale, bias = leaves
        with warnings.catch_warnings():  # deprecated collectives, and lightly's copy of a tensor
            warnings.simplefilter("ignore")
            value = call(loss, x, y, None, scale, bias)
            gradients = torch.autograd.grad(
                value, leaves, allow_unused=True, materialize_grads=True
            )
        results.append((value.detach(), torch.cat(gradients[:2]), torch.stack(gradients[2:])))
    return results


def compared(ranks, *arguments):
    """Of the peer and of ours: each rank's value, all gradients of rows, the mean of the others."""
    for results in zip(*ranks.run(beside, 4, *arguments), strict=True):
        value, rows, shared = (torch.stack(x) for x in zip(*results, strict=True))
        yield value, rows, shared.mean(0)


def make_clip(local_loss, gather_with_grad):
    import open_clip.loss

    given = {"rank": dist.get_rank(), "world_size": 4}
    given |= {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    return open_clip.loss.ClipLoss(**given), ClipLoss(**given)


def make_clip_as_trained():
    return make_clip(local_loss=True, gather_with_grad=True)


def make_clip_without_gradient():
    return make_clip(local_loss=True, gather_with_grad=False)


def make_siglip():
    import open_clip.loss

    given = {"rank": dist.get_rank(), "world_size": 4, "dist_impl": "gather"}
    return open_clip.loss.SigLipLoss(**given), SigLipLoss(**given)


def make_nt_xent():
    import lightly.loss

    return [L(gather_distributed=True) for L in (lightly.loss.NTXentLoss, NTXentLoss)]


def make_dcl():
    import lightly.loss

    return [L(gather_distributed=True) for L in (lightly.loss.DCLLoss, DCLLoss)]


def make_dclw():
    import lightly.loss

    return [L(gather_distributed=True, sigma=0.1) for L in (lightly.loss.DCLWLoss, DCLWLoss)]


@pytest.mark.parametrize(
    "library, make, call",
    [
        ("open_clip", make_clip_as_trained, clip),
        ("open_clip", make_siglip, clip),
        ("lightly", make_nt_xent, views),
        ("lightly", make_dcl, views),
    ],
)
def test_a_peers_values_are_parts_of_ours_and_its_gradients_are_ours(ranks, library, make, call):
    pytest.importorskip(library)
    peer, ours = compared(ranks, make, call)
    assert len(ours[0].unique()) == 1 and len(peer[0].unique()) == 4
    torch.testing.assert_close(peer[0].mean(), ours[0][0], rtol=0, atol=1e-6)
    for i in (1, 2):
        torch.testing.assert_close(ours[i], peer[i], rtol=1e-6, atol=1e-6)


def test_open_clip_needs_gather_with_grad(ranks):
    pytest.importorskip("open_clip")
    peer, ours = compared(ranks, make_clip_without_gradient, clip)
    torch.testing.assert_close(peer[0].mean(), ours[0][0])
    assert (peer[1] - ours[1]).abs().max() > 0.1 * ours[1].abs().max()


def test_lightly_weighs_a_ranks_own_rows(ranks):
    pytest.importorskip("lightly")
    peer, ours = compared(ranks, make_dclw, views)
    assert (peer[0].mean() - ours[0][0]).abs() > 1e-3


# ------------------------------------------------------------------------------- groups and errors


def created(group, siglip):
    import open_clip

    args = types.SimpleNamespace(
        distill=False, model="ViT-B-32", siglip=siglip, loss_dist_impl=None, local_loss=True,
        gather_with_grad=True, rank=dist.get_rank(), world_size=dist.get_world_size(),
        horovod=False,
    )  # fmt: skip
    image, text = normalize(torch.randn(2, 8, D), dim=2).unbind()
    whole = (SigLipLoss if siglip else ClipLoss)(group=fastssl.LOCAL)(image, text, 10.0, -10.0)
    fastssl.patch("open_clip")
    try:
        loss = open_clip.create_loss(args)
    finally:
        fastssl.unpatch()
    mine = slice(2 * args.rank, 2 * args.rank + 2)
    return type(loss).__module__, loss(image[mine], text[mine], 10.0, -10.0), whole


@pytest.mark.parametrize("siglip", [False, True])
def test_a_patched_open_clip_creates_a_loss_of_all_ranks(ranks, siglip):
    pytest.importorskip("open_clip")
    for module, got, expected in ranks.run(created, 4, siglip):
        assert module == "fastssl.losses.clip"
        torch.testing.assert_close(got, expected)


def without_gathering(group):
    x, y, _ = batch(3 + dist.get_rank())
    local = NTXentLoss(group=fastssl.LOCAL)(x, y)
    assert torch.equal(NTXentLoss(gather_distributed=False)(x, y), local)
    return NTXentLoss(group=group)(x, y), local


def test_losses_of_groups_apart_and_of_one_process(ranks):
    results = ranks.run(without_gathering, "pairs")
    values, local = ([float(x) for x in column] for column in zip(*results, strict=True))
    assert values[0] == values[2] != values[1] == values[3]
    assert len({*values, *local}) == 6


def message_of(group, name):
    x, y, labels = batch(4)
    calls = {
        "world_size": lambda: ClipLoss(rank=group.rank(), world_size=3, group=group),
        "rank": lambda: SigLipLoss(rank=1 - group.rank(), world_size=2, group=group),
        "own rank": lambda: ClipLoss(rank=group.rank(), world_size=2, group=group),
        "gather": lambda: DCLLoss(gather_distributed=False, group=group),
        "mask": lambda: SupConLoss(group=group)(torch.stack([x, y], 1), mask=torch.eye(4)),
        "logits": lambda: ClipLoss(store_logits=True, group=group)(x, y, 1.0),
        "indices": lambda: pml.SupConLoss(group=group)(x, labels, (labels,) * 3),
        "miner": lambda: pml.CrossBatchMemory(
            pml.NTXentLoss(group=group), D, miner=lambda *_: None
        )(x, labels),
    }
    try:
        calls[name]()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "name, message",
    [
        ("world_size", "rank and world_size must be the group's, {rank} and 2, got {rank} and 3"),
        ("rank", "must be the group's, {rank} and 2, got {other} and 2"),
        ("gather", "DCLLoss: gather_distributed=False contradicts group="),
        ("mask", "SupConLoss: a mask holds the pairs of one process"),
        ("logits", "store_logits need all logits in one place"),
        ("indices", "SupConLoss: indices and miners are for the pairs of one process"),
        ("miner", "CrossBatchMemory: indices and miners are for the pairs of one process"),
    ],
)
def test_error_messages(ranks, name, message):
    for rank, got in enumerate(ranks.run(message_of, 2, name)):
        assert message.format(rank=rank, other=1 - rank) in got


def test_rank_and_world_size_of_the_group_are_accepted(ranks):
    assert ranks.run(message_of, 2, "own rank") == [None, None]


def compiled(group, case):
    make, options, call = CASES[case]
    x, y, labels = batch(4 + 4 * group.size(), torch.float32)
    mine = slice(4 * group.rank(), 4 * group.rank() + 4)
    results = []
    for wrap in (
        lambda loss: loss,
        lambda loss: torch.compile(loss, fullgraph=True, backend="aot_eager"),
    ):
        loss = wrap(make(**options, group=group))
        leaves = [part[mine].clone().requires_grad_() for part in (x, y)]
        value = loss(*leaves) if call is not script else loss(torch.stack(leaves, 1), labels[mine])
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    return results


@pytest.mark.parametrize("case", ["NTXentLoss, bank", "DCLWLoss", "SupConLoss"])
def test_compiles_without_a_graph_break(ranks, case):
    for eager, compiled_ in ranks.run(compiled, 2, case):
        torch.testing.assert_close(compiled_, eager)
