"""FeatureQueue: what it holds after any order of batches, on one process and on several."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from fastssl import LOCAL, FeatureQueue
from fastssl.ops import queue_nce


class Rows:
    """Features that count upwards, so that a row says when it came."""

    def __init__(self, dim):
        self.dim, self.next = dim, 1

    def __call__(self, B):
        numbers = torch.arange(self.next, self.next + B)
        self.next += B
        return numbers[:, None].expand(-1, self.dim).float(), numbers


def expected(K, batches):
    """Row r holds the last number written to it, -1 for none; number n goes to row (n - 1) % K."""
    last = torch.full((K,), -1)
    for n in range(1, sum(batches) + 1):
        last[(n - 1) % K] = n
    return last


BATCHES = [(3, 3, 3), (4, 4), (7, 7), (10,), (16,), (25, 1), (0, 5, 0), (9, 40, 3), (1,) * 23]


@pytest.mark.parametrize("batches", BATCHES)
def test_any_batch_sizes(batches):
    K, rows = 10, Rows(4)
    queue = FeatureQueue(K, 4, labels=True, ids=True)
    start = queue.features.clone()
    for B in batches:
        x, numbers = rows(B)
        queue.enqueue(x, labels=numbers, ids=2 * numbers)
    last, total = expected(K, batches), sum(batches)
    filled = last >= 0
    assert torch.equal(queue.labels, last)
    assert torch.equal(queue.ids, torch.where(filled, 2 * last, -1))
    assert torch.equal(queue.features[filled], last[filled, None].expand(-1, 4).float())
    assert torch.equal(queue.features[~filled], start[~filled])
    assert torch.equal(queue.bias(), torch.zeros(K).masked_fill(~filled, -torch.inf))
    assert (int(queue.pointer), int(queue.filled)) == (total % K, min(total, K))


def test_starts_with_unit_rows_of_its_own_seed():
    before = torch.get_rng_state()
    a, b, c = FeatureQueue(33, 16), FeatureQueue(33, 16), FeatureQueue(33, 16, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(a.features.norm(dim=1), torch.ones(33))
    assert torch.equal(a.features, b.features) and not torch.equal(a.features, c.features)


def test_buffers_are_written_in_place_and_the_state_comes_back_exactly():
    rows = Rows(3)
    queue = FeatureQueue(8, 3, labels=True, dtype=torch.bfloat16)
    addresses = [b.data_ptr() for b in queue.buffers()]
    for B in (5, 6):
        x, numbers = rows(B)
        queue.enqueue(x, labels=numbers)
    assert addresses == [b.data_ptr() for b in queue.buffers()]
    other = FeatureQueue(8, 3, labels=True, dtype=torch.bfloat16, seed=9)
    other.load_state_dict(copy.deepcopy(queue.state_dict()))
    for q in (queue, other):
        q.enqueue(torch.full((2, 3), 7.0), labels=torch.tensor([1, 2]))
    for name, buffer in queue.state_dict().items():
        assert torch.equal(buffer, other.state_dict()[name]), name
    assert set(queue.state_dict()) == {"features", "pointer", "filled", "labels"}


def test_rows_are_cast_and_detached_also_under_autocast():
    queue = FeatureQueue(4, 2, dtype=torch.float16)
    x = torch.tensor([[1.0, 1 / 3]], dtype=torch.float64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        queue.enqueue(x)
    assert torch.equal(queue.features[0], x[0].half())
    assert not queue.features.requires_grad


@pytest.mark.parametrize("learns", ["query", "both"])
def test_loss_then_enqueue_leaves_the_gradient_right(learns):
    """The whole queue is overwritten between the forward and the backward."""
    queue = FeatureQueue(12, 8, ids=True)
    queue.enqueue(normalize(torch.randn(7, 8), dim=1), ids=torch.arange(7))
    q = torch.randn(5, 8, requires_grad=True)  # of the queue's dtype: another would copy it
    k = torch.randn(5, 8, requires_grad=learns == "both")
    tau = torch.tensor(0.3, requires_grad=True)
    ids = torch.tensor([0, 1, 2, 50, 51])
    options = {"q_ids": ids, "queue_ids": queue.ids, "bias": queue.bias()}
    loss = queue_nce(q, k, queue.features, temperature=tau, **options)

    negatives = queue.features[:7].clone()  # the other rows are not filled
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], 1) / tau
    logits[:3, 1:4] = logits[:3, 1:4].masked_fill(torch.eye(3, dtype=torch.bool), -torch.inf)
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
    wanted = (q, tau, k) if learns == "both" else (q, tau)
    expected_grads = torch.autograd.grad(expected, wanted)

    queue.enqueue(torch.full((12, 8), 1e4), ids=torch.arange(12))
    torch.testing.assert_close(loss, expected)
    for got, want in zip(torch.autograd.grad(loss, wanted), expected_grads, strict=True):
        torch.testing.assert_close(got, want)


def test_an_empty_queue_gives_no_loss_and_no_gradient():
    queue = FeatureQueue(6, 4)
    q = torch.randn(3, 4, requires_grad=True)
    loss = queue_nce(q, q.detach(), queue.features, temperature=0.2, bias=queue.bias())
    loss.backward()
    assert loss == 0 and torch.equal(q.grad, torch.zeros(3, 4))


def test_compiles_without_a_graph_break():
    rows, eager = Rows(4), FeatureQueue(10, 4, ids=True)
    compiled = copy.deepcopy(eager)
    step = torch.compile(
        lambda x, ids: (compiled.enqueue(x, ids=ids), compiled.bias())[1],
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    for B in (6, 6, 6):
        x, numbers = rows(B)
        eager.enqueue(x, ids=numbers)
        assert torch.equal(step(x, numbers), eager.bias())
    for name, buffer in eager.named_buffers():
        assert torch.equal(buffer, compiled.get_buffer(name)), name


X, L = torch.ones(2, 4), torch.arange(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FeatureQueue(0, 4), ValueError, "size and dim must be at least 1, got 0, 4."),
        (lambda: FeatureQueue(4, 4, dtype=torch.int64), TypeError, "dtype must be floating point"),
        (lambda: FeatureQueue(4, 4, group="local"), TypeError, "a process group or a DeviceMesh"),
        (lambda: FeatureQueue(4, 3).enqueue(X), ValueError, r"x must be \(B, 3\).*got \(2, 4\)."),
        (lambda: FeatureQueue(4, 4).enqueue(X[0]), ValueError, r"x must be \(B, 4\).*got \(4,\)."),
        (lambda: FeatureQueue(4, 4).enqueue(L), TypeError, "floating-point tensor, got torch.int6"),
        (lambda: FeatureQueue(4, 4).enqueue(X, ids=L), ValueError, "Build it with ids=True."),
        (lambda: FeatureQueue(4, 4, ids=True).enqueue(X), ValueError, "ids must be given"),
        (
            lambda: FeatureQueue(4, 4, labels=True).enqueue(X, labels=L[:1]),
            ValueError,
            r"labels must be \(2,\) integers, one a row, got \(1,\) of torch.int64.",
        ),
        (
            lambda: FeatureQueue(4, 4, labels=True).enqueue(X, labels=L / 2),
            ValueError,
            r"labels must be .* got \(2,\) of torch.float32.",
        ),
        (
            lambda: FeatureQueue(4, 4).to("meta").enqueue(X),
            ValueError,
            "x must be on the queue's device meta, got cpu.",
        ),
    ],
)
def test_error_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_local_stays_itself():
    assert copy.deepcopy(LOCAL) is LOCAL and pickle.loads(pickle.dumps(LOCAL)) is LOCAL
    assert repr(LOCAL) == "fastssl.LOCAL"


def _rank_rows(rank, step, dim=2):
    """Rank r's batch in a step has r + step rows (none at first on rank 0)."""
    B = rank + step
    numbers = 100 * step + 10 * rank + torch.arange(B)
    return numbers[:, None].expand(-1, dim).float(), numbers


