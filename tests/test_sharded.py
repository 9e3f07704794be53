"""The similarity ops over processes: the loss and the gradients of one process with all rows.

Cases run many to a task, since a round trip costs more than a case; failures carry their names.
"""

import functools
import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed import GroupMember
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastssl
from fastssl import GradCache
from fastssl.dist import Level, Shards
from fastssl.ops import info_nce, queue_nce, sharded, siglip, sup_con

D = 5
NON_GROUP_MEMBER = GroupMember.NON_GROUP_MEMBER
SIZES = {  # rows of each rank: even, a short last batch, an empty shard, single rows
    1: [(6,)],
    2: [(5, 5), (7, 2), (0, 6)],
    3: [(4, 4, 4), (4, 0, 3)],
    4: [(3, 3, 3, 3), (5, 2, 0, 4), (1, 1, 1, 1)],
}
EXCHANGES = ("gather", "ring")


# ---------------------------------------------------------------------------------- the problems

BY_ROW = ("q", "k", "hard", "weight", "bias", "labels", "others", "single", "v")
LEAVES = ("q", "k", "hard", "weight", "bias", "scale", "logit_bias")


def batch(N, dtype=torch.float64, seed=1):
    """All that a case may need of N rows, rounded to dtype: wide features are those of the rows
    in dtype, so that the same problem can be put in float64."""
    draw = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    def numbers(high, n=N):
        return torch.randint(0, high, (n,), generator=draw)

    return {
        "q": normal(N, D), "k": normal(N, D), "hard": normal(N, 3, D),
        "weight": normal(N, dtype=wide).abs(), "bias": normal(N, dtype=wide),
        "labels": numbers(4), "others": numbers(4), "single": torch.arange(N) * 2 // 3,
        "v": normal(N, dtype=wide), "scale": torch.tensor(1.7, dtype=wide),
        "logit_bias": torch.tensor(-2.3, dtype=wide),
        "queue": normal(12, D), "queue_ids": numbers(4, 12), "queue_bias": normal(12, dtype=wide),
    }  # fmt: skip


def shard(b, sizes, rank):
    """The rank's rows of it, and an uneven part of the queue."""
    first = sum(sizes[:rank])
    own = {n: b[n][first : first + sizes[rank]] for n in BY_ROW}
    queue = {n: b[n].tensor_split([5, 6, 9][: len(sizes) - 1])[rank] for n in b if n[:5] == "queue"}
    return b | own | {"part_of_" + n: x for n, x in queue.items()}


def mixed(x, y):
    """Rows of x and y in turn: the order does not depend on where shards begin."""
    return torch.stack([x, y], 1).flatten(0, 1)


def kept(b):
    """Keys of some rows only, in any number on a rank, and the place of each row's own, or -1."""
    keep = b.labels > 1
    own = torch.where(keep, keep.cumsum(0) - 1, -1)
    return {"k": b.k[keep], "k_labels": b.others[keep], "own_key": own}


def itself(b):
    return {"q": mixed(b.q, b.k), "k": None, "target": torch.arange(2 * len(b.q)) ^ 1}


def more_keys(b):
    return {"k": mixed(b.k, b.hard[:, 0]), "target": torch.arange(len(b.q)) * 2}


