"""8-bit states of shards: stepped where they lie, saved and loaded for other numbers of ranks."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from fastssl import optim
from fastssl.ops import blockwise as op

BLOCK = 256


class Model(nn.Module):
    """Rows of whole blocks (33 x 256), of parts (131 x 64, 40 x 300) and fewer rows than ranks;
    a bias too small for 8 bits."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = {"whole": (33, 256), "thin": (131, 64), "wide": (40, 300), "few": (2, 3, 700)}
        for name, shape in {**shapes, "bias": (33,)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))


def mesh_of(group, kind):
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if kind == "hsdp":
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    return DeviceMesh.from_group(group, "cpu")


def fully_sharded(model, group, kind="fsdp"):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh_of(group, kind))


def built(group, kind="fsdp", dtype=torch.float32, **options):
    """A model, plain, replicated or in shards, and its optimizer."""
    model = Model().to(dtype)
    if kind in ("fsdp", "hsdp"):
        fully_sharded(model, group, kind)
    elif kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model, process_group=group)
    return model, optim.AdamW8bit(model.parameters(), **{"lr": 1e-2, **options})


def steps(model, optimizer, some):
    for step in some:
        optimizer.zero_grad()
        torch.manual_seed(step)
        for p in model.parameters():
            whole = torch.randn(p.shape).to(p.dtype)
            p.grad = whole if not hasattr(p, "to_local") else distributed(whole, p)
        optimizer.step()


