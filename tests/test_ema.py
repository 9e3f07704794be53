import copy
import math

import pytest
import torch
from oracle import assert_no_worse
from torch import nn

import fastssl
from fastssl.ops.ema import ema_ref
from fastssl.optim import EMA, cosine_momentum, warmup_momentum

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(a, v) for a in DTYPES for v in DTYPES]
SIZES = [(), (1,), (2, 3), (0, 5), (7, 5), (33, 17), (257, 96), (70_001,)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
devices = pytest.mark.parametrize("device", DEVICES)
op = torch.ops.fastssl.ema_


def weight(w, dtype=torch.float64):
    return torch.tensor(w, dtype=dtype)


def clones(tensors):
    return [x.clone() for x in tensors]


def right(got, old, values, w):
    exact, plain = [x.double() for x in old], clones(old)
    ema_ref(exact, values, weight(w))
    ema_ref(plain, values, weight(w))
    for new, true, same in zip(got, exact, plain, strict=True):
        assert new.dtype == same.dtype and new.stride() == same.stride()
        assert_no_worse(new.cpu(), true.cpu(), same.cpu(), magnitude=4 * float(w < 1))


# ------------------------------------------------------------------------------------------ the op


def test_the_reference_is_the_formula():
    a, v = torch.randn(2, 50, dtype=torch.float64)
    for w in (0.0, 1e-3, 0.6, 1.0):
        got = a.clone()
        ema_ref([got], [v], weight(w))
        torch.testing.assert_close(got, (1 - w) * a + w * v, rtol=1e-14, atol=1e-14)


@devices
@pytest.mark.parametrize("w", [1e-4, 0.3, 0.75, 1.0])
def test_all_sizes_and_dtypes_in_one_call(w, device):
    averages = [torch.randn(s, device=device).to(a) for s in SIZES for a, _ in PAIRS]
    values = [torch.randn(s, device=device).to(v) for s in SIZES for _, v in PAIRS]
    old = clones(averages)
    op(averages, values, weight(w))
    right(averages, old, values, w)
    if w == 1:
        for x, v in zip(averages, values, strict=True):
            assert torch.equal(x, v.to(x.dtype))


@devices
def test_strides(device):
    def random(*shape, channels_last=False):
        x = torch.randn(*shape, device=device)
        return x.to(memory_format=torch.channels_last) if channels_last else x

    image = 4, 6, 5, 3
    pairs = [
        (random(*image, channels_last=True), random(*image, channels_last=True)),
        (random(*image, channels_last=True), random(*image)),
        (random(*image), random(*image, channels_last=True).bfloat16()),
        (random(8, 1, 3, 3), random(8, 1, 3, 3, channels_last=True)),
        (random(40, 8)[:, 1:4], random(40, 3)),
        (random(40, 8)[:, 1:4], random(40, 8)[:, 2:5]),
        (random(40, 3), random(1, 3).expand(40, 3)),
        (random(1, 3).expand(1, 3), random(3, 1).T),
        (random(9, 3).T, random(9, 3).T),
    ]
    averages, values = map(list, zip(*pairs, strict=True))
    old = [torch.empty_strided(x.shape, x.stride(), device=device).copy_(x) for x in averages]
    op(averages, values, weight(0.1))
    for new, true, v in zip(averages, old, values, strict=True):
        right([new.contiguous()], [true.contiguous()], [v], 0.1)
    assert averages[1].is_contiguous(memory_format=torch.channels_last)


def test_gaps_stay_as_they_are():
    whole = torch.randn(40, 8)
    old = whole.clone()
    op([whole[:, 1:4]], [torch.randn(40, 3)], weight(0.5))
    assert torch.equal(whole[:, 4:], old[:, 4:]) and torch.equal(whole[:, 0], old[:, 0])


@devices
def test_extremes(device):
    a, v = torch.zeros(2, 40, device=device)
    v[3], v[5], v[9], a[7], a[9] = torch.nan, torch.inf, 0.1, torch.nan, 0.1
    op([a], [v], weight(0.1))
    assert a[[3, 7]].isnan().all() and a[5] == torch.inf and a[9] == v[9]
    op([], [], weight(0.1))


def test_threads_change_no_bit():
    averages = [torch.randn(n).to(a) for n in (100_003, 7, 60_001) for a, _ in PAIRS]
    values = [torch.randn(n).to(v) for n in (100_003, 7, 60_001) for _, v in PAIRS]
    others, threads = clones(averages), torch.get_num_threads()
    try:
        for n, some in ((1, averages), (3, others)):
            torch.set_num_threads(n)
            op(some, values, weight(0.3))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(averages, others, strict=True))