# What each case gives on top of q, k and logit_scale, made of rows one by one.
NCE = {
    "rows": lambda b: {},
    "temperature": lambda b: {"temperature": b.scale, "logit_scale": None},
    "sum": lambda b: {"reduction": "sum"},
    "none": lambda b: {"reduction": "none", "symmetric": True},
    "symmetric": lambda b: {"symmetric": True, "normalize": True},
    "symmetric sum": lambda b: {"symmetric": True, "reduction": "sum"},
    "ids": lambda b: {"symmetric": True, "q_ids": b.labels},
    "ids of both": lambda b: {"q_ids": b.labels, "k_ids": b.others},
    "bias": lambda b: {"symmetric": True, "bias": b.bias},
    "margin": lambda b: {"margin": 0.1},
    "negative margin": lambda b: {"margin": -1.0, "normalize": True},
    "margin both ways": lambda b: {"margin": 0.1, "symmetric": True, "q_ids": b.labels},
    "margin, more": lambda b: {"margin": 0.3, "bias": mixed(b.bias, b.bias)} | more_keys(b),
    "decoupled": lambda b: {"decoupled": True},
    "decoupled both ways": lambda b: {"decoupled": True, "symmetric": True, "reduction": "sum"},
    "hard negatives": lambda b: {"hard_negatives": b.hard, "normalize": True},
    "smoothing": lambda b: {"label_smoothing": 0.2, "bias": b.bias},
    "smoothing both ways": lambda b: {"label_smoothing": 0.2, "bias": b.bias, "symmetric": True},
    "weights": lambda b: {"sample_weight": b.weight, "row_weight": 0.3, "symmetric": True},
    "lse": lambda b: {"return_lse": True, "symmetric": True, "q_ids": b.labels},
    "lse of rows": lambda b: {"return_lse": True, "bias": b.bias, "reduction": "none"},
    "all options": lambda b: {
        "symmetric": True, "q_ids": b.labels, "k_ids": b.others, "bias": b.bias,
        "sample_weight": b.weight, "row_weight": 0.8, "hard_negatives": b.hard,
        "return_lse": True, "normalize": True,
    },  # fmt: skip
    "more keys": more_keys,
    "more keys, ids": lambda b: {"q_ids": b.labels, "k_ids": mixed(b.labels, b.others)}
    | more_keys(b),
    "one tensor": lambda b: {"k": b.q, "symmetric": True},
    "k frozen": lambda b: {"k": b.k.detach()},
    "k frozen, bias": lambda b: {"k": b.k.detach(), "bias": b.bias, "symmetric": True},
    "q frozen": lambda b: {"q": b.q.detach()},
    "scale alone": lambda b: {"q": b.q.detach(), "k": b.k.detach(), "symmetric": True},
    "number as scale": lambda b: {"logit_scale": 3},
    "no gradient": lambda b: {"q": b.q.detach(), "k": b.k.detach(), "logit_scale": 3.0},
    "itself": itself,
    "itself, ids": lambda b: {"q_ids": mixed(b.labels, b.labels), "decoupled": True} | itself(b),
    "itself, all": lambda b: {
        "q_ids": mixed(b.labels, b.others), "sample_weight": mixed(b.weight, b.weight),
        "hard_negatives": mixed(b.hard, b.hard), "normalize": True, "reduction": "sum",
    } | itself(b),  # fmt: skip
    "itself, smoothing": lambda b: {"label_smoothing": 0.3} | itself(b),
    "itself, scale alone": lambda b: itself(b) | {"q": mixed(b.q, b.k).detach()},
    "groups": lambda b: {"q": b.hard, "k": b.hard.flip(1) * b.weight[:, None, None]},
    "groups, weights": lambda b: {
        "q": b.hard, "k": b.hard.flip(1), "symmetric": True, "margin": 0.2,
        "sample_weight": b.hard[..., 0].detach().abs().to(b.scale.dtype),
    },  # fmt: skip
}  # fmt: skip
SUP_CON = {
    **{p: lambda b, p=p: {"k": None, "labels": b.labels, "positives": p} for p in ("in", "sum")},
    "out": lambda b: {"k": None, "labels": b.labels, "sample_weight": b.weight},
    "out, unit": lambda b: {"k": None, "labels": b.others, "normalize": True, "reduction": "none"},
    "keys": lambda b: {"labels": b.labels},
    "keys in": lambda b: {"labels": b.labels, "k_labels": b.others, "positives": "in"},
    "keys sum": lambda b: {"labels": b.labels, "positives": "sum", "reduction": "sum"},
    "own key": lambda b: {"labels": b.labels, "own_key": torch.arange(len(b.q))},
    "fewer keys": lambda b: {"labels": b.labels} | kept(b),
    "singletons": lambda b: {"k": None, "labels": b.single},
    "singletons in": lambda b: {"k": None, "labels": b.single, "positives": "in"},
    "no positives": lambda b: {"labels": b.labels, "k_labels": b.labels + 9, "positives": "sum"},
    "scale alone": lambda b: {"q": b.q.detach(), "k": None, "labels": b.labels},
    "k frozen": lambda b: {"k": b.k.detach(), "labels": b.labels},
}
SIGLIP = {
    "plain": lambda b: {"logit_bias": b.logit_bias, "normalize": True},
    "no bias": lambda b: {"reduction": "sum"},
    "ids": lambda b: {"logit_bias": b.logit_bias, "q_ids": b.labels},
    "ids of both": lambda b: {"q_ids": b.labels, "k_ids": b.others, "reduction": "none"},
    "fewer keys": lambda b: (
        {n: x for n, x in kept(b).items() if n == "k"}
        | {"target": kept(b)["own_key"], "logit_bias": b.logit_bias}
    ),
    "weights": lambda b: {"sample_weight": b.weight.detach(), "logit_bias": b.logit_bias},
    "k frozen": lambda b: {"k": b.k.detach(), "logit_bias": b.logit_bias},
    "q frozen": lambda b: {"q": b.q.detach(), "reduction": "none"},
    "bias alone": lambda b: {"q": b.q.detach(), "k": b.k.detach(), "logit_bias": b.logit_bias},
    "no gradient": lambda b: {"q": b.q.detach(), "k": b.k.detach(), "logit_scale": 3.0},
}
QUEUE = {
    "plain": lambda b: {"queue": b.queue, "normalize": True},
    "weights": lambda b: {"queue": b.queue, "sample_weight": b.weight.detach()},
    "sharded": lambda b: {"queue": b.part_of_queue, "queue_sharded": True},
    "sharded, all": lambda b: {
        "queue": b.part_of_queue, "queue_sharded": True, "bias": b.part_of_queue_bias,
        "q_ids": b.labels, "queue_ids": b.part_of_queue_ids, "reduction": "sum",
    },
    "sharded, k frozen": lambda b: {
        "queue": b.part_of_queue, "queue_sharded": True, "k": b.k.detach(), "reduction": "none",
    },
}  # fmt: skip
TABLES = {info_nce: NCE, sup_con: SUP_CON, siglip: SIGLIP, queue_nce: QUEUE}
CASES = {
    f"{function.__name__}, {name}": (function, case)
    for function, table in TABLES.items()
    for name, case in table.items()
}