def _on_rank(rank, world, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    pair = dist.new_group([0, 1])
    try:
        groups = [(None, range(world)), (LOCAL, [rank])]
        groups += [(pair, [0, 1])] if rank < 2 else []
        for group, members in groups:
            together = FeatureQueue(11, 2, ids=True, labels=True, group=group)
            alone = FeatureQueue(11, 2, ids=True, labels=True, group=LOCAL)
            for step in range(4):
                x, ids = _rank_rows(rank, step)
                together.enqueue(x, labels=-ids, ids=ids)
                all_ranks = [_rank_rows(r, step) for r in members]
                x, ids = (torch.cat(parts) for parts in zip(*all_ranks, strict=True))
                alone.enqueue(x, labels=-ids, ids=ids)
                for name, buffer in alone.named_buffers():
                    assert torch.equal(buffer, together.get_buffer(name)), (name, step)
        if rank >= 2:
            with pytest.raises(ValueError, match="must contain this process"):
                FeatureQueue(4, 2, group=pair)
    finally:
        dist.destroy_process_group()


def test_equal_on_all_ranks(tmp_path):
    """Four processes, two of them, and one, with uneven and empty batches."""
    arguments = (4, f"file://{tmp_path}/rendezvous")
    torch.multiprocessing.spawn(_on_rank, arguments, nprocs=4)