@devices
def test_opcheck(device):
    a = [torch.randn(7, 5, device=device), torch.randn(3, device=device)]
    v = [torch.randn(7, 5, device=device).bfloat16(), torch.randn(3, device=device)]
    torch.library.opcheck(op.default, (a, v, weight(0.1)))


def test_compiles_without_a_break():
    a, v = [torch.randn(9), torch.randn(2, 3)], [torch.randn(9), torch.randn(2, 3)]
    expected = clones(a)
    op(expected, v, weight(0.1))
    torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")(a, v, weight(0.1))
    assert all(torch.equal(x, y) for x, y in zip(a, expected, strict=True))


@pytest.mark.skipif(bool(fastssl.extension.why_missing), reason="the reference has torch's")
def test_messages_of_the_op():
    x = torch.zeros(4)
    with pytest.raises(RuntimeError, match="average 1 and its value must have one shape"):
        op([x, x], [x, x[:3]], weight(0.1))
    with pytest.raises(RuntimeError, match="2 averages for 1 values"):
        op([x, x], [x], weight(0.1))
    with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16"):
        op([x.double()], [x], weight(0.1))
    with pytest.raises(RuntimeError, match="weight must be one float32 or float64 number"):
        op([x], [x], x)


# ----------------------------------------------------------------------------------------- the EMA


def network():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 2))


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    model(torch.randn(4, 3, 6, 6))
    return model


def test_follows_a_schedule():
    model = network()
    ema, momentum = EMA(model, cosine_momentum(0.9, steps=5)), cosine_momentum(0.9, steps=5)
    expected = [p.detach().double() for p in model.parameters()]
    for step in range(7):
        moved(model)
        ema.update(step)
        m = momentum(step)
        expected = [
            m * e + (1 - m) * p.detach() for e, p in zip(expected, model.parameters(), strict=True)
        ]
    for a, e in zip(ema.module.parameters(), expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-6)