# ------------------------------------------------------------------- one process against several


def measured(name, b, world=1, **options):
    """The case's results, and its gradients divided by the number of ranks.

    Results by row are weighed with v; that gradient is no mean over ranks, hence the factor.
    """
    function, case = CASES[name]
    leaves = {n: b[n].detach().clone().requires_grad_() for n in LEAVES}
    given = SimpleNamespace(**b | leaves)
    if function is queue_nce:
        options.pop("exchange", None)
    results = function(
        **{"q": given.q, "k": given.k, "logit_scale": given.scale} | case(given) | options
    )
    results = results if isinstance(results, tuple) else (results,)
    out = {
        f"result {i}": x.detach().movedim(-1, 0) if x.dim() else x.detach()
        for i, x in enumerate(results)
    }
    total = sum(world * (x * b["v"]).sum() if x.dim() else x for x in results)
    if total.requires_grad:
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        pairs = zip(leaves, grads, strict=True)
        out |= {"d" + n: None if g is None else g / world for n, g in pairs}
    return out


def on_ranks(group, names, problems, dtype, times=1):
    """`measured` of all cases and problems on this rank's rows."""
    found = []
    for name, (sizes, exchange) in itertools.product(names, problems):
        sizes = [n * times for n in sizes]
        b = shard(batch(sum(sizes), dtype), sizes, group.rank())
        try:
            found.append(measured(name, b, group.size(), group=group, exchange=exchange))
        except Exception as error:
            raise RuntimeError(f"{name}, {sizes}, {exchange}") from error
    return found


@functools.cache
def in_one(name, N, dtype, wide=False):
    b = shard(batch(N, dtype), [N], 0)
    if wide:
        b = {n: x.double() if x.is_floating_point() else x for n, x in b.items()}
    return measured(name, b, group=fastssl.LOCAL)


