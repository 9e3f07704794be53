"""fastssl.losses.pml against pytorch-metric-learning's own classes."""

import pytest
import torch
from oracle import assert_no_worse

from fastssl import LOCAL
from fastssl.losses import NTXentLoss as LightlyNTXentLoss
from fastssl.losses import pml as ours

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LOSSES = ["NTXentLoss", "SupConLoss"]


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("pytorch_metric_learning.losses")


def grads(loss, leaves):
    """What the loss does not reach, as where it is the library's zero, has gradient 0."""
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return [loss.detach(), *torch.autograd.grad(loss, leaves, **options)]


def assert_same(got, expected, leaves):
    """Loss and gradients to 1e-5 of their largest element."""
    for x, y in zip(grads(got, leaves), grads(expected, leaves), strict=True):
        # A loss of zero is the difference of two logits, each rounded.
        zero = 1e-6 if y.dim() == 0 else 1e-7
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * y.abs().max().item() + zero)


def rows(N, D=8, device="cpu"):
    return torch.randn(N, D, device=device, requires_grad=True)


# Numbers of labels: singletons, one label, none shared, sizes from 1 to many.
@pytest.mark.parametrize("N,labels", [(1, 1), (2, 1), (2, 9), (3, 2), (7, 3), (33, 1), (50, 20)])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("device", DEVICES)
def test_labels(peer, name, N, labels, temperature, device):
    z = rows(N, device=device)
    labels = torch.randint(-2, labels - 2, (N,))
    losses = [getattr(module, name)(temperature)(z, labels) for module in (ours, peer)]
    assert_same(*losses, [z])


@pytest.mark.parametrize("name", LOSSES)
def test_labels_of_very_different_sizes(peer, name):
    z = rows(70)
    labels = torch.cat([torch.zeros(40), torch.arange(1, 16), torch.arange(1, 16)]).long()
    assert_same(getattr(ours, name)()(z, labels), getattr(peer, name)()(z, labels), [z])


@pytest.mark.parametrize("N,M", [(1, 1), (1, 2), (2, 1), (1, 5), (5, 1), (7, 12), (33, 20)])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("device", DEVICES)
def test_references(peer, name, N, M, device):
    for _ in range(4):
        z, refs = rows(N, device=device), rows(M, device=device)
        labels, ref_labels = torch.randint(0, 3, (N,)), torch.randint(0, 3, (M,))
        losses = [
            getattr(module, name)()(z, labels, ref_emb=refs, ref_labels=ref_labels)
            for module in (ours, peer)
        ]
        assert_same(*losses, [z, refs])


@pytest.mark.parametrize("name", LOSSES)
def test_one_tensor_as_both_labels(peer, name):
    z, refs, labels = rows(9), rows(9), torch.arange(9) % 3
    losses = [
        getattr(module, name)()(z, labels, ref_emb=refs, ref_labels=labels)
        for module in (ours, peer)
    ]
    assert_same(*losses, [z, refs])


