"""States of the optimizers: saved, loaded, exchanged with bitsandbytes and torch.optim."""

import copy
import io

import pytest
import torch
from torch.nn import Parameter

from fastssl import optim
from fastssl.ops import blockwise as op

SHAPES = [(90, 70), (33,), (40, 20, 3, 3), (4097,)]
OPTIONS = {
    "Adam8bit": {"weight_decay": 0.0},
    "AdamW8bit": {"weight_decay": 0.0},
    "SGD8bit": {"momentum": 0.9},
    "Lion8bit": {},
    "RMSprop8bit": {},
    "Adagrad8bit": {},
    "LARS8bit": {"momentum": 0.9},
    "LAMB8bit": {"weight_decay": 0.0},
    "AdEMAMix8bit": {"t_alpha": 10, "t_beta3": 10},
}


def tensors(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def copies(params):
    return [Parameter(p.detach().clone()) for p in params]


def run(optimizer, params, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def build(name, params, **options):
    return getattr(optim, name)(params, **{"lr": 1e-2, **OPTIONS.get(name, {}), **options})


def distance(params, others, start):
    """Between two ends, relative to the way from the start."""
    flat = [torch.cat([p.detach().flatten() for p in each]) for each in (params, others, start)]
    return float((flat[0] - flat[1]).norm() / (flat[0] - flat[2]).norm())


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", [*OPTIONS, "LARS", "LAMB", "Lion"])
@pytest.mark.parametrize("state_format", ["bnb", "sqrt"])
def test_resuming_is_bit_exact(name, state_format):
    options = {"state_format": state_format, "block_size": 64, "weight_decay": 0.1}
    params = tensors(torch.bfloat16)
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    optimizer = build(name, params, **options)
    run(optimizer, params, 3)
    saved, others = through_a_file(optimizer.state_dict()), copies(params)
    resumed = build(name, others, **{**options, "lr": 1.0, "weight_decay": 0.0})
    resumed.load_state_dict(saved)
    twins = copies(params)
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"], old = twins, twin.param_groups[0]["params"]
    for p, q in zip(twins, old, strict=True):
        twin.state[p] = twin.state.pop(q)
    for each, own in ((optimizer, params), (resumed, others), (twin, twins)):
        run(each, own, 2, seed=2)
    for p, q, r in zip(params, others, twins, strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)
        for key, x in optimizer.state[p].items():
            assert torch.equal(x, resumed.state[q][key]), key
            assert x.stride() == resumed.state[q][key].stride()


def test_the_state_says_what_it_is():
    params = tensors()
    optimizer = build("AdamW8bit", params)
    run(optimizer, params, 1)
    group = optimizer.state_dict()["param_groups"][0]
    assert (group["version"], group["block_size"], group["state_format"]) == (2, 256, "bnb")
    assert group["tables"] == f"signed {op.SHA256[True]}, unsigned {op.SHA256[False]}"
    state = optimizer.state_dict()["state"][0]
    assert {k: (x.dtype, tuple(x.shape)) for k, x in state.items()} == {
        "step": (torch.int64, ()),
        "state1": (torch.uint8, (90, 70)),
        "absmax1": (torch.float32, (90, 1)),
        "state2": (torch.uint8, (90, 70)),
        "absmax2": (torch.float32, (90, 1)),
        "layout": (torch.int64, (3,)),
    }


def test_what_others_keep_in_groups_is_loaded():
    params = tensors()
    optimizer = build("AdamW8bit", [{"params": params, "name": "all", "lr_scale": 0.5}])
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    run(optimizer, params, 1)
    for saved, kept in (
        (optimizer.state_dict(), {"initial_lr": 1e-2, "name": "all", "lr_scale": 0.5}),
        (optimizer.full_precision_state_dict(), {"initial_lr": 1e-2}),
    ):
        again = build("AdamW8bit", copies(params), lr=1.0)
        again.load_state_dict(through_a_file(saved))
        torch.optim.lr_scheduler.StepLR(again, 5, last_epoch=1)
        assert kept.items() <= again.param_groups[0].items()


def test_hooks_see_states_as_they_are_saved_and_loaded():
    params = tensors()
    optimizer = build("AdamW8bit", [(str(p.shape), p) for p in params])
    run(optimizer, params, 1)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before"))
    optimizer.register_state_dict_post_hook(
        lambda o, saved: seen.append(tuple(saved["state"][0]["absmax1"].shape))
    )
    saved = optimizer.state_dict()
    assert seen == ["before", (90, 1)]

    def by_name(optimizer, saved):
        names = saved["param_groups"][0]["param_names"]
        order = [names.index(name) for name in optimizer.param_groups[0]["param_names"]]
        group = saved["param_groups"][0] | {"param_names": [names[i] for i in order]}
        state = {new: saved["state"][old] for new, old in enumerate(order)}
        return {"state": state, "param_groups": [group]}

    others = copies(params)[::-1]
    again = build("AdamW8bit", [(str(p.shape), p) for p in others])
    again.register_load_state_dict_pre_hook(by_name)
    again.register_load_state_dict_post_hook(
        lambda o: seen.append(len(o.state[others[0]]["absmax1"]))
    )
    again.load_state_dict(saved)
    assert seen[2:] == [17] and list(saved["state"][0]["state1"].shape) == [90, 70]
    for p, q in zip(params[::-1], others, strict=True):
        assert torch.equal(optimizer.state[p]["state1"], again.state[q]["state1"])


@pytest.mark.parametrize(
    ("name", "theirs", "setting"),
    [("Adam8bit", "Adam", "amsgrad"), ("RMSprop8bit", "RMSprop", "centered")],
)
def test_a_third_state_is_refused(name, theirs, setting):
    params = tensors()
    source = getattr(torch.optim, theirs)(params, **{setting: True})
    run(source, params, 1)
    with pytest.raises(ValueError, match=f"{name}.load_state_dict: {setting}=True is not"):
        build(name, copies(params)).load_state_dict(source.state_dict())


def test_states_that_do_not_fit_are_refused():
    params = tensors()
    optimizer = build("AdamW8bit", params)
    run(optimizer, params, 1)
    saved = optimizer.state_dict()
    for options, message in (
        ({"block_size": 64}, "block_size must be 64, got 256. Build the optimizer with"),
        ({"state_format": "sqrt"}, "state_format must be 'sqrt', got 'bnb'"),
    ):
        with pytest.raises(ValueError, match=f"AdamW8bit.load_state_dict: {message}"):
            build("AdamW8bit", params, **options).load_state_dict(saved)
    other = copy.deepcopy(saved)
    other["param_groups"][0]["tables"] = "0" * 64
    with pytest.raises(ValueError, match="tables must be .*, got '0000"):
        optimizer.load_state_dict(other)
    other = copy.deepcopy(saved)
    other["state"][0]["absmax2"] = torch.zeros(89, 1)
    with pytest.raises(ValueError, match="parameter 0 .*absmax2 must have a number for each block"):
        optimizer.load_state_dict(other)
    with pytest.raises(
        ValueError, match=r"parameter 0 of shape \(70, 90\): needs .*got \(90, 70\)"
    ):
        build("AdamW8bit", tensors(shapes=[(70, 90), *SHAPES[1:]])).load_state_dict(saved)
    other = copy.deepcopy(saved)
    del other["state"][0]["step"]
    with pytest.raises(ValueError, match=r"parameter 0 .*needs step, got \['absmax1'"):
        optimizer.load_state_dict(other)
    with pytest.raises(ValueError, match=r"needs 'state' and 'param_groups', got \[\]"):
        optimizer.load_state_dict({})
    with pytest.raises(ValueError, match=r"must have \[3\] parameters, got \[4\]"):
        build("AdamW8bit", params[:3]).load_state_dict(saved)
    with pytest.raises(ValueError, match="needs a state for exp_avg_sq .*got none among"):
        lion = build("Lion8bit", copies(params))
        run(lion, lion.param_groups[0]["params"], 1)
        optimizer.load_state_dict(lion.state_dict())
    assert torch.equal(saved["state"][0]["state1"], optimizer.state[params[0]]["state1"])


TORCH = {
    "Adam8bit": ("Adam", {"weight_decay": 0.1}),
    "AdamW8bit": ("AdamW", {"weight_decay": 0.1}),
    "SGD8bit": ("SGD", {"momentum": 0.9, "dampening": 0.2}),
    "RMSprop8bit": ("RMSprop", {"momentum": 0.5}),
    "Adagrad8bit": ("Adagrad", {"lr_decay": 0.1}),
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("bits", [8, 32])
def test_to_torch_and_back(name, bits):
    theirs, options = TORCH[name]
    params = tensors()
    optimizer = build(name, params, **options, optim_bits=bits)
    run(optimizer, params, 3)
    start, others, back = params, copies(params), copies(params)
    start = copies(params)
    in_torch = getattr(torch.optim, theirs)(others, lr=1.0)
    in_torch.load_state_dict(through_a_file(optimizer.full_precision_state_dict()))
    again = build(name, back, lr=1.0, optim_bits=bits)
    again.load_state_dict(through_a_file(in_torch.state_dict()))
    for p, q in zip(params, back, strict=True):
        for key, x in optimizer.state[p].items():
            if key != "step" and x.dtype != torch.uint8:
                torch.testing.assert_close(again.state[q][key], x, rtol=1e-2, atol=0)
    for each, own in ((optimizer, params), (in_torch, others), (again, back)):
        run(each, own, 3, seed=2)
    limit = 0.02 if bits == 8 else 1e-5
    assert distance(others, params, start) < limit
    assert distance(others, back, start) < limit


@pytest.mark.parametrize("bits", [8, 32])
def test_the_two_momenta_of_ademamix(bits):
    """Stacked, each as it lies in memory, with blocks of its own; in full precision apart."""
    params = tensors()
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    optimizer = build("AdEMAMix8bit", params, optim_bits=bits)
    run(optimizer, params, 3)
    for p in params:
        state, x = optimizer.state[p], optimizer.state[p]["state1"]
        assert x.shape == (2, *p.shape) and x[0].stride() == x[1].stride() == p.stride()
        if x.dtype == torch.uint8:
            assert state["absmax1"].shape == (2, -(-p.numel() // 256))
    full = optimizer.full_precision_state_dict()
    assert full["state"][2].keys() == {"step", "exp_avg", "exp_avg_slow", "exp_avg_sq"}
    start, others = copies(params), copies(params)
    again = build("AdEMAMix8bit", others, lr=1.0, optim_bits=bits)
    again.load_state_dict(through_a_file(full))
    for each, own in ((optimizer, params), (again, others)):
        run(each, own, 2, seed=2)
    assert distance(params, others, start) < (0.02 if bits == 8 else 1e-6)
    del full["state"][0]["exp_avg_slow"]
    with pytest.raises(ValueError, match="needs a state for exp_avg and exp_avg_slow of this"):
        again.load_state_dict(full)
    full["param_groups"][0]["betas"] = (0.9, 0.999)
    with pytest.raises(ValueError, match=r"AdEMAMix8bit: needs betas three, .*got \(0.9, 0.999\)"):
        again.load_state_dict(full)
    adam = build("AdamW8bit", others)
    run(adam, others, 1)
    saved = adam.state_dict()
    saved["param_groups"][0]["betas"] = (0.9, 0.999, 0.9999)
    with pytest.raises(ValueError, match=r"exp_avg and exp_avg_slow of this shape, got \(90, 70\)"):
        again.load_state_dict(saved)


def test_the_32_bit_lars_of_older_files_loads():
    params = tensors()
    momenta = [torch.randn_like(p) for p in params]
    group = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.0, "eta": 0.01, "clip": True}
    optimizer = optim.LARS(params, lr=1.0)
    optimizer.load_state_dict(
        {
            "state": {i: {"momentum": m} for i, m in enumerate(momenta)},
            "param_groups": [{**group, "params": [0, 1, 2, 3]}],
        }
    )
    assert optimizer.param_groups[0]["eta"] == 0.01
    for p, m in zip(params, momenta, strict=True):
        assert torch.equal(optimizer.state[p]["state1"], m)


# ------------------------------------------------------------------------------------ bitsandbytes


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").optim


@pytest.mark.parametrize("name", OPTIONS)
def test_bitsandbytes_loads_ours_and_we_theirs(bnb, name):
    theirs = tensors()
    source = getattr(bnb, name)(theirs, lr=1e-2, **OPTIONS[name])
    run(source, theirs, 3)
    start, ours, back = copies(theirs), copies(theirs), copies(theirs)
    optimizer = build(name, ours, lr=1.0)
    optimizer.load_state_dict(through_a_file(source.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 1e-2
    returned = getattr(bnb, name)(back, lr=1.0, **OPTIONS[name])
    returned.load_state_dict(through_a_file(optimizer.bnb_state_dict()))
    # RMSprop's and Adagrad's codes go by way of the unsigned table; a norm is made anew.
    exact = name not in ("RMSprop8bit", "Adagrad8bit")
    for p, q in zip(theirs, back, strict=True):
        assert source.state[p].keys() == returned.state[q].keys()
        for key in source.state[p].keys() - {"unorm_vec"}:
            x, y = (torch.as_tensor(each.state[r][key]) for each, r in ((source, p), (returned, q)))
            if exact or x.dtype != torch.uint8:
                assert torch.equal(x, y), key
    for each, own in ((source, theirs), (optimizer, ours), (returned, back)):
        run(each, own, 2, seed=2)
    assert distance(theirs, back, start) < 1e-3
    if name not in ("LARS8bit", "LAMB8bit"):  # which have no trust ratio there
        assert distance(theirs, ours, start) < 0.02


@pytest.mark.parametrize("state_format", ["bnb", "sqrt"])
def test_other_forms_convert_to_bitsandbytes(bnb, state_format):
    params = tensors()
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    optimizer = build("AdamW8bit", params, state_format=state_format, block_size=128)
    run(optimizer, params, 3)
    start, others, back = copies(params), copies(params), copies(params)
    theirs = bnb.AdamW8bit(others, lr=1.0)
    theirs.load_state_dict(optimizer.bnb_state_dict())
    again = build("AdamW8bit", back, state_format=state_format, block_size=128)
    again.load_state_dict(optimizer.bnb_state_dict())
    for each, own in ((optimizer, params), (theirs, others), (again, back)):
        run(each, own, 2, seed=2)
    assert distance(params, others, start) < 0.05
    assert distance(params, back, start) < 0.02


def bnb_file(block, nested, n=5000, table=None):
    """A state_dict of AdamW8bit as bitsandbytes writes it, of known moments."""
    m, v = torch.randn(n), torch.rand(n)
    state = {}
    for place, x, signed in ((1, m, True), (2, v, False)):
        codes, absmax = torch.ops.fastssl.quantize_blockwise(x, block, signed)
        qmap = op.code_book(signed) if table is None else table
        entries = {"state": codes, "absmax": absmax, "qmap": qmap}
        state |= {f"{key}{place}": value for key, value in entries.items()}
    state = {"step": 7} | ({"__bnb_optimizer_quant_state__": state} if nested else state)
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "alpha": 0.0}
    return m, v, {"state": {0: state}, "param_groups": [{**group, "params": [0]}]}


@pytest.mark.parametrize("block", [256, 2048])
@pytest.mark.parametrize("nested", [False, True])
def test_old_and_new_files_of_bitsandbytes(block, nested):
    m, v, file = bnb_file(block, nested)
    p = Parameter(torch.zeros(5000))
    optimizer = optim.AdamW8bit([p])
    optimizer.load_state_dict(file)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95) and optimizer.state[p]["step"] == 7
    assert len(optimizer.state[p]["absmax1"]) == 20
    full = optimizer.full_precision_state_dict()["state"][0]
    for x, y in ((full["exp_avg"], m), (full["exp_avg_sq"], v)):
        assert (x - y).norm() < 0.03 * y.norm()


def test_files_of_bitsandbytes_that_do_not_fit():
    p = Parameter(torch.zeros(5000))
    file = bnb_file(512, True)[2]
    with pytest.raises(ValueError, match="absmax1 must have .* of 256 or 2048 elements, got 10"):
        optim.AdamW8bit([p]).load_state_dict(file)
    # A table of its own is read by that table.
    table = torch.linspace(-1, 1, 256)
    file = bnb_file(256, False, table=table)[2]
    optimizer = optim.AdamW8bit([p], optim_bits=32)
    optimizer.load_state_dict(file)
    state = file["state"][0]
    scale = state["absmax1"].repeat_interleave(256)[:5000]
    assert torch.equal(optimizer.state[p]["state1"], table[state["state1"].long()] * scale)


def test_momentum_of_rmsprop_has_no_place_there():
    params = tensors()
    optimizer = build("RMSprop8bit", params, momentum=0.9)
    run(optimizer, params, 1)
    with pytest.raises(ValueError, match="bitsandbytes keeps no momentum for RMSprop"):
        optimizer.bnb_state_dict()


# ------------------------------------------------------------------------------------------ memory


def test_memory_report():
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.LayerNorm(256))
    model[1].bias.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    n = sum(p.numel() for p in parameters)
    optimizer = optim.AdamW8bit(parameters)
    before = optim.memory_report(model, optimizer)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optim.memory_report(model, optimizer) == before
    assert before == (4 * (n + 256), 4 * n, 65536 * 2 + 256 * 4 * 2 + 512 * 8, n * 8)
    states = [x for state in optimizer.state.values() for k, x in state.items() if k[-1] in "12"]
    assert before.states == sum(x.nbytes for x in states)
    assert "states            0.5 MiB        0.1 MiB" in str(before)
    optimizer = optim.AdEMAMix8bit(parameters)
    optimizer.step()
    states = [x for state in optimizer.state.values() for k, x in state.items() if k[-1] in "12"]
    report = optim.memory_report(model, optimizer)
    assert report.states == sum(x.nbytes for x in states) and report.states_32bit == n * 12
    plain = torch.optim.AdamW(parameters)
    assert optim.memory_report(model, plain).states == 0
    plain.step()
    report = optim.memory_report(model, plain)
    assert report.states == report.states_32bit == n * 8