def wrong(got, truth, one, dtype=torch.float64):
    """What the ranks got wrong: in float64 all beyond 1e-10 of the maximum; else an error more
    than twice that of one process plus 1e-6 of the maximum. For gradients of half precision plus
    2 eps of it: the pairs' weights are rounded to it, even where their sum is not."""
    for key, true in truth.items():
        parts = [part.get(key) for part in got]
        if true is None or any(part is None for part in parts):
            if true is not None or any(part is not None for part in parts):
                yield f"{key}: a gradient where there should be none, or none"
            continue
        if true.dim():
            x = torch.cat(parts)
        elif key.startswith("result"):
            x = parts[0]
            if any(part.numpy().tobytes() != x.numpy().tobytes() for part in parts):
                yield f"{key}: not equal on all ranks, {parts}"
        else:
            x = sum(parts)
        if x.shape != true.shape or x.dtype != one[key].dtype:
            yield f"{key}: {tuple(x.shape)}, {x.dtype}, expected {tuple(true.shape)}"
            continue
        if not true.numel():
            continue
        error, allowed = ((y.double() - true).abs().max() for y in (x, one[key]))
        relative = 1e-10 if dtype == torch.float64 else 1e-6
        if dtype.itemsize == 2 and not key.startswith("result"):
            relative = 2 * torch.finfo(dtype).eps
        limit = 2 * allowed + relative * true.abs().max() + 1e-14
        if not error <= limit:
            yield f"{key}: error {error:.3g}, allowed {limit:.3g}, largest {true.abs().max():.3g}"


def check(ranks, W, names, dtype, times=1, all_sizes=None):
    problems = list(itertools.product(all_sizes or SIZES[W], EXCHANGES))
    found = ranks.run(on_ranks, W, names, problems, dtype, times)
    bad = []
    for i, name in enumerate(names):
        for j, (sizes, exchange) in enumerate(problems):
            N = sum(sizes) * times
            truth, one = in_one(name, N, dtype, wide=True), in_one(name, N, dtype)
            got = [rank[i * len(problems) + j] for rank in found]
            bad += [
                f"{name}, {sizes}, {exchange}: {text}" for text in wrong(got, truth, one, dtype)
            ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("W", SIZES)
def test_float64(ranks, W):
    check(ranks, W, list(CASES), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(ranks, dtype):
    check(ranks, 3, list(CASES), dtype, times=9, all_sizes=[(4, 0, 3)])


# ------------------------------------------------------------------------- groups of other kinds


def two_at_once(group, exchange):
    pair = torch.distributed.get_rank() % 2
    b = shard(batch(9, seed=pair), (5, 4), group.rank())
    return [measured(name, b, 2, group=group, exchange=exchange) for name in PLAIN]


PLAIN = ("info_nce, symmetric", "info_nce, itself", "sup_con, out", "siglip, plain")


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_two_subgroups_at_once(ranks, exchange):
    found = ranks.run(two_at_once, "pairs", exchange)
    for (i, name), pair in itertools.product(enumerate(PLAIN), (0, 1)):
        truth = measured(name, shard(batch(9, seed=pair), (9,), 0), group=fastssl.LOCAL)
        assert not list(wrong([found[r][i] for r in (pair, pair + 2)], truth, truth)), name


@functools.cache
def mesh(shape):
    return init_device_mesh("cpu", shape)


def on_mesh(_, names, shape, problems):
    found = []
    for name, (sizes, exchange) in itertools.product(names, problems):
        b = shard(batch(sum(sizes)), sizes, torch.distributed.get_rank())
        found.append(measured(name, b, 4, group=mesh(shape), exchange=exchange))
    return found


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_device_mesh(ranks, shape):
    names = [n for n in CASES if "itself" in n or n[:7] in ("sup_con", "siglip,", "queue_n")]
    names += ["info_nce, all options", "info_nce, smoothing both ways", "info_nce, margin"]
    problems = list(itertools.product([(4, 3, 2, 3), (5, 2, 0, 4)], ("gather", "ring", "auto")))
    found, bad = ranks.run(on_mesh, 4, names, shape, problems), []
    for i, (name, (sizes, exchange)) in enumerate(itertools.product(names, problems)):
        truth = in_one(name, sum(sizes), torch.float64)
        got = [rank[i] for rank in found]
        bad += [f"{name}, {sizes}, {exchange}: {text}" for text in wrong(got, truth, truth)]
    assert not bad, "\n".join(bad)


def chosen(group, exchange, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "GATHERED_BYTES", limit)
        return sharded.shards_of("x", group, exchange, torch.ones(3, 4), torch.ones(5, 4))[1].ring


def test_auto_gathers_until_it_takes_too_much(ranks):
    taken = 3 * 5 * 4 * 4
    for exchange, limit, ring in (
        ("auto", taken, False), ("auto", taken - 1, True), ("gather", 0, False), ("ring", 999, True)
    ):  # fmt: skip
        assert ranks.run(chosen, 3, exchange, limit) == [ring] * 3


# ------------------------------------------------------------------------------------- training


class Towers(nn.Module):
    def __init__(self, encode=lambda encoder, x: encoder(x)):
        super().__init__()
        torch.manual_seed(5)
        self.encode = encode
        self.x, self.y = (nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 4)) for _ in "xy")
        self.log_scale = nn.Parameter(torch.tensor([1.2]))  # FSDP shards no 0-dim parameter
        self.bias = nn.Parameter(torch.tensor([-0.4]))
        self.double()

    def forward(self, x, y):
        features = self.encode(self.x, x), self.encode(self.y, y)
        return *features, self.log_scale[0].exp(), self.bias[0]