def random_indices(N, M, kind):
    """Triplets or pairs with repetitions; positives are the even keys."""
    a, b = torch.randint(0, N, (2, 30))
    p = 2 * torch.randint(0, (M + 1) // 2, (30,))
    n = 2 * torch.randint(0, M // 2, (30,)) + 1
    return (a, p, n) if kind == "triplets" else (a, p, b[:20], n[:20])


@pytest.mark.parametrize("kind", ["triplets", "pairs"])
@pytest.mark.parametrize("with_refs", [True, False])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("device", DEVICES)
def test_indices(peer, name, with_refs, kind, device):
    z, refs = rows(11, device=device), rows(14, device=device)
    indices = random_indices(11, 14 if with_refs else 11, kind)
    indices = tuple(x.to(device) for x in indices)
    labels = torch.arange(11)  # not looked at
    options = {"ref_emb": refs, "ref_labels": torch.arange(14)} if with_refs else {}
    losses = [getattr(m, name)()(z, labels, indices, **options) for m in (ours, peer)]
    assert_same(*losses, [z, refs] if with_refs else [z])
    if not with_refs:
        assert_same(getattr(ours, name)()(z, indices_tuple=indices), losses[1], [z])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("missing", ["positives", "negatives", "all but one"])
def test_indices_without_a_kind(peer, name, missing):
    z, (a, p, b, n) = rows(8), random_indices(8, 8, "pairs")
    none = a[:0]
    indices = {
        "positives": (none, none, b, n),
        "negatives": (a, p, none, none),
        "all but one": (a[:1], p[:1], a[:1], n[:1]),
    }[missing]
    losses = [getattr(module, name)()(z, None, indices) for module in (ours, peer)]
    assert losses[0] == 0
    assert_same(*losses, [z])


@pytest.mark.parametrize("miner", ["MultiSimilarityMiner", "TripletMarginMiner"])
@pytest.mark.parametrize("name", LOSSES)
def test_miners(peer, name, miner):
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    z, labels = rows(20), torch.arange(20) % 5
    indices = getattr(miners, miner)()(z, labels)
    losses = [getattr(module, name)()(z, labels, indices) for module in (ours, peer)]
    assert losses[0] > 0
    assert_same(*losses, [z])


@pytest.mark.parametrize("N", [1, 2, 7, 40])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("device", DEVICES)
def test_self_supervised(peer, name, symmetric, N, device):
    z0, z1 = rows(N, device=device), rows(N, device=device)
    losses = [
        module.SelfSupervisedLoss(getattr(module, name)(0.2), symmetric=symmetric)(z0, z1)
        for module in (ours, peer)
    ]
    assert_same(*losses, [z0, z1])


@pytest.mark.parametrize("name", LOSSES)
def test_self_supervised_equals_labels(name):
    z0, z1 = rows(6), rows(6)
    loss = getattr(ours, name)()
    got = ours.SelfSupervisedLoss(loss)(z0, z1)
    assert_same(got, loss(torch.cat([z0, z1]), torch.arange(12) % 6), [z0, z1])


@pytest.mark.parametrize("B,size", [(5, 23), (8, 16), (16, 16)])
@pytest.mark.parametrize("variant", ["labels", "indices", "pair miner", "triplet miner", "mixed"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("device", DEVICES)
def test_cross_batch_memory(peer, name, variant, B, size, device):
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    make = {
        "pair miner": miners.MultiSimilarityMiner,
        "triplet miner": miners.TripletMarginMiner,
        "mixed": miners.TripletMarginMiner,
    }.get(variant, lambda: None)
    banks = [
        module.CrossBatchMemory(getattr(module, name)(), 8, size, miner=make())
        for module in (ours, peer)
    ]
    for _ in range(7):
        z, labels = rows(B, device=device), torch.randint(0, 3, (B,))
        indices = None
        if variant in ("indices", "mixed"):
            # Pairs besides those of the labels or the miner must agree with the labels to be of
            # one kind, so they are taken among the rows stored first: slots 0 to 3, if not new.
            memory_labels = banks[1].label_memory.clone().cpu()
            new = (torch.arange(B) + banks[1].queue_idx) % size
            memory_labels[new] = labels
            same = labels[:, None] == memory_labels[:4]
            positive, negative = same.nonzero().unbind(1), (~same).nonzero().unbind(1)
            indices = (*positive, *negative)
        losses = [bank(z, labels, indices) for bank in banks]
        assert_same(*losses, [z])
        for x, y in zip(banks[0].buffers(), banks[1].buffers(), strict=True):
            assert torch.equal(x, y)
        assert banks[0].queue_idx == banks[1].queue_idx
        assert banks[0].has_been_filled == banks[1].has_been_filled


@pytest.mark.parametrize("name", LOSSES)
def test_cross_batch_memory_with_an_enqueue_mask(peer, name):
    banks = [m.CrossBatchMemory(getattr(m, name)(), 8, 12) for m in (ours, peer)]
    for _ in range(5):
        z, labels = rows(10), torch.randint(0, 3, (10,))
        mask = torch.arange(10) % 2 == 0
        losses = [bank(z, labels, enqueue_mask=mask) for bank in banks]
        assert_same(*losses, [z])
    # One query and two rows stored, one of its label: too few pairs of each kind for the library.
    banks = [m.CrossBatchMemory(getattr(m, name)(), 8, 12) for m in (ours, peer)]
    z, labels, mask = rows(3), torch.tensor([0, 1, 0]), torch.tensor([True, True, False])
    losses = [bank(z, labels, enqueue_mask=mask) for bank in banks]
    assert losses[0] == 0
    assert_same(*losses, [z])
    before = banks[0].embedding_memory.clone()
    z = rows(4)
    loss = banks[0](z, torch.zeros(4).long(), enqueue_mask=torch.ones(4, dtype=torch.bool))
    assert loss == 0 and (torch.autograd.grad(loss, z)[0] == 0).all()
    assert not torch.equal(before, banks[0].embedding_memory)


@pytest.mark.parametrize("name", LOSSES)
def test_cross_batch_memory_where_the_library_errs(name):
    # A batch of one is not its own positive.
    bank = ours.CrossBatchMemory(getattr(ours, name)(), 8, 12)
    bank(rows(3), torch.tensor([1, 2, 3]))
    assert bank(rows(1), torch.tensor([4])) == 0
    # Nothing stored does not make an empty memory a full one.
    bank.reset_queue()
    loss = bank(rows(3), torch.tensor([0, 0, 1]), enqueue_mask=torch.zeros(3, dtype=torch.bool))
    assert loss == 0 and not bank.has_been_filled


def test_cross_batch_memory_resumes():
    bank, copy = (ours.CrossBatchMemory(ours.SupConLoss(), 8, 12) for _ in range(2))
    for _ in range(4):
        bank(rows(5), torch.randint(0, 3, (5,)))
    copy.load_state_dict(bank.state_dict())
    z, labels = rows(5), torch.randint(0, 3, (5,))
    assert torch.equal(bank(z, labels), copy(z, labels))
    assert torch.equal(bank.embedding_memory, copy.embedding_memory)


def test_a_wrapper_says_more_than_its_loss():
    loss = ours.SupConLoss(exchange="ring")
    assert ours.SelfSupervisedLoss(loss).loss is loss
    wrapped = ours.CrossBatchMemory(loss, 8, group=LOCAL).loss
    assert repr(wrapped) == "SupConLoss(temperature=0.1, group=fastssl.LOCAL, exchange='ring')"
    assert loss.group is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [12, 65])
@pytest.mark.parametrize("use", ["labels", "references", "indices"])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_errs_no_more_than_the_peer(peer, name, use, N, dtype):
    tensors = [torch.randn(N, 32), torch.randn(N + 3, 32)][: 2 if use == "references" else 1]
    labels, ref_labels = torch.arange(N) % (N // 4), torch.arange(N + 3) % (N // 4)
    indices = random_indices(N, N, "triplets") if use == "indices" else None

    def run(module, dtype):
        leaves = [x.bfloat16().half().to(dtype).requires_grad_() for x in tensors]
        options = {"ref_emb": leaves[1], "ref_labels": ref_labels} if len(leaves) == 2 else {}
        return grads(getattr(module, name)(0.1)(leaves[0], labels, indices, **options), leaves)

    results = run(ours, dtype), run(peer, torch.float64), run(peer, dtype)
    for i, xs in enumerate(zip(*results, strict=True)):
        assert_no_worse(*xs, 2 if i == 0 else 3, 10.0 if i == 0 else 0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    z = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    refs = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 0, 1, 3])
    loss = getattr(ours, name)(0.5)
    torch.autograd.gradcheck(lambda z: loss(z, labels), z)
    torch.autograd.gradcheck(
        lambda z, refs: loss(z, labels, ref_emb=refs, ref_labels=labels[:5] + 0), (z, refs)
    )
    indices = random_indices(7, 7, "pairs")
    torch.autograd.gradcheck(lambda z: loss(z, None, indices), z)


z, labels = torch.randn(4, 8), torch.tensor([0, 0, 1, 1])
bank = ours.CrossBatchMemory(ours.SupConLoss(), 8, 6)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ours.NTXentLoss(0.0), ValueError, "NTXentLoss: temperature must be positive"),
        (lambda: ours.NTXentLoss(distance=1), TypeError, "NTXentLoss: distance is not supported"),
        (lambda: ours.SupConLoss(exchange="all"), ValueError, "SupConLoss: exchange must be"),
        (lambda: ours.SupConLoss(reducer=1), TypeError, "SupConLoss: reducer is not supported"),
        (lambda: ours.SupConLoss()(z), ValueError, "give labels or indices_tuple, got neither"),
        (lambda: ours.SupConLoss()(z, labels.float()), TypeError, "must be an integer tensor"),
        (lambda: ours.NTXentLoss()(z, labels[:3]), ValueError, r"labels must have shape \(4,\)"),
        (lambda: ours.NTXentLoss()(z, labels, ref_emb=z), ValueError, "ref_labels is needed"),
        (lambda: ours.NTXentLoss()(z, None, (labels,)), ValueError, r"or 4 \(pairs\), got 1"),
        (lambda: ours.SupConLoss()(z, None, (labels,) * 3), ValueError, "positive and negative"),
        (
            lambda: ours.SupConLoss()(z, labels, ref_emb=z[:, :5], ref_labels=labels),
            ValueError,
            "ref_emb must have embeddings's width D=8",
        ),
        (
            lambda: ours.SelfSupervisedLoss(LightlyNTXentLoss()),
            TypeError,
            "SelfSupervisedLoss: loss must be a fastssl.losses.pml NTXentLoss or SupConLoss",
        ),
        (lambda: ours.CrossBatchMemory(torch.nn.ReLU(), 8), TypeError, "got torch.nn.modules"),
        (
            lambda: ours.SelfSupervisedLoss(ours.SupConLoss())(z, z[:3]),
            ValueError,
            "both views must have one shape",
        ),
        (
            lambda: bank(torch.randn(7, 8), torch.arange(7)),
            ValueError,
            "must fit into memory_size=6, got 7",
        ),
        (lambda: bank(torch.randn(3, 5), torch.arange(3)), ValueError, r"must be \(N, 8\), got"),
        (
            lambda: bank(z, labels, (labels,) * 3, labels > 0),
            ValueError,
            "indices_tuple or enqueue_mask, got both",
        ),
        (lambda: bank(z, labels, enqueue_mask=labels), ValueError, r"\(4,\) of torch.bool"),
    ],
)
def test_error_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
