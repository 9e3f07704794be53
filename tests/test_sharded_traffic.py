"""What the sharded losses send and hold: bytes counted in a wrapped backend, and live tensors."""

import importlib.util
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import WORLD
from torch.distributed import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fastssl.ops import info_nce, queue_nce, siglip

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks/scaling.py")
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)

ROWS, D = 32, 64


def problem(loss: str, exchange: str, group, dtype=torch.bfloat16) -> tuple:
    """A forward and backward, to call, where all inputs take a gradient; ROWS rows of features."""
    q, k = (torch.randn(ROWS, D).div(8).to(dtype).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (5.0, -5.0))
    queue = torch.randn(8, D).to(dtype)
    partner = torch.arange(ROWS).roll(ROWS // 2)
    same = {"logit_scale": scale, "group": group, "exchange": exchange}

    def step():
        if loss in ("clip", "info_nce"):
            value = info_nce(q, k, symmetric=loss == "clip", **same)
        elif loss == "siglip":
            value = siglip(q, k, logit_bias=bias, **same)
        elif loss == "queue":
            value = queue_nce(q, k, queue, logit_scale=scale, group=group, queue_sharded=True)
        else:
            value = info_nce(q, target=partner, **same)
        return torch.autograd.grad(value, [q, scale] if loss == "nt_xent" else [q, k, scale])

    return step, (q, k)


# ------------------------------------------------------------------------------------------ bytes


class Counting(dist.ProcessGroup):
    """gloo, and the bytes that each collective brings to this rank."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self.gloo, self.received = dist.ProcessGroupGloo(store, rank, size, timeout), 0

    def getBackendName(self):
        return "counting"

    def _set_group_name(self, name):
        self.name = name

    @property
    def group_name(self):
        return self.name

    def all_gather_single_coalesced(self, outputs, inputs, options):
        self.received += sum(out.nbytes - x.nbytes for out, x in zip(outputs, inputs, strict=True))
        return self.gloo.all_gather_single_coalesced(outputs, inputs, options)

    def reduce_scatter_single_coalesced(self, outputs, inputs, options):
        self.received += sum(x.nbytes - out.nbytes for out, x in zip(outputs, inputs, strict=True))
        return self.gloo.reduce_scatter_single_coalesced(outputs, inputs, options)

    def all_to_all_single(self, output, x, taken, given, options):
        own = taken[self.rank()] * output[:1].nbytes
        self.received += output.nbytes - own
        return self.gloo.all_to_all_single(output, x, taken, given, options)

    def allreduce(self, tensors, options):
        world = self.size()
        self.received += sum(2 * (world - 1) / world * x.nbytes for x in tensors)
        return self.gloo.allreduce(tensors, options)


def counting_groups(lists: list[list[int]]) -> list[Counting]:
    """New groups, which all processes make; those that this one is in."""
    if "counting" not in dist.Backend.backend_list:
        dist.Backend.register_backend("counting", Counting, devices=["cpu"])
    groups = [dist.new_group(members, backend="counting") for members in lists]
    return [g for g in groups if isinstance(g, Counting)]


def count(_, W: int, cases: list[tuple]) -> list[float]:
    groups = counting_groups([list(range(W))])
    received = []
    for loss, exchange, dtype in cases if groups else []:
        groups[0].received = 0
        problem(loss, exchange, groups[0], dtype)[0]()
        received.append(groups[0].received)
    return received


def count_hybrid(_, losses: tuple[str, ...]) -> list[list[float]]:
    between, inside = counting_groups([[0, 2], [1, 3], [0, 1], [2, 3]])
    mesh = DeviceMesh.from_group(
        [between, inside], "cpu", [[0, 1], [2, 3]], mesh_dim_names=("nodes", "ranks")
    )
    received = []
    for loss in losses:
        between.received = inside.received = 0
        problem(loss, "ring", mesh)[0]()
        received.append([between.received, inside.received])
    return received


# A backend in Python gets its calls by the names that torch has for them.
named = pytest.mark.skipif(
    not hasattr(dist.ProcessGroup, "all_gather_single_coalesced"),
    reason="this torch calls a backend's collectives by other names",
)
LOSSES = ("clip", "nt_xent", "siglip")


@named
@pytest.mark.parametrize("W", [2, 3, 4])
def test_bytes(ranks, W):
    cases = [
        (loss, exchange, dtype)
        for loss in (*LOSSES, "info_nce")
        for exchange in ("gather", "ring")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    cases.append(("queue", "gather", torch.bfloat16))
    want = [
        scaling.wire_bytes(loss, exchange, ROWS, D, dtype.itemsize, W)
        for loss, exchange, dtype in cases
    ]
    for received in ranks.run(count, WORLD, W, cases)[:W]:
        assert received == pytest.approx(want, rel=1e-12)


@named
def test_bytes_of_a_ring_round_nodes(ranks):
    want = [scaling.hybrid_bytes(loss, ROWS, D, 2, nodes=2, each=2) for loss in LOSSES]
    for received in ranks.run(count_hybrid, WORLD, LOSSES):
        for got, expected in zip(received, want, strict=True):
            assert got == pytest.approx(expected, rel=1e-12)


# ----------------------------------------------------------------------------------------- memory


class Live(TorchDispatchMode):
    """The largest tensor that an op returned, and the most bytes that were alive, by dtype."""

    def __init__(self, inputs):
        super().__init__()
        self.largest, self.alive, self.most = 0, Counter(), Counter()
        self.known = WeakIdKeyDictionary({x.untyped_storage(): True for x in inputs})

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.add(x)
        return result

    def add(self, x: torch.Tensor) -> None:
        self.largest = max(self.largest, x.numel())
        storage = x.untyped_storage()
        if storage in self.known:
            return
        self.known[storage] = True
        for key in (x.dtype, "all"):
            self.alive[key] += storage.nbytes()
            self.most[key] = max(self.most[key], self.alive[key])
            weakref.finalize(storage, self.alive.subtract, {key: storage.nbytes()})


def hold(group, loss: str, exchange: str) -> list[int]:
    """The least of a few runs: gloo's thread may keep what it has sent for a moment longer."""
    runs = []
    for _ in range(9):
        step, inputs = problem(loss, exchange, group)
        live = Live(inputs)
        with live:
            gradients = step()
        assert all(x.isfinite().all() for x in gradients)
        runs.append((live.largest, live.most[torch.bfloat16], live.most["all"]))
    return [min(each) for each in zip(*runs, strict=True)]


def most(answers: list[tuple]) -> list[int]:
    """Of all ranks, each number's maximum."""
    return [max(each) for each in zip(*answers, strict=True)]


BLOCK = ROWS * D  # elements of a rank's keys


@pytest.mark.parametrize("loss", LOSSES)
def test_a_ring_holds_two_blocks(ranks, loss):
    largest, keys, _ = most(ranks.run(hold, 4, loss, "ring"))
    assert largest == BLOCK < (4 * ROWS) * ROWS  # elements; the second: all keys by own rows
    assert keys <= 2 * BLOCK * torch.bfloat16.itemsize


@pytest.mark.parametrize("loss", LOSSES)
def test_a_gather_holds_the_keys_once(ranks, loss):
    largest, keys, _ = most(ranks.run(hold, 4, loss, "gather"))
    gradients = {"clip": 2, "nt_xent": 1, "siglip": 0}[loss]  # made while the keys are there
    assert largest == 4 * BLOCK
    assert keys == (4 + gradients) * BLOCK * torch.bfloat16.itemsize


# ------------------------------------------------------------------------------------------- page


def test_page_has_the_tables_of_the_script():
    page = (ROOT / "docs/distributed.md").read_text()
    table = page.split("<!-- scaling: begin -->\n")[1].split("\n<!-- scaling: end -->")[0]
    assert table == scaling.page()
