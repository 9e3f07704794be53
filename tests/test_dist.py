"""Collectives against what they mean, agreement of ranks, and BatchNorm over ranks.

Cases run many to a task, for a round trip to the processes costs more than a case.
"""

import itertools
import re

import pytest
import torch
import torch.distributed as dist
from oracle import assert_no_worse
from ranks import WORLD, Ranks
from torch import nn

from fastssl import LOCAL
from fastssl.dist import (
    Level,
    Shards,
    SyncBatchNorm,
    agree,
    all_sum,
    exchange_parts,
    gather_rows,
    permute,
    resolve_levels,
    scatter_sums,
)
from fastssl.ops import info_nce
from fastssl.syncbn import _Normalize


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()


SIZES = {1: [(4,)], 2: [(3, 3), (5, 0)], 3: [(2, 2, 2), (0, 3, 1)], 4: [(2,) * 4, (3, 0, 1, 4)]}


# ----------------------------------------------------------------------------------- collectives


def test_rows_along_two_levels():
    sizes = (1, 2, 4, 8, 16, 32)
    nodes, rank_of_node = Level("nodes", 2, 1), Level("ranks", 3, 2)
    shards = Shards((nodes, rank_of_node), sizes)
    assert (shards.rank, shards.total, shards.first) == (5, 63, 31)
    assert shards.along(0) == [7, 56] and shards.along(1) == [8, 16, 32]
    assert shards.blocks == [63] and shards._replace(ring=True).blocks == [7, 56]
    first = shards._replace(levels=(nodes._replace(rank=0), rank_of_node._replace(rank=1)))
    assert (first.rank, first.first, first.along(1)) == (1, 1, [1, 2, 4])


def rows_of(sizes, rank):
    """Rank r's row i is (100 r + i, its negative)."""
    column = 100.0 * rank + torch.arange(sizes[rank], dtype=torch.float64)
    return torch.stack([column, -column], 1)


def check_collectives(levels, sizes):
    """What each collective gives, from what the ranks are known to hold."""
    shards, failed = Shards(levels, sizes), []
    rank, every = shards.rank, torch.cat([rows_of(sizes, r) for r in range(len(sizes))])
    own = slice(shards.first, shards.first + sizes[rank])

    def check(name, got, want):
        if got.shape != want.shape or not torch.equal(got, want):
            failed.append((name, sizes, rank, got.tolist(), want.tolist()))

    check("gather_rows", gather_rows(rows_of(sizes, rank), shards), every)
    factors = range(1, len(sizes) + 1)  # rank r holds (r + 1) * every
    check("scatter_sums", scatter_sums((rank + 1) * every, shards), sum(factors) * every[own])
    largest = exchange_parts((rank + 1) * every.abs(), shards, lambda parts: parts.amax(0))
    check("exchange_parts", largest, len(sizes) * every.abs()[own])
    check("all_sum", all_sum((rank + 1) * torch.ones(3), levels), sum(factors) * torch.ones(3))
    level = levels[0]
    for hops in range(-1, level.size) if len(levels) == 1 else ():
        source = (rank - hops) % level.size
        got = permute(rows_of(sizes, rank), level, hops, sizes[source]).wait()
        check(f"permute {hops}", got, rows_of(sizes, source))
    return failed


def on_one_level(group):
    levels = resolve_levels("test", group)
    W = dist.get_world_size(group)
    return [case for sizes in SIZES[W] for case in check_collectives(levels, sizes)]