def train_loss(q, k, scale, bias, labels, **options):
    """All ops at once; all parameters learn."""
    z = {"q": q, "k": k, "logit_scale": scale, "normalize": True, **options}
    pairs = {"q": mixed(q, k), "k": None, "target": torch.arange(2 * len(q)) ^ 1}
    return (
        info_nce(**z, symmetric=True, q_ids=labels)
        + info_nce(**z | pairs)
        + sup_con(**z | {"k": None}, labels=labels, positives="in")
        + siglip(**z, logit_bias=bias)
    )


def parameter_gradients(how, sizes, rank, seeds=(1,), group=None, **options):
    """After the mean that DistributedDataParallel or FSDP takes, or ours in its place."""
    again = functools.partial(checkpoint, use_reentrant=False)
    towers = module = Towers(again) if how == "checkpoint" else Towers()
    loss_of = functools.partial(train_loss, group=group or fastssl.LOCAL, **options)
    if how == "gradcache":
        module = GradCache(towers, chunk=2)
    if how in ("ddp", "no_sync", "gradcache", "checkpoint"):
        module = DistributedDataParallel(module, process_group=group)
    if how == "fsdp":
        module = fully_shard(towers, mesh=DeviceMesh.from_group(group, "cpu"))
    if how == "compile":
        loss_of = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    if how == "checkpoint":
        loss_of = functools.partial(again, loss_of)
    for i, seed in enumerate(seeds):
        b = shard(batch(sum(sizes), seed=seed), sizes, rank)
        last = i == len(seeds) - 1
        with nullcontext() if last or how != "no_sync" else module.no_sync():
            loss = loss_of(*module(b["q"], b["k"]), b["labels"])
            loss.backward()
    grads = {n: p.grad for n, p in towers.named_parameters()}
    if how == "fsdp":
        grads = {n: g.full_tensor() for n, g in grads.items()}
    if how == "compile":
        for g in grads.values():
            torch.distributed.all_reduce(g, group=group)
            g /= group.size()
    return {"loss": loss.detach()} | grads


def train(group, how, problems, seeds):
    return [
        parameter_gradients(how, sizes, group.rank(), seeds, group, exchange=exchange)
        for sizes, exchange in problems
    ]


@pytest.mark.parametrize(
    "how, W",
    [("ddp", 1), ("ddp", 2), ("ddp", 3), ("ddp", 4), ("no_sync", 3), ("gradcache", 3),
     ("checkpoint", 2), ("fsdp", 2), ("fsdp", 4), ("compile", 2)],
)  # fmt: skip
def test_training(ranks, how, W):
    seeds = (1, 2) if how == "no_sync" else (1,)
    all_sizes = SIZES[W][:1] if how == "compile" else SIZES[W]
    problems = list(itertools.product(all_sizes, EXCHANGES))
    found = ranks.run(train, W, how, problems, seeds, seconds=200)
    for i, (sizes, exchange) in enumerate(problems):
        truth = parameter_gradients("", (sum(sizes),), 0, seeds)
        for r, name in itertools.product(range(W), truth):
            error = (found[r][i][name] - truth[name]).abs().max()
            limit = 1e-10 * truth[name].abs().max()
            assert error <= limit, f"{name} on rank {r}, {sizes}, {exchange}: {error:.3g}"