def distributed(x, like):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def whole(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach()


def values(model, optimizer):
    """The fp32 moments of every parameter, whole."""
    states = optimizer.full_precision_state_dict()["state"].values()
    names = [name.removeprefix("module.") for name, _ in model.named_parameters()]
    return {
        name: [whole(state[key]) for key in ("exp_avg", "exp_avg_sq")]
        for name, state in zip(names, states, strict=True)
    }


def save(group, model, optimizer, path, **options):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as api

    options = api.StateDictOptions(**options)
    state = {"optimizer": api.get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(state, checkpoint_id=path, process_group=group)


def load(group, model, optimizer, path, **options):
    """What the warnings said."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as api

    options = api.StateDictOptions(**options)
    state = {"optimizer": api.get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.load(state, checkpoint_id=path, process_group=group)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        api.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    return [str(w.message) for w in told if "rounded anew" in str(w.message)]


def begun(group, kind, path):
    """Moments, and the scales of their elements."""
    model, optimizer = built(group, kind)
    steps(model, optimizer, range(3))
    save(group, model, optimizer, path)
    scales = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        of_blocks = [state[key] for key in ("absmax1", "absmax2") if key in state]
        scales[name.removeprefix("module.")] = [
            x.repeat_interleave(BLOCK)[: p.numel()] for x in of_blocks
        ]
    return values(model, optimizer), scales


def continued(group, kind, path, onwards):
    """Loads, and saves what it has for the next."""
    model, optimizer = built(group, kind)
    told = load(group, model, optimizer, path)
    save(group, model, optimizer, onwards)
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}
    return values(model, optimizer), told


def reblocked(moments, scales, ranks):
    """Changes both to those of blocks of so many shards; how many each rank has rounded."""
    rounded = [0] * ranks
    for name, (m, v) in moments.items():
        row = m[0].numel()
        each = -(-len(m) // ranks) * row
        for k, (x, scale) in enumerate(zip((m.view(-1), v.view(-1)), scales[name], strict=False)):
            for rank, shard in enumerate(torch.arange(len(x)).split(each)):
                for at in shard.split(BLOCK):
                    if len(scale[at].unique()) > 1:
                        codes, most = torch.ops.fastssl.quantize_blockwise(x[at], BLOCK, k == 0)
                        scale[at], x[at] = most, op.dequantize_ref(codes, most, BLOCK, k == 0)
                        rounded[rank] += 1
    return rounded


def assert_same(got, want):
    for name in want:
        for x, y in zip(got[name], want[name], strict=True):
            assert torch.equal(x, y), name


def test_states_go_to_other_numbers_of_ranks(ranks, tmp_path):
    path = str(tmp_path / "0")
    moments, scales = ranks.run(begun, 2, "ddp", path)[0]
    kept = copy.deepcopy(moments)
    for kind in ("fsdp 1", "fsdp 2", "fsdp 4", "hsdp 4", "plain 1", "fsdp 4"):
        kind, world = kind[:-2], int(kind[-1])
        path, before = path + kind[0], path
        got = ranks.run(continued, world, kind, before, path)
        shards = 2 if kind == "hsdp" else world
        rounded = reblocked(moments, scales, shards)
        assert any(rounded) == ((world, kind) != (1, "fsdp"))
        for rank, (found, told) in enumerate(got):
            assert_same(found, moments)
            count = rounded[rank % shards]
            assert [int(re.search(r": (\d+) blocks", text)[1]) for text in told] == [count][:count]
    assert_same(moments, {"whole": kept["whole"]})


def resumed(group, path):
    """bfloat16, rounded stochastically: weights and states of a run and of its continuation."""
    options = {"dtype": torch.bfloat16, "stochastic_rounding": True, "state_format": "sqrt"}
    model, optimizer = built(group, **options)
    steps(model, optimizer, range(3))
    save(group, model, optimizer, path, flatten_optimizer_state_dict=True)
    other, again = built(group, **options, weight_decay=0.0)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert load(group, other, again, path, flatten_optimizer_state_dict=True) == []
    for each in ((model, optimizer), (other, again)):
        steps(*each, range(3, 5))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
        for key, x in optimizer.state[p].items():
            assert torch.equal(x, again.state[q][key]), key


@pytest.mark.parametrize("world", [2, 4])
def test_as_many_ranks_resume_bit_for_bit(ranks, tmp_path, world):
    ranks.run(resumed, world, str(tmp_path))


def two_momenta(group, path, kind):
    """AdEMAMix's three moments of the parameter whose rows are whole blocks, saved or loaded."""
    model, _ = built(group, kind)
    optimizer = optim.AdEMAMix8bit(model.parameters(), lr=1e-2)
    if kind == "fsdp":
        steps(model, optimizer, range(3))
        save(group, model, optimizer, path, flatten_optimizer_state_dict=True)
    else:
        load(group, model, optimizer, path, flatten_optimizer_state_dict=True)
    moments = optimizer.full_precision_state_dict()["state"][0]
    return [whole(moments[key]) for key in ("exp_avg", "exp_avg_slow", "exp_avg_sq")]


def test_states_of_two_momenta_go_to_other_numbers_of_ranks(ranks, tmp_path):
    saved = ranks.run(two_momenta, 2, str(tmp_path), "fsdp")[0]
    loaded = ranks.run(two_momenta, 1, str(tmp_path), "plain")[0]
    for x, y in zip(saved, loaded, strict=True):
        assert x.count_nonzero() and torch.equal(x, y)


def through_state_dicts(group, path):
    """By optimizer.state_dict() alone, in a file of each rank; and whole, from one rank."""
    from torch.distributed.checkpoint import state_dict as api

    model, optimizer = built(group)
    steps(model, optimizer, range(3))
    file = f"{path}/{group.rank()}"
    torch.save(optimizer.state_dict(), file)
    own, again = built(group)
    again.load_state_dict(torch.load(file, weights_only=True))
    want = values(model, optimizer)
    assert_same(values(own, again), want)
    to_one = api.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = api.get_optimizer_state_dict(model, optimizer, options=to_one)
    own, again = built(group)
    from_one = api.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    api.set_optimizer_state_dict(own, again, state, options=from_one)
    assert_same(values(own, again), want)

    # What torch.optim has in one process, on shards.
    saved = optimizer.full_precision_state_dict()
    saved["state"] = {
        key: {name: whole(x) for name, x in moments.items()}
        for key, moments in saved["state"].items()
    }
    own, again = built(group)
    again.load_state_dict(saved)
    for name, moments in values(own, again).items():
        for x, y in zip(moments, want[name], strict=True):
            assert (x - y).norm() < 0.02 * y.norm()
    return state, want


def test_state_dicts_without_checkpoints(ranks, tmp_path):
    state, want = ranks.run(through_state_dicts, 4, str(tmp_path))[0]
    model, optimizer = built(None, "plain")
    with pytest.warns(UserWarning, match=r"AdamW8bit.load_state_dict: \d+ blocks .* join parts"):
        optimizer.load_state_dict(state)
    got = values(model, optimizer)
    assert_same(got, {"whole": want["whole"], "bias": want["bias"]})
    # The first shard's 33 rows of 64 end within the 9th block.
    assert torch.equal(got["thin"][0][:32], want["thin"][0][:32])
    assert (got["thin"][0] - want["thin"][0]).norm() < 0.02 * want["thin"][0].norm()


def alone(**options):
    """One process without groups: the model, its optimizer, three steps."""
    model, optimizer = built(None, "plain", **options)
    steps(model, optimizer, range(3))
    return model, optimizer


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    from torch.distributed.checkpoint.api import CheckpointException

    path, wide = str(tmp_path / "8"), str(tmp_path / "32")
    save(None, *alone(), path)
    save(None, *alone(optim_bits=32), wide)
    with pytest.raises(ValueError, match="AdamW8bit.load_state_dict: state_format must be 'sqrt'"):
        load(None, *alone(state_format="sqrt"), path)
    with pytest.raises(ValueError, match="state1 must be of the 8 bits it was saved with"):
        load(None, *alone(optim_bits=32), path)
    # These torch.distributed.checkpoint refuses by itself.
    with pytest.raises(CheckpointException, match="Size mismatch .*optimizer.state.whole.absmax1"):
        load(None, *alone(block_size=128), path)
    with pytest.raises(CheckpointException, match="Missing key in checkpoint .*absmax1"):
        load(None, *alone(), wide)

    model, optimizer = alone()
    saved = optimizer.state_dict()
    for key, wrong, message in (
        ("layout", torch.tensor([34, 0, 1]), r"layout must have the rows of a shard, 1 to 33"),
        ("layout", torch.tensor([33, 0, 2]), r"the order of 2 dimensions, got \[33, 0, 2\]"),
        (
            "absmax2",
            torch.zeros(33, 2),
            r"a number for each block .*, shape \(33, 1\)",
        ),
        ("absmax2", None, "8 bits of state2 mean nothing without absmax2"),
        ("layout", None, "8 bits of state1 mean nothing without layout"),
        ("state2", torch.zeros(34, 256, dtype=torch.uint8), r"needs .* got \(34, 256\)"),
    ):
        state = {k: v for k, v in (saved["state"][0] | {key: wrong}).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict({**saved, "state": {**saved["state"], 0: state}})


def by_columns(group):
    return list(refusals(group))


def refusals(group):
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh_of(group, "fsdp")
    p = nn.Parameter(distribute_tensor(torch.ones(64, 128), mesh, [Shard(1)]))
    optimizer = optim.AdamW8bit([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    full = optimizer.full_precision_state_dict()
    assert full["state"][0]["exp_avg"].full_tensor().shape == (64, 128)
    optimizer.load_state_dict(full)
    for save in (optimizer.state_dict, optimizer.bnb_state_dict):
        try:
            save()
        except ValueError as error:
            yield str(error)


def test_columns_are_refused(ranks):
    for whole_rows, whole_tensor in ranks.run(by_columns, 2):
        assert "AdamW8bit.state_dict: 8-bit states need shards of whole rows" in whole_rows
        assert "AdamW8bit.bnb_state_dict: needs whole parameters, got a shard" in whole_tensor


def by_rows_transposed(group):
    """The moments of shards that lie in memory column by column, and their state, whole."""
    from torch.distributed.tensor import DTensor, Shard

    def shard():
        x = torch.randn(131, 64) * 10.0 ** (torch.arange(64) % 16 // 4)
        x = x.split(66)[group.rank()].t().contiguous().t()
        shape = {"shape": torch.Size((131, 64)), "stride": (1, 131)}
        return DTensor.from_local(x, mesh, [Shard(0)], run_check=False, **shape)

    mesh = mesh_of(group, "fsdp")
    p = nn.Parameter(shard())
    optimizer = optim.AdamW8bit([p])
    p.grad = shard()
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0] = {key: whole(x) for key, x in state["state"][0].items()}
    return whole(optimizer.full_precision_state_dict()["state"][0]["exp_avg"]), state


def test_shards_that_lie_otherwise_in_memory(ranks):
    for want, state in ranks.run(by_rows_transposed, 2):
        optimizer = optim.AdamW8bit([nn.Parameter(torch.zeros(131, 64))])
        with pytest.warns(UserWarning, match="66 blocks of this rank join"):
            optimizer.load_state_dict(state)
        got = optimizer.full_precision_state_dict()["state"][0]["exp_avg"]
        assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_another_memory_format(tmp_path):
    """The saved blocks are of elements as they lay in memory then."""

    def convolution(memory_format):
        torch.manual_seed(0)
        model = nn.Conv2d(40, 20, 3).to(memory_format=memory_format)
        return model, optim.AdamW8bit(model.parameters())

    model, optimizer = convolution(torch.channels_last)
    steps(model, optimizer, range(3))
    save(None, model, optimizer, str(tmp_path))
    other, again = convolution(torch.contiguous_format)
    assert len(load(None, other, again, str(tmp_path))) == 1
    got, want = values(other, again)["weight"], values(model, optimizer)["weight"]
    for x, y in zip(got, want, strict=True):
        assert (x - y).norm() < 0.01 * y.norm()
    other, again = convolution(torch.channels_last)
    assert load(None, other, again, str(tmp_path)) == []
    assert_same(values(other, again), values(model, optimizer))


def test_bytes_of_a_checkpoint():
    params = [nn.Parameter(torch.ones(s)) for s in ((768, 768), (512, 2048), (128, 128, 3, 3))]
    optimizer = optim.AdamW8bit(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = [x for state in optimizer.state_dict()["state"].values() for x in state.values()]
    assert sum(x.nbytes for x in saved) < 2.04 * sum(p.numel() for p in params)


def test_states_come_to_the_device_of_their_parameters():
    saved = alone()[1].state_dict()
    model = Model().to("meta")
    optimizer = optim.AdamW8bit(model.parameters())
    optimizer.load_state_dict(saved)
    for state in optimizer.state.values():
        assert {x.device.type for x in state.values()} == {"meta"}


def sharded_steps(group):
    model = torch.nn.Sequential(torch.nn.Linear(64, 131), torch.nn.Linear(131, 1))
    plain = copy.deepcopy(model)
    for layer in model:
        fully_sharded(layer, group)
    options = {"optim_bits": 32, "max_grad_norm": 0.5, "nonfinite": "skip_step"}
    optimizers = [optim.AdamW8bit(m.parameters(), lr=1e-2, **options) for m in (model, plain)]
    for _ in range(3):
        x = torch.randn(16, 64)
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)
    try:
        optim.LARS(model.parameters(), lr=1.0)
    except ValueError as error:
        return str(error)


def test_shards_are_stepped_where_they_lie(ranks):
    for told in ranks.run(sharded_steps, 2):
        assert "LARS: the trust ratio needs the norm of the whole tensor, got a shard" in told


def resharded_steps(group, path, world, bits):
    """Two more steps of a run that other numbers of ranks began; the weights."""
    import torch.distributed.checkpoint as dcp

    model = torch.nn.Sequential(torch.nn.Linear(64, 131), torch.nn.Linear(131, 1))
    if world:
        fully_sharded(model, group)
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-2, optim_bits=bits)
    weights = dict(model.named_parameters())
    if world > 1:
        target = {"model": weights, "optimizer": optimizer.full_precision_state_dict()}
        dcp.load(target, checkpoint_id=f"{path}/{world // 2}", process_group=group)
        optimizer.load_state_dict(target["optimizer"])
    begun = {0: 0, 1: 0, 2: 2, 4: 4}[world]
    for step in range(begun, begun + 2 if world else 6):
        optimizer.zero_grad()
        torch.manual_seed(step)
        model(torch.randn(16, 64)).square().mean().backward()
        optimizer.step()
    if not world:
        return [p.detach() for p in model.parameters()]
    saved = {"model": weights, "optimizer": optimizer.full_precision_state_dict()}
    dcp.save(saved, checkpoint_id=f"{path}/{world}", process_group=group)
    return [p.full_tensor().detach() for p in model.parameters()]


@pytest.mark.parametrize("bits", [8, 32])
def test_a_run_goes_on_with_other_numbers_of_ranks(ranks, tmp_path, bits):
    (truth,) = ranks.run(resharded_steps, 1, "", 0, bits)
    for world in (1, 2, 4):
        ends = ranks.run(resharded_steps, world, str(tmp_path), world, bits)
    for p, q in zip(truth, ends[0], strict=True):
        assert (p - q).norm() < (0.01 if bits == 8 else 1e-6) * p.norm()