def on_a_mesh(_):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("nodes", "ranks"))
    levels = resolve_levels("test", mesh)
    failed = [case for sizes in SIZES[4] for case in check_collectives(levels, sizes)]
    # Blocks are the nodes: gathered within one, and summed within one.
    for sizes in SIZES[4]:
        shards = Shards(levels, sizes, ring=True)
        node = [shards.rank // 2 * 2, shards.rank // 2 * 2 + 1]
        block = torch.cat([rows_of(sizes, r) for r in node])
        own = rows_of(sizes, shards.rank)
        if not torch.equal(gather_rows(own, shards, ring=True), block):
            failed.append(("gather_rows of a block", sizes))
        if not torch.equal(scatter_sums(block, shards, ring=True), 2 * own):
            failed.append(("scatter_sums of a block", sizes))
    if resolve_levels("test", mesh["ranks"]) != levels[1:]:
        failed.append("a mesh of one dimension is not its level")
    return failed


@pytest.mark.parametrize("W", [2, 3, 4, "pairs"])
def test_collectives(ranks, W):
    assert not list(itertools.chain(*ranks.run(on_one_level, W)))


def test_collectives_on_a_mesh(ranks):
    assert not list(itertools.chain(*ranks.run(on_a_mesh, 4)))


def test_alone():
    assert resolve_levels("test") == resolve_levels("test", LOCAL) == ()
    with pytest.raises(TypeError, match="test: group must be None .all processes., .*got 3"):
        resolve_levels("test", 3)


def wrong_groups(_):
    def message(group):
        try:
            resolve_levels("test", group)
        except ValueError as error:
            return str(error)

    mesh = dist.init_device_mesh("cpu", (2, 2, 1))
    return message(dist.GroupMember.NON_GROUP_MEMBER), message(mesh)


def test_groups_without_this_process_or_of_three_levels(ranks):
    for outside, deep in ranks.run(wrong_groups, 4):
        assert "test: group must contain this process" in outside
        assert "test: group must be a mesh of one or two dimensions" in deep


# ------------------------------------------------------------------------------ agreement of ranks


def disagree(group, what):
    """What a loss says where rank 1 does something else; None where it says nothing."""
    other = dist.get_rank() == 1
    q = torch.randn(3, 5 if other and what == "width" else 4)
    if other and what == "dtype":
        q = q.bfloat16()
    options = {"symmetric": True} if other and what == "option" else {}
    try:
        if other and what == "function":
            agree("sup_con", resolve_levels("sup_con", group), (3, 3), q, width=4)
        else:
            info_nce(q, q.clone(), temperature=1.0, group=group, **options)
    except ValueError as error:
        return str(error)


SAYS = {
    "width": "the width D must be the same on all ranks, got 4 on rank 0, 5 on rank 1",
    "dtype": "the dtype must be .*, got torch.float32 on rank 0, torch.bfloat16 on rank 1",
    "option": "the options must be .*, got .*False.* on rank 0, .*True.* on rank 1",
    "function": "the function must be .*, got info_nce on rank 0, sup_con on rank 1",
}


@pytest.mark.parametrize("what", SAYS)
def test_disagreement_is_told_on_all_ranks(ranks, what):
    for message in ranks.run(disagree, 3, what):
        assert message and re.search(SAYS[what], message) and "fastssl.LOCAL" in message, message
    assert ranks.run(disagree, 3, "nothing") == [None] * 3


def other_groups(_):
    """Rank 1 calls with the first two ranks, the others with all; then everyone with all, and with
    all by another group."""
    everyone, pair, another = (dist.new_group(range(n)) for n in (WORLD, 2, WORLD))
    q, messages = torch.randn(3, 4), []
    for group in (pair if dist.get_rank() == 1 else everyone, everyone, another):
        try:
            info_nce(q, q.clone(), temperature=1.0, group=group)
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_other_groups_are_told_on_all_ranks(ranks):
    for message, again, afterwards in ranks.run(other_groups, 4):
        assert message.startswith("info_nce: group must be the same on all ranks, got ranks [0, 1")
        assert "ranks [0, 1, 2, 3] on rank 0 and ranks [0, 1] on rank 1" in message
        assert again == message and afterwards is None


def with_a_loss(group):
    q = torch.randn(3, 4)
    try:
        info_nce(q, q.clone(), temperature=1.0, group=group)
    except RuntimeError as error:
        return str(error)


def test_a_stopped_rank():
    pool = Ranks()
    try:
        assert pool.run(with_a_loss, 3) == [None] * 3
        pool.processes[2].kill()
        for r, message in enumerate(pool.run(with_a_loss, 3, ranks=[0, 1])):
            assert message.startswith(f"fastssl: all_gather_into_tensor failed on rank {r} of 3: ")
            assert "Another rank has stopped" in message
    finally:
        for process in pool.processes:
            process.kill()


# ------------------------------------------------------------------------------- SyncBatchNorm

OPTIONS = ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False})
SHAPES = ((3,), (3, 4), (3, 2, 5), (3, 2, 1, 2))
PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def norms(dim, dtype, **options):
    """Ours and torch's, with the same weights, none of them 1."""
    draw = torch.Generator().manual_seed(2)
    ours, plain = SyncBatchNorm(3, dtype=dtype, **options), PLAIN[dim](3, dtype=dtype, **options)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        other.data.normal_(generator=draw)
        one.data.copy_(other.data)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    return ours, plain