# ------------------------------------------------------------------------------ pairs of rows


@pytest.mark.parametrize("nodes, each, ring", [(1, 4, False), (5, 1, True), (6, 1, True),
                                               (1, 7, False), (2, 3, True), (3, 2, True),
                                               (4, 4, True), (2, 2, False)])  # fmt: skip
@pytest.mark.parametrize("uneven", [False, True])
def test_every_pair_is_computed_once(nodes, each, ring, uneven):
    W = nodes * each
    sizes = tuple(3 * r % 5 for r in range(W)) if uneven else (6,) * W
    starts = [0, *itertools.accumulate(sizes)]
    for itself in (False, True):
        times = torch.zeros(starts[-1], starts[-1], dtype=torch.int64)
        work = []
        for rank in range(W):
            levels = (Level("", nodes, rank // each), Level("", each, rank % each))
            shards = Shards(tuple(level for level in levels if level.size > 1), sizes, ring)
            before, rows = times.sum(), range(starts[-1])
            for step in range(sharded.last_step(shards, itself) + 1):
                at, found = sharded.pieces(shards, step, itself, sizes[rank])
                first = sum(shards.blocks[:at])
                for piece in found:
                    own = rows[starts[rank] : starts[rank + 1]][piece.rows]
                    keys = rows[first : first + shards.blocks[at]][piece.keys]
                    assert not piece.itself or own == keys
                    times[own.start : own.stop, keys.start : keys.stop] += 1
            work.append(int(times.sum() - before))
        if itself:
            own = torch.block_diag(*(torch.ones(n, n, dtype=torch.int64) for n in sizes))
            assert torch.equal(times + times.T, 1 + own)
        else:
            assert bool((times == 1).all())
        if not uneven:  # to within half of a block, or of one node's
            assert max(work) - min(work) <= 18 * (each if ring else 1), work


# ---------------------------------------------------------------------------- hard inputs, errors


def extremes(group, exchange):
    rank, o = group.rank(), {"group": group, "exchange": exchange}
    unit = normalize(batch(16)["q"].float(), dim=1).tensor_split(group.size())[rank]
    k = unit.roll(1, 0).requires_grad_()
    twice = []
    for _ in range(2):
        loss = info_nce(unit, k, logit_scale=100.0, symmetric=True, **o)
        twice.append((loss.detach(), *torch.autograd.grad(loss, k)))
    same = all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
    ids = torch.zeros(len(unit), dtype=torch.long)
    bias = torch.full((len(unit),), -torch.inf)
    masked = info_nce(unit, k, logit_scale=5.0, bias=bias, q_ids=ids, decoupled=True, **o)
    zeros = masked.detach(), *torch.autograd.grad(masked, k)
    bad = unit.clone()
    if rank == 0:
        bad[0, 0] = torch.nan
    nan = [
        info_nce(bad, k, logit_scale=5.0, **o), info_nce(k, bad, logit_scale=5.0, **o),
        info_nce(bad, logit_scale=5.0, target=torch.arange(len(bad)) ^ 1, **o),
        siglip(bad, k, logit_scale=5.0, **o),
        sup_con(bad, labels=ids, logit_scale=5.0, **o),
    ]  # fmt: skip
    # The column's only large logit is with a row of the next rank.
    far, x = torch.zeros(1, 4), torch.eye(4)
    q = 1000 * x[rank : rank + 1] + far
    key = x[(rank + 1) % group.size()][None]
    _, lse = info_nce(q, key, logit_scale=1.0, symmetric=True, return_lse=True, **o)
    nan = [x.detach() for x in nan]
    return twice[0], same, zeros, nan, lse


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_extremes(ranks, exchange):
    found = ranks.run(extremes, 4, exchange)
    unit = normalize(batch(16)["q"].float(), dim=1)
    k = torch.cat([x.roll(1, 0) for x in unit.tensor_split(4)]).requires_grad_()
    truth = info_nce(unit, k, logit_scale=100.0, symmetric=True, group=fastssl.LOCAL)
    dk = torch.autograd.grad(truth, k)[0]
    for r, ((loss, own_dk), same, zeros, nan, lse) in enumerate(found):
        torch.testing.assert_close(loss, truth.detach())
        torch.testing.assert_close(own_dk / 4, dk.tensor_split(4)[r], rtol=1e-5, atol=1e-6)
        assert same and all(not x.any() for x in zeros) and all(x.isnan() for x in nan), (r, nan)
        torch.testing.assert_close(lse, torch.full((2, 1), 1000.0))


def refused(group, wrongs):
    """What each of the calls says; after each of them a good one must still go through."""
    q, k = torch.randn(2, 3, 4).unbind()
    told, rank = [], 0 if group is NON_GROUP_MEMBER else group.rank()
    for change in wrongs:
        function, arguments = info_nce, {"q": q, "k": k, "logit_scale": 2.0, "group": group}
        for key, values in change.items():
            value = values[rank % 2] if isinstance(values, tuple) else values
            if key == "function":
                function = value
            elif key == "features":
                arguments |= {"q": value(q), "k": value(k)}
            elif value is not None:
                arguments[key] = value
        try:
            function(**arguments)
            told.append("nothing")
        except (TypeError, ValueError, RuntimeError) as error:
            told.append(f"{type(error).__name__}: {error}")
        if group is not NON_GROUP_MEMBER:
            info_nce(q, k, logit_scale=2.0, group=group)
    return told


def narrow(x):
    return x[:, :3]


def none_of(x):
    return x[:0]


def learning(x):
    return x.detach().clone().requires_grad_()


LABELS = torch.arange(3)
DIFFERENT = {
    "the width D must be the same on all ranks, got 4 on rank 0, 3 on rank 1": {
        "features": (torch.clone, narrow)
    },
    "the dtype must be the same on all ranks, got torch.float32 on rank 0, torch.bfloat16 on": {
        "features": (torch.clone, torch.Tensor.bfloat16)
    },
    "the reduction must be the same on all ranks, got 'mean' on rank 0, 'sum' on rank 1": {
        "reduction": ("mean", "sum")
    },
    "the options must be the same": {"symmetric": (True, False)},
    "the options must be the same on": {"bias": (torch.zeros(3), None)},
    "the options must be the same on all": {"margin": (0.1, 0.2)},
    "what takes a gradient must be the same": {"features": (torch.clone, learning)},
    "the function must be the same": {"function": (info_nce, siglip)},
    "positives must be the same on all ranks, got 'out' on rank 0, 'in' on rank 1": {
        "function": sup_con, "labels": LABELS, "positives": ("out", "in")
    },
    "ids must be the same on all ranks, got True on": {"function": siglip, "q_ids": (LABELS, None)},
    "exchange must be the same on all ranks": {"exchange": ("gather", "ring")},
    "queue_sharded must": {
        "function": queue_nce, "queue": torch.ones(5, 4), "queue_sharded": (True, False)
    },
    "the batches of all 2 ranks are empty": {"features": none_of},
    'exchange must be "auto", "gather" or "ring", got \'rings\'': {"exchange": "rings"},
    "soft_target and store_logits need": {"soft_target": torch.full((3, 3), 1 / 3)},
    "soft_target and store_logits need all": {"store_logits": True},
}  # fmt: skip


def test_errors_on_all_ranks(ranks):
    found = ranks.run(refused, 2, list(DIFFERENT.values()))
    for i, text in enumerate(DIFFERENT):
        for rank, told in enumerate(found):
            assert text in told[i] and told[i].startswith("ValueError"), (rank, text, told[i])


def test_group_without_this_process(ranks):
    outside = ranks.run(refused, 2, [{}], ranks=range(4))[2:]
    assert all("group must contain this process" in told[0] for told in outside), outside