def test_schedules():
    momentum = cosine_momentum(0.99, 0.999, steps=1000)
    assert momentum(0) == 0.99 and momentum(1000) == momentum(5000) == 0.999
    assert math.isclose(momentum(250), 0.999 - 0.009 * (math.cos(math.pi / 4) + 1) / 2)
    assert [warmup_momentum(0.99)(t) for t in (0, 10, 10_000)] == [0.1, 11 / 20, 0.99]
    for make, message in (
        (lambda: cosine_momentum(1.1, steps=3), r"start must be in \[0, 1\], got 1.1"),
        (lambda: cosine_momentum(0.9, -1, steps=3), "end must be .* got -1"),
        (lambda: cosine_momentum(0.9, steps=0), "steps must be at least 1, got 0"),
        (lambda: warmup_momentum(2), "most must be .* got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("buffers", ["copy", "average", "keep"])
def test_buffers(buffers):
    model = network()
    ema = EMA(model, 0.75, buffers=buffers)
    moved(model)
    ema.update()
    mean, count = model[1].running_mean, model[1].num_batches_tracked
    of_copy = ema.module[1]
    torch.testing.assert_close(
        of_copy.running_mean, {"copy": mean, "average": 0.25 * mean, "keep": 0 * mean}[buffers]
    )
    assert of_copy.num_batches_tracked == (0 if buffers == "keep" else count) and count == 1


def test_averages_in_fp32_of_bf16_weights():
    """Ten thousandths of a small difference add up, where bf16 averages do not move."""
    model = nn.Linear(8, 8).bfloat16()
    nn.init.ones_(model.weight)
    wide, narrow = EMA(model, 0.9999, dtype=torch.float32), EMA(model, 0.9999)
    nn.init.constant_(model.weight, 1.5)
    for _ in range(100):
        wide.update()
        narrow.update()
    expected = torch.full((8, 8), 1.5 - 0.5 * 0.9999**100)
    torch.testing.assert_close(wide.module.weight, expected, rtol=0, atol=2e-6)
    assert torch.equal(narrow.module.weight, torch.ones(8, 8, dtype=torch.bfloat16))


def test_is_a_module_apart_from_the_model():
    model = network().eval()
    model[1].train()
    ema = EMA(model)
    assert [m.training for m in ema.module.modules()] == [m.training for m in model.modules()]
    assert not any(p.requires_grad for p in ema.parameters())
    names = {"module." + name for name in model.state_dict()}
    assert set(ema.state_dict()) == names  # the model is not in it a second time
    x = torch.randn(2, 3, 6, 6)
    assert not ema(x).requires_grad and model(x).requires_grad
    other = EMA(network())
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.module[3].weight, ema.module[3].weight)
    both = copy.deepcopy(nn.ModuleDict({"student": model, "teacher": ema}))
    assert both["teacher"].model is both["student"] is not model
    snapshot = copy.deepcopy(ema)  # with a model of its own, until told otherwise
    snapshot.model = model
    assert set(snapshot.state_dict()) == names and snapshot.model is model
    nn.init.constant_(model[3].weight, 7.0)
    snapshot.momentum = 0.0
    snapshot.update()
    assert snapshot.module[3].weight.eq(7).all()


@pytest.mark.parametrize("buffers", ["copy", "average", "keep"])
def test_expanded_buffers(buffers):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        layer.mask = nn.Buffer(torch.ones(1, 1).expand(4, 4))
    model[1].mask = model[0].mask  # twice the same
    ema = EMA(model, 0.75, buffers=buffers)
    model[0].mask = model[1].mask = torch.full((), 2.0).expand(4, 4)
    ema.update()
    expected = {"copy": 2.0, "average": 1.25, "keep": 1.0}[buffers]
    assert ema.module[0].mask.eq(expected).all() and ema.module[1].mask is ema.module[0].mask


def test_replaced_and_tied_tensors():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    ema = EMA(model, 0.5)
    assert ema.module[1].weight is ema.module[0].weight
    start = model[0].weight.detach().clone()
    model[0].weight = model[1].weight = nn.Parameter(start + 1)
    ema.update()
    torch.testing.assert_close(ema.module[1].weight, start + 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_momentum_in_a_tensor(dtype):
    model = nn.Linear(4, 4)
    momentum = torch.tensor([0.5], dtype=dtype)
    ema = EMA(model, momentum)
    start = model.bias.detach().clone()
    nn.init.constant_(model.bias, 1.0)
    ema.update()
    torch.testing.assert_close(ema.module.bias, (start + 1) / 2)
    momentum.fill_(0.0)
    ema.update()
    assert torch.equal(ema.module.bias, model.bias)


@devices
def test_timm_reads_and_writes_the_same_states(device):
    timm = pytest.importorskip("timm.utils")
    model = network().to(device)
    ema, theirs = EMA(model, 0.9), timm.ModelEmaV3(model, decay=0.9)
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update()
        theirs.update(model)
    for name, x in theirs.state_dict().items():
        torch.testing.assert_close(ema.state_dict()[name], x, rtol=1e-5, atol=1e-6)
    theirs.load_state_dict(ema.state_dict())
    EMA(model).load_state_dict(theirs.state_dict())


def test_messages():
    model = nn.Linear(4, 4)
    for make, message in (
        (lambda: EMA(model, 1.5), r"EMA: momentum must be in \[0, 1\], got 1.5"),
        (lambda: EMA(model, buffers="mean"), "buffers must be .* got 'mean'"),
        (lambda: EMA(model, lambda t: 0.5).update(), "is a schedule. Give the step"),
        (lambda: EMA(model, lambda t: 2.0).update(1), r"EMA.update: momentum must .* got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="got torch.float64 of shape"):
        EMA(nn.Linear(4, 4).double())
    with pytest.raises(TypeError, match="dtype must be .* got torch.int8"):
        EMA(model, dtype=torch.int8)
    for make, message in (
        (lambda: EMA(model, "0.9"), "EMA: momentum must be one number, got '0.9'"),
        (lambda: EMA(model, torch.ones(2)), r"must be one number, got a tensor \(2,\)"),
        (lambda: EMA(model, lambda t: None).update(1), "EMA.update: momentum .* got None"),
        (lambda: EMA([1]), "model must be an nn.Module, got list"),
    ):
        with pytest.raises(TypeError, match=message):
            make()
    ema = EMA(model)
    model.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="the copy has 2 tensors and the model 3"):
        ema.update()
    del model.extra
    model.bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"got \(4,\) on cpu for \(3,\) on cpu"):
        ema.update()


def sharded_averages(group):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(6, 13), nn.BatchNorm1d(13), nn.Linear(13, 1))
    plain = copy.deepcopy(model)
    ema, whole = EMA(model, 0.75), EMA(plain, 0.75)
    mesh = DeviceMesh.from_group(group, "cpu")
    fully_shard(ema.module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            for x in (getattr(p, "_local_tensor", p), q):
                x.add_(1)
    ema.update()
    whole.update()
    for a, b in zip(ema.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b)
    return len(ema(torch.randn(3, 6)))


def test_shards(ranks):
    assert ranks.run(sharded_averages, 2) == [3, 3]


def wrapped(group):
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2), process_group=group)
    try:
        EMA(model)
    except TypeError as error:
        return str(error)


def test_a_wrapped_model_is_refused(ranks):
    assert "Give its .module" in ranks.run(wrapped, 1)[0]