def worst(got, want):
    if want.numel() == 0:
        return 0.0
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def normalise_everywhere(group):
    """Names and errors of what differs from one process with the whole batch, by 1e-10 or more."""
    W, rank, failed = dist.get_world_size(group), dist.get_rank(group), []
    for sizes, shape, options in itertools.product(SIZES[W], SHAPES, OPTIONS):
        norm, plain = norms(1 + len(shape), torch.float64, **options)
        norm.group = group
        if norm.affine:
            model = nn.parallel.DistributedDataParallel(norm, process_group=group)
        else:
            model = norm
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        draw = torch.Generator().manual_seed(1)
        for step in range(3):
            whole = 5 + torch.randn(sum(sizes), *shape, generator=draw, dtype=torch.float64)
            weight = torch.randn(whole.shape, generator=draw, dtype=torch.float64)
            x, want_x = whole[own].requires_grad_(), whole.clone().requires_grad_()
            y, want = model(x), plain(want_x)
            norm.zero_grad(), plain.zero_grad()
            # A mean over ranks: each rank's objective is W times its rows' share.
            (W * y * weight[own]).sum().backward()
            (want * weight).sum().backward()
            pairs = {"y": (y, want[own]), "dx": (x.grad, W * want_x.grad[own])}
            pairs |= {
                name: (p.grad, q.grad)
                for (name, p), q in zip(norm.named_parameters(), plain.parameters(), strict=True)
            }
            pairs |= {
                name: (b.double(), c.double())
                for (name, b), c in zip(norm.named_buffers(), plain.buffers(), strict=True)
            }
            for name, (got, true) in pairs.items():
                if got.shape != true.shape or not worst(got.detach(), true.detach()) < 1e-10:
                    failed.append((name, step, sizes, shape, options, got, true))
        if not worst(norm.eval()(whole).detach(), plain.eval()(whole).detach()) < 1e-10:
            failed.append(("eval", sizes, shape, options))
    return failed


@pytest.mark.parametrize("W", [1, 2, 3, 4, "pairs"])
def test_norm_is_that_of_the_whole_batch(ranks, W):
    assert not list(itertools.chain(*ranks.run(normalise_everywhere, W)))


def normalise(group, case):
    """This rank's rows of 4 + 9 images: their result and gradient, and those of plain torch in the
    same dtype and in fp64, which has all rows."""
    dtype, autocast, offset, layout, compiled = case
    rank = dist.get_rank(group)
    draw = torch.Generator().manual_seed(1)
    whole = (offset + torch.randn(13, 3, 4, 6, generator=draw)).to(dtype)
    whole = whole.to(memory_format=layout)
    weight = torch.randn(whole.shape, generator=draw).to(dtype)
    own = slice(0, 4) if rank == 0 else slice(4, 13)
    norm, plain = norms(4, torch.float64 if dtype == torch.float64 else torch.float32)
    norm.group = group
    true = nn.BatchNorm2d(3, dtype=torch.float64)
    true.load_state_dict(plain.state_dict())
    results = []
    for module, x, d in (
        (norm, whole[own], weight[own]),
        (plain, whole, weight),
        (true, whole.double(), weight.double()),
    ):
        if module is norm and compiled:
            torch._dynamo.reset()
            module = torch.compile(module, fullgraph=True, backend=compiled)
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and module is not true):
            y = module(x)
        (dx,) = torch.autograd.grad(y, x, d)
        results += [y.detach(), dx]
    y, dx, *others = results
    same = y.dtype == dx.dtype == dtype and y.is_contiguous(memory_format=layout)
    same = same and [b.dtype for b in norm.buffers()] == [b.dtype for b in plain.buffers()]
    return same, y, dx, *(x[own] for x in others)


CASES = {
    "fp32": (torch.float32, False, 0, torch.contiguous_format, None),
    "bf16": (torch.bfloat16, False, 0, torch.contiguous_format, None),
    "fp16": (torch.float16, False, 0, torch.contiguous_format, None),
    "autocast": (torch.bfloat16, True, 0, torch.contiguous_format, None),
    "channels last": (torch.float32, False, 0, torch.channels_last, None),
    "channels last bf16": (torch.bfloat16, False, 0, torch.channels_last, None),
    "far from zero": (torch.float32, False, 3000, torch.contiguous_format, None),
    "compiled": (torch.float32, False, 3, torch.channels_last, "aot_eager"),
    "compiled far": (torch.float32, False, 3000, torch.contiguous_format, "aot_eager"),
    "compiled bf16": (torch.bfloat16, False, 0, torch.channels_last, "aot_eager"),
}


@pytest.mark.parametrize("case", CASES)
def test_norm_in_each_dtype(ranks, case):
    for same, y, dx, plain_y, plain_dx, true_y, true_dx in ranks.run(normalise, 2, CASES[case]):
        assert same
        offset = CASES[case][2]  # the terms of x - mean, where rounding the mean costs as much
        assert_no_worse(y, true_y, plain_y, magnitude=offset)
        assert_no_worse(dx, true_dx, plain_dx, factor=3, magnitude=offset)


def few_elements(group, sizes, shape=(3,)):
    norm = SyncBatchNorm(3, group=group)
    x = torch.ones(sizes[dist.get_rank(group)], *shape, requires_grad=True)
    try:
        norm(x).sum().backward()
        return x.grad.tolist(), norm.running_mean.tolist(), norm.running_var.tolist()
    except ValueError as error:
        return str(error)


def test_norm_of_one_element_and_of_none(ranks):
    for message in ranks.run(few_elements, 3, (0, 1, 0)):
        assert "expected more than 1 value per channel when training, got input size" in message
    for grad, mean, var in ranks.run(few_elements, 3, (0, 0, 0)):
        assert (grad, mean, var) == ([], [0] * 3, [1] * 3)
    for _, mean, _ in ranks.run(few_elements, 3, (0, 1, 1)):
        assert mean == pytest.approx([0.1] * 3)
    assert "x must be (B, C, ...) with C = num_features = 3" in str(few_elements_alone())


def few_elements_alone():
    with pytest.raises(ValueError) as caught:
        SyncBatchNorm(3)(torch.ones(3))
    return caught.value


def other_widths(group):
    width = 3 + dist.get_rank(group)
    try:
        SyncBatchNorm(width, group=group)(torch.randn(4, width))
    except ValueError as error:
        return str(error)


def test_norms_of_other_widths(ranks):
    for message in ranks.run(other_widths, 2):
        assert "num_features must be the same on all ranks, got 3 on rank 0, 4" in message


def test_norm_alone_is_torchs():
    x = torch.randn(6, 3, 2, 2, requires_grad=True)
    for options in OPTIONS:
        norm, plain = norms(4, torch.float32, **options)
        assert torch.equal(norm(x), plain(x)) and torch.equal(norm.eval()(x), plain.eval()(x))
        for got, want in zip(norm.buffers(), plain.buffers(), strict=True):
            assert torch.equal(got, want)
    x = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda *args: _Normalize.apply(*args, 1e-5, ())[0], (x, weight, bias)
    )


def test_conversion():
    class Scaled(nn.BatchNorm1d):
        def forward(self, x):
            return 2 * super().forward(x)

    frozen = nn.BatchNorm2d(4, momentum=None, affine=False).eval()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.Sequential(frozen), frozen)
    model[1].running_var.fill_(3)
    before = dict(model.state_dict(keep_vars=True))
    assert SyncBatchNorm.convert_sync_batchnorm(model, LOCAL) is model
    after = model.state_dict(keep_vars=True)
    assert before.keys() == after.keys() and all(before[key] is after[key] for key in before)
    assert all(type(norm) is SyncBatchNorm for norm in (model[1], model[2][0], model[3]))
    assert model[1].training and not model[3].training and not model[2][0].training
    assert model[3].momentum is None and model[1].group is LOCAL
    one = nn.BatchNorm1d(3)
    assert SyncBatchNorm.convert_sync_batchnorm(one).weight is one.weight
    with pytest.raises(TypeError, match="Scaled is more than a BatchNorm"):
        SyncBatchNorm.convert_sync_batchnorm(Scaled(3))
