"""Steps of the optimizers: against fp64, torch.optim and the figures of exact nearest codes."""

import hashlib
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from fastssl import optim
from fastssl.ops import blockwise as op
from fastssl.optim import states

CLASSES = {
    name: getattr(optim, name)
    for name in ("Adam8bit", "AdamW8bit", "SGD8bit", "Lion8bit", "RMSprop8bit", "Adagrad8bit")
    + ("LARS8bit", "LAMB8bit", "AdEMAMix8bit", "LARS", "LAMB", "Lion")
}
MOMENTUM = {"SGD8bit": {"momentum": 0.9}, "RMSprop8bit": {"momentum": 0.9}}
SHAPES = [(80, 64), (33,), (5, 7, 3, 3)]


def build(name, params, **options):
    return CLASSES[name](params, **{"lr": 1e-2, **MOMENTUM.get(name, {}), **options})


def tensors(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def run(optimizer, params, steps, seed=1, scale=1.0):
    """Steps with random gradients; all elements of all parameters afterwards, fp64."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)
        optimizer.step()
    return torch.cat([p.detach().double().flatten() for p in params])


# --------------------------------------------------------------------------------------- the codes


@pytest.mark.parametrize("signed", [True, False])
def test_code_book_round_trips_keeps_zero_and_breaks_ties_to_even(signed, cpu_path):
    code = op.code_book(signed)
    assert hashlib.sha256(code.numpy().tobytes()).hexdigest() == op.SHA256[signed]
    quantize = torch.ops.fastssl.quantize_blockwise
    codes, absmax = quantize(code * 3, 256, signed)
    assert codes.tolist() == list(range(256)) and absmax.tolist() == [3.0]
    back = torch.ops.fastssl.dequantize_blockwise(codes, absmax, 256, signed)
    assert torch.equal(back, code * 3)
    middle = (code[1:] + code[:-1]) / 2
    codes, _ = quantize(torch.cat([middle, torch.ones(1)]), 256, signed)
    assert codes[:-1].tolist() == [i + i % 2 for i in range(255)]
    for towards, places in ((-2.0, range(255)), (2.0, range(1, 256))):
        beside = torch.nextafter(middle, torch.tensor(towards))
        codes, _ = quantize(torch.cat([beside, torch.ones(1)]), 256, signed)
        assert codes[:-1].tolist() == list(places)
    x = torch.randn(3001) * 10 ** (-8 * torch.rand(3001)) if signed else torch.rand(3001) ** 20
    for scale in (1.0, 1e-30, 1e-42):
        for got, expected in zip(
            quantize(x * scale, 200, signed), op.quantize_ref(x * scale, 200, signed), strict=True
        ):
            assert torch.equal(got, expected)
    x[100] = torch.nan
    assert torch.equal(quantize(x, 200, signed)[0], op.quantize_ref(x, 200, signed)[0])
    codes, absmax = quantize(torch.zeros(300), 256, signed)
    assert absmax.tolist() == [0, 0]
    assert not torch.ops.fastssl.dequantize_blockwise(codes, absmax, 256, signed).any()


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("bits", [8, 32])
def test_first_states_are_those_of_constant_moments(bits, root):
    like = torch.empty(30, 3, 5, 5).to(memory_format=torch.channels_last)
    for k, value in ((0, 0.0), (1, 0.0), (1, 0.3)):
        found = states.constant(k, like, value, bits, 256, root and k == 1)
        expected = torch.full_like(like, value, dtype=torch.float32)
        expected = states.pack(k, expected, bits, 256, root and k == 1)
        assert found.keys() == expected.keys()
        for name, x in found.items():
            assert torch.equal(x, expected[name]) and x.dtype == expected[name].dtype
            assert x.stride() == expected[name].stride()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("state_format", ["bnb", "sqrt"])
def test_zero_gradients_move_nothing(name, state_format):
    p = tensors((300, 20))[0]
    start = p.detach().clone()
    optimizer = build(name, [p], weight_decay=0.0, state_format=state_format)
    mask = torch.zeros(300, 20).index_fill_(0, torch.arange(0, 300, 3), 1.0)
    for _ in range(200):
        p.grad = torch.randn(300, 20) * mask
        optimizer.step()
    assert torch.equal(p[mask == 0], start[mask == 0])
    assert not torch.equal(p[mask == 1], start[mask == 1])


def displacement_error(spread, scale, eps, mean=0.3, **options):
    """Of 100 steps of AdamW8bit against AdamW, relative, where the elements of a block have
    gradients whose sizes span `spread` decades."""
    n = 1 << 15
    sizes = scale * 10 ** (-spread * torch.rand(n))
    ends = []
    for make in (torch.optim.AdamW, optim.AdamW8bit):
        p = Parameter(torch.zeros(n))
        more = {"fused": True} if make is torch.optim.AdamW else options
        optimizer = make([p], lr=1e-3, eps=eps, weight_decay=0.0, **more)
        generator = torch.Generator().manual_seed(1)
        for _ in range(100):
            p.grad = (mean + torch.randn(n, generator=generator)) * sizes
            optimizer.step()
        ends.append(p.detach())
    return float((ends[1] - ends[0]).norm() / ends[0].norm())


@pytest.mark.parametrize(
    ("state_format", "spread", "limit"),
    [("bnb", 0, 0.0129), ("bnb", 2, 0.054), ("bnb", 3, 0.3)]
    + [("sqrt", 0, 0.0138), ("sqrt", 2, 0.043), ("sqrt", 3, 0.068)],
)
def test_displacement_is_that_of_exact_nearest_codes(state_format, spread, limit):
    # Over three decades the few second moments that round to 0 decide: 0.19 to 0.29 in 12 draws.
    error = displacement_error(spread, 1e-3, 1e-8, state_format=state_format)
    assert limit / 2 < error < limit


def test_the_size_of_gradients_does_not_matter():
    errors = [displacement_error(0, 10.0**-k, 1e-12) for k in (2, 4, 5, 6, 7)]
    assert max(errors) < 1.01 * min(errors)


# ------------------------------------------------------------------------- each rule against fp64

TORCH_RULES = {
    "adam": ("Adam8bit", "Adam", {"weight_decay": 0.1}),
    "adamw": ("AdamW8bit", "AdamW", {"weight_decay": 0.1}),
    "adamw_defaults": ("AdamW8bit", "AdamW", {"lr": 1e-3}),
    "adamw_slow": ("AdamW8bit", "AdamW", {"betas": (0.95, 0.9999)}),
    "adam_without_m": ("Adam8bit", "Adam", {"betas": (0.0, 0.99)}),
    "sgd": ("SGD8bit", "SGD", {"momentum": 0.0, "weight_decay": 0.1}),
    "momentum": ("SGD8bit", "SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    "dampening": ("SGD8bit", "SGD", {"momentum": 0.9, "dampening": 0.3}),
    "nesterov": ("SGD8bit", "SGD", {"momentum": 0.9, "nesterov": True}),
    "maximize": ("SGD8bit", "SGD", {"momentum": 0.9, "maximize": True}),
    "rmsprop": ("RMSprop8bit", "RMSprop", {"weight_decay": 0.1}),
    "rmsprop_slow": ("RMSprop8bit", "RMSprop", {"alpha": 0.999}),
    "rmsprop_momentum": ("RMSprop8bit", "RMSprop", {"lr": 1e-3, "momentum": 0.9}),
    "adagrad": ("Adagrad8bit", "Adagrad", {"lr_decay": 0.01, "initial_accumulator_value": 0.1}),
}


@pytest.mark.parametrize("rule", TORCH_RULES)
@pytest.mark.parametrize("steps", [1, 200])
def test_32_bit_states_are_as_near_fp64_as_torch(rule, steps):
    ours, theirs, options = TORCH_RULES[rule]
    options = {"lr": 1e-2, **options}
    theirs = getattr(torch.optim, theirs)
    params = tensors(*SHAPES, dtype=torch.float64)
    truth = run(theirs(params, **options), params, steps)
    forms = [{"foreach": False}] + [{"fused": True}] * (theirs is not torch.optim.RMSprop)
    errors = []
    for form in forms:
        params = tensors(*SHAPES)
        errors.append((run(theirs(params, **options, **form), params, steps) - truth).abs())
    params = tensors(*SHAPES)
    found = run(getattr(optim, ours)(params, **options, optim_bits=32), params, steps)
    error = (found - truth).abs()
    # The same roundings in another order; the worst of 5428 random walks is a matter of chance.
    assert error.square().mean() <= 1.02 * max(e.square().mean() for e in errors)
    assert error.max() <= 1.5 * max(e.max() for e in errors)


def papers_step(name, p, g, state, t, t_alpha=None, t_beta3=None):
    """A step by the paper's formulas, in the dtype of p; lr 0.01, weight decay 0.1."""
    adapt = p.dim() >= 2
    if name == "AdEMAMix8bit":
        alpha, beta3 = 5.0, 0.9999
        if t_alpha is not None:
            alpha = min(t * alpha / t_alpha, alpha)
        if t_beta3 is not None:
            log1, log3, part = math.log(0.9), math.log(beta3), t / t_beta3
            beta3 = min(math.exp(log1 * log3 / ((1 - part) * log3 + part * log1)), beta3)
        state["m"] = 0.9 * state["m"] + 0.1 * g
        state["slow"] = beta3 * state["slow"] + (1 - beta3) * g
        state["v"] = 0.999 * state["v"] + 0.001 * g * g
        m, v = state["m"] / (1 - 0.9**t), state["v"] / (1 - 0.999**t)
        return p - 0.01 * ((m + alpha * state["slow"]) / (v.sqrt() + 1e-8) + 0.1 * p)
    if name == "LARS":
        d = g + 0.1 * p if adapt else g
        ratio = 0.02 * p.norm() / d.norm() if adapt else 1.0
        state["m"] = 0.9 * state["m"] + ratio * d
        return p - 0.01 * state["m"]
    if name == "Lion":
        p = p * (1 - 0.01 * 0.1)
        new = p - 0.01 * (0.9 * state["m"] + 0.1 * g).sign()
        state["m"] = 0.99 * state["m"] + 0.01 * g
        return new
    state["m"] = 0.9 * state["m"] + 0.1 * g
    state["v"] = 0.999 * state["v"] + 0.001 * g * g
    m, v = state["m"] / (1 - 0.9**t), state["v"] / (1 - 0.999**t)
    u = m / (v.sqrt() + 1e-6) + 0.1 * p
    return p - 0.01 * (p.norm() / u.norm() if adapt else 1.0) * u


WARM_UPS = {"t_alpha": 120, "t_beta3": 1000}


@pytest.mark.parametrize(
    ("name", "options"),
    [("LARS", {"eta": 0.02}), ("LAMB", {}), ("Lion", {}), ("AdEMAMix8bit", {})]
    + [("AdEMAMix8bit", WARM_UPS)],
)
@pytest.mark.parametrize("steps", [1, 200])
def test_rules_that_torch_has_not(name, options, steps):
    warm_ups = options if options is WARM_UPS else {}
    ends = {}
    for dtype in (torch.float64, torch.float32):
        params = [p.detach() for p in tensors(*SHAPES, dtype=dtype)]
        states = [{key: torch.zeros_like(p) for key in ("m", "slow", "v")} for p in params]
        generator = torch.Generator().manual_seed(1)
        for t in range(1, steps + 1):
            for i, p in enumerate(params):
                g = torch.randn(p.shape, generator=generator).to(dtype)
                params[i] = papers_step(name, p, g, states[i], t, **warm_ups)
        ends[dtype] = torch.cat([p.double().flatten() for p in params])
    params = tensors(*SHAPES)
    optimizer = CLASSES[name](params, lr=0.01, weight_decay=0.1, optim_bits=32, **options)
    error = (run(optimizer, params, steps) - ends[torch.float64]).abs()
    plain = (ends[torch.float32] - ends[torch.float64]).abs()
    assert error.square().mean() <= 1.02 * plain.square().mean()
    assert error.max() <= 1.5 * plain.max()


@pytest.mark.parametrize(
    "name", ["LARS8bit", "LAMB8bit", "SGD8bit", "Lion8bit", "AdamW8bit", "AdEMAMix8bit"]
)
@pytest.mark.parametrize("n", [1, 255, 256, 257, 4095, 4097])
def test_8_bits_stay_near_32_at_every_size(name, n):
    ends = []
    for bits in (8, 32):
        p = tensors((n, 1))[0]
        ends.append(run(build(name, [p], optim_bits=bits, min_8bit_size=0), [p], 5))
    start = tensors((n, 1))[0].detach().double().flatten()
    moved = (ends[1] - start).norm()
    assert 0 < moved
    # Where rounding a momentum turns a sign, Lion moves the other way; so rarely.
    assert (ends[0] - ends[1]).norm() <= (0.2 if name == "Lion8bit" else 0.02) * moved


def test_which_tensors_are_adapted():
    w, b = (torch.ones(64, 64), torch.ones(64))
    for name in ("LARS", "LAMB"):
        moved = {}
        for adapt in (None, True, False):
            params = Parameter(w.clone()), Parameter(b.clone())
            optimizer = build(name, [{"params": params, "adapt": adapt}], weight_decay=0.0)
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            moved[adapt] = [float((p - 1).detach().abs().max()) for p in params]
        assert moved[None] == [moved[True][0], moved[False][1]]
        if name == "LARS":  # lr eta |w| / |g|
            assert moved[True] == pytest.approx([1e-5, 1e-5], rel=0.02)
            assert moved[False] == pytest.approx([1e-2, 1e-2])


# ---------------------------------------------------------------------------------------- 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CLASSES)
def test_16_bit_parameters_are_rounded_once(name, dtype):
    p = tensors((90, 70), dtype=dtype)[0]
    wide = Parameter(p.detach().float())
    for q in (p, wide):
        q.grad = tensors((90, 70), dtype=dtype, seed=1)[0].detach().to(q.dtype)
        build(name, [q]).step()
    assert torch.equal(p, wide.to(dtype))


def test_stochastic_rounding_is_exact_in_the_mean_and_resumes():
    def start():
        p = Parameter(torch.ones(100, 1000, dtype=torch.bfloat16))
        options = {"lr": 1e-3, "stochastic_rounding": True, "seed": 7}
        return p, optim.SGD8bit([p], **options)

    p, optimizer = start()
    p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    # bf16 is 2^-8 wide below 1: plain rounding would leave 1 as it is.
    assert sorted(p.detach().unique().tolist())[-2:] == [1 - 2**-8, 1.0]
    assert abs(float(p.detach().double().mean()) - 0.997) < 5 * 2**-8 * math.sqrt(3 / p.numel())
    saved, half = optimizer.state_dict(), p.detach().clone()
    other, resumed = start()
    other.data.copy_(half)
    resumed.load_state_dict(saved)
    other.grad = p.grad.clone()
    optimizer.step()
    resumed.step()
    assert torch.equal(p, other) and not torch.equal(p, half)


# -------------------------------------------------------------- clipping, scaling, what is skipped


def test_max_grad_norm_is_clip_grad_norm():
    for limit in (0.5, 1e6):
        ends = []
        for inside in (True, False):
            params = tensors(*SHAPES)
            optimizer = build("SGD8bit", params, max_grad_norm=limit if inside else None)
            for step in range(3):
                for p in params:
                    p.grad = torch.full_like(p, 0.1 + step)
                if not inside:
                    torch.nn.utils.clip_grad_norm_(params, limit)
                optimizer.step()
            ends.append(torch.cat([p.detach().flatten() for p in params]))
        torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_gradients_in_16_bits(dtype):
    """Of 2^16 gradients of 300, and one of 1 in fp32, is 76800, which float16 does not have."""
    p, q = Parameter(torch.zeros(1 << 16, dtype=dtype)), Parameter(torch.zeros(1))
    options = {"lr": 1.0, "max_grad_norm": 768.0, "nonfinite": "skip_step"}
    optimizer = optim.SGD8bit([p, q], **options)
    p.grad, q.grad = torch.full_like(p, 300), torch.ones(1)
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, -3)) and optimizer.state[p]["step"] == 1
    assert q.item() == pytest.approx(-0.01, rel=1e-4)


def test_grad_scaler():
    params, plain = tensors(*SHAPES), tensors(*SHAPES)
    optimizer = build("AdamW8bit", params, max_grad_norm=1.0)
    reference = build("AdamW8bit", plain, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        for i, (p, q) in enumerate(zip(params, plain, strict=True)):
            g = torch.randn(p.shape)
            p.grad, q.grad = scaler.scale(g), g
            if step == 1 and i == 2:
                p.grad[0, 0, 0, 0] = torch.inf
        if step == 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            reference.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert optimizer.state[p]["step"] == 3
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", CLASSES)
def test_elements_that_are_skipped_alone(name, bad):
    p = torch.nn.Parameter(torch.randn(64, 128) + 3)
    start, p.grad = p.detach().clone(), torch.randn(64, 128)
    p.grad[3, 5] = bad
    optimizer = getattr(optim, name)([p], lr=0.1, nonfinite="skip_element")
    for _ in range(2):
        optimizer.step()
    assert p.isfinite().all() and p[3, 5] == start[3, 5]
    assert (p != start).sum() == p.numel() - 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite(bad):
    for policy in ("propagate", "skip_element", "skip_step"):
        p, q = tensors((100, 50), (10,))
        start = p.detach().clone(), q.detach().clone()
        optimizer = build("AdamW8bit", [p, q], nonfinite=policy)
        run(optimizer, [p, q], 1)
        before = p.detach().clone(), q.detach().clone()
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        p.grad[3, 4] = bad
        optimizer.step()
        stays = (p == before[0]).flatten()
        at = 3 * 50 + 4
        if policy == "propagate":
            assert p[3, 4].isnan() and p[0, 0].isfinite() and q.isfinite().all()
        elif policy == "skip_element":
            assert stays.nonzero().tolist() == [[at]] and p.isfinite().all()
        else:
            assert stays.all() and torch.equal(q, before[1]) and optimizer.state[p]["step"] == 1
        assert not torch.equal(p, start[0])


@pytest.mark.parametrize("name", CLASSES)
def test_the_reference_propagates_what_the_kernels_do(name, monkeypatch):
    ends = []
    for kernel in (torch.ops.fastssl.blockwise_step_, op.blockwise_step_ref):
        monkeypatch.setattr(torch.ops.fastssl, "blockwise_step_", kernel)
        p, q = tensors((100, 50), (10,))
        # LARS and LAMB share a tensor's norm: adapted, all of p would be NaN.
        optimizer = build(name, [{"params": [p, q], "adapt": False}], optim_bits=32)
        for step in range(3):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
            if step == 1:
                p.grad[3, 4] = torch.nan
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten(), q.detach()]))
    assert ends[0].isnan().nonzero().tolist() == [[3 * 50 + 4]]
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6, equal_nan=True)


# --------------------------------------------------------------------- parameters of various kinds


@pytest.mark.parametrize("name", ["AdamW8bit", "LARS8bit"])
def test_any_dense_layout(name):
    last = tensors((8, 16, 6, 6))[0].detach().to(memory_format=torch.channels_last)
    p = Parameter(last)
    memory = Parameter(last.permute(0, 2, 3, 1).contiguous())
    optimizers = build(name, [p]), build(name, [memory])
    for step in range(3):
        g = torch.randn(8, 16, 6, 6)
        p.grad = g if step else g.to(memory_format=torch.channels_last)
        memory.grad = g.permute(0, 2, 3, 1).contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert p.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(p.permute(0, 2, 3, 1), memory)


def test_groups_and_parameters_without_gradient():
    params = tensors((70, 80), (70, 80), (9,), (0, 3))
    groups = [{"params": params[:1], "lr": 1e-3}, {"params": params[1:], "optim_bits": 32}]
    optimizer = build("AdamW8bit", groups, weight_decay=0.0)
    start = [p.detach().clone() for p in params]
    params[0].grad = torch.ones(70, 80)
    optimizer.step()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [float((p - q).detach().abs().max()) for p, q in zip(params[:3], start, strict=False)]
    assert moved == pytest.approx([2e-3, 1e-2, 1e-2], rel=1e-2)
    assert [int(optimizer.state[p]["step"]) for p in params[:3]] == [2, 1, 1]
    dtypes = [optimizer.state[p]["state1"].dtype for p in params[:3]]
    assert dtypes == [torch.uint8, torch.float32, torch.float32]
    optimizer.add_param_group({"params": tensors((5, 5))})
    params[0].grad = None
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params[:3]] == [2, 2, 2]


def test_parameters_may_change_their_group_and_groups_their_adaptation():
    params = tensors((70, 80), (70, 80))
    groups = [{"params": params[:], "lr": 1.0}, {"params": tensors((3,)), "lr": 0.0}]
    optimizer = build("LARS8bit", groups)
    run(optimizer, params, 1)
    a, b = (p.detach().clone() for p in params)
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    run(optimizer, params, 1)
    assert torch.equal(params[1], b) and not torch.equal(params[0], a)
    a = params[0].detach().clone()
    optimizer.param_groups[0]["adapt"] = False
    run(optimizer, params, 1)
    assert (params[0] - a).norm() > 0.5 * params[0].grad.norm()


def test_states_replaced_in_place_are_used():
    params, others = tensors(*SHAPES), tensors(*SHAPES)
    optimizer, other = build("AdamW8bit", params), build("AdamW8bit", others)
    for _ in range(3):
        run(optimizer, params, 1)
        run(other, others, 1)
        for _ in range(2):  # there and back
            for state in optimizer.state.values():
                for key in state:
                    state[key] = state[key].clone()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for key, x in other.state[q].items():
            assert torch.equal(optimizer.state[p][key], x), key


def test_the_learning_rate_may_change_and_be_a_tensor():
    params, others = tensors((70, 80)), tensors((70, 80))
    one = build("AdamW8bit", params, lr=torch.tensor(1e-2))
    other = build("AdamW8bit", others)
    for lr in (1e-2, 3e-3, 0.0):
        one.param_groups[0]["lr"].fill_(lr)
        other.param_groups[0]["lr"] = lr
        for p, q in zip(params, others, strict=True):
            p.grad = q.grad = torch.randn(70, 80)
        one.step()
        other.step()
    assert torch.equal(params[0], others[0])


def test_momentum_may_begin_later():
    params, others = tensors((70, 80)), tensors((70, 80))
    one = build("SGD8bit", params, momentum=0.0)
    other = torch.optim.SGD(others, lr=1e-2)
    for momentum in (0.0, 0.9, 0.9):
        for optimizer in (one, other):
            optimizer.param_groups[0]["momentum"] = momentum
        params[0].grad = others[0].grad = torch.randn(70, 80)
        one.step()
        other.step()
    torch.testing.assert_close(params[0], others[0], rtol=0, atol=1e-3)


def test_the_first_momentum_is_not_dampened_whenever_it_begins():
    params, others = tensors((70, 80)), tensors((70, 80))
    ours = build("SGD8bit", params, momentum=0.0, dampening=0.5, optim_bits=32)
    theirs = torch.optim.SGD(others, lr=1e-2, dampening=0.5)
    for momentum in (0.0, 0.0, 0.9, 0.9):
        for optimizer, own in ((ours, params), (theirs, others)):
            optimizer.param_groups[0]["momentum"] = momentum
            run(optimizer, own, 1)
        torch.testing.assert_close(params[0], others[0], rtol=0, atol=1e-6)


def test_closure_and_one_call_for_all_tensors(monkeypatch):
    params = tensors(*SHAPES, (100, 100))
    optimizer = build("AdamW8bit", params)
    calls = []
    real = torch.ops.fastssl.blockwise_step_
    monkeypatch.setattr(
        torch.ops.fastssl, "blockwise_step_", lambda *a: calls.append(len(a[0])) or real(*a)
    )

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses == sorted(losses, reverse=True) and calls == [4, 4, 4]


def test_compiled_step():
    params, others = tensors((70, 80)), tensors((70, 80))
    one, other = build("AdamW8bit", params), build("AdamW8bit", others)
    step = torch.compile(one.step, backend="eager")
    for _ in range(3):
        params[0].grad = others[0].grad = torch.randn(70, 80)
        step()
        other.step()
    assert torch.equal(params[0], others[0])


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch knows no cuda device")
@pytest.mark.parametrize("name", CLASSES)
def test_nothing_is_read_back_from_the_device(name, monkeypatch):
    # Tensors without contents raise where their values are asked for.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    with FakeTensorMode():
        params = [Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]
        optimizer = build(name, params, max_grad_norm=1.0, nonfinite="skip_step")
        optimizer.grad_scale = optimizer.found_inf = torch.ones((), device="cuda")
        for lr in (1e-2, torch.tensor(1e-2, device="cuda")):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        assert {x.device.type for p in params for x in optimizer.state[p].values()} == {"cuda"}


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "needs lr >= 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"needs betas both in \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": -1e-8}, "needs eps >= 0"),
        ({"weight_decay": -1}, "needs weight_decay >= 0"),
        ({"optim_bits": 4}, "needs optim_bits 8 or 32, got 4"),
        ({"block_size": 100}, "needs block_size a power of two from 64 to 2048, got 100"),
        ({"state_format": "bf16"}, "needs state_format 'bnb' or 'sqrt', got 'bf16'"),
        ({"nonfinite": "skip"}, "nonfinite must be .*got 'skip'"),
        ({"max_grad_norm": 0.0}, "needs max_grad_norm > 0 or None, got 0.0"),
        ({"max_grad_norm": "1"}, "needs max_grad_norm > 0 or None, got '1'"),
        ({"lr": "1"}, "needs lr >= 0, got '1'"),
        ({"lr": torch.ones(2)}, r"needs lr >= 0, got tensor\(\[1., 1.\]\)"),
        ({"betas": 0.9}, r"needs betas both in \[0, 1\), got 0.9"),
        ({"weight_decay": None}, "needs weight_decay >= 0, got None"),
        ({"block_size": 256.0}, "needs block_size a power of two .*got 256.0"),
        ({"seed": 1.5}, "needs seed an integer of 64 bits, got 1.5"),
        ({"seed": 2**63}, "needs seed an integer of 64 bits, got 9223372036854775808"),
        ({"max_grad_norm": 1.0, "nonfinite": "skip_element"}, "use nonfinite='skip_step'"),
        ({"amsgrad": True}, "amsgrad=True is not supported. Use torch.optim"),
        ({"is_paged": True}, "is_paged=True is not supported"),
        ({"percentile_clipping": 5}, "percentile_clipping=5 is not supported. Use max_grad_norm"),
        ({"block_wise": False}, "block_wise=False is not supported"),
        ({"differentiable": True}, "differentiable=True is not supported"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"^AdamW8bit: .*{message}"):
        optim.AdamW8bit(tensors((3, 3)), **options)


def test_parameters_and_gradients_that_it_cannot_step():
    for dtype in (torch.float64, torch.complex64):
        with pytest.raises(TypeError, match=f"float32, bfloat16 or float16, got {dtype}"):
            optim.AdamW8bit([Parameter(torch.ones(3, dtype=dtype))])
    with pytest.raises(TypeError, match="got torch.int64"):
        optim.AdamW8bit([torch.ones(3, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"must fill their memory.*strides \(4, 2\).*clone"):
        optim.AdamW8bit([Parameter(torch.ones(3, 4)[:, ::2])])
    for options, message in (
        ({"betas": (0.9, 0.999)}, r"needs betas three, in \[0, 1\), got \(0.9, 0.999\)"),
        ({"alpha": -1.0}, "needs alpha >= 0, got -1.0"),
        ({"t_beta3": -1}, "needs t_beta3 >= 0 or None, got -1"),
    ):
        with pytest.raises(ValueError, match=f"^AdEMAMix8bit: {message}"):
            optim.AdEMAMix8bit(tensors((3, 3)), **options)
    with pytest.raises(ValueError, match="nesterov needs momentum > 0"):
        optim.SGD8bit(tensors((3, 3)), nesterov=True)
    with pytest.raises(ValueError, match="centered=True is not supported"):
        optim.RMSprop8bit(tensors((3, 3)), centered=True)

    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = optim.AdamW8bit(embedding.parameters(), foreach=True, fused=True, is_paged=False)
    with pytest.raises(ValueError, match="needs lr >= 0"):
        optimizer.add_param_group({"params": tensors((3, 3)), "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"shape \(10, 4\) is sparse .*sparse=False"):
        optimizer.step()


def test_parameters_that_moved():
    conv = torch.nn.Conv2d(3, 4, 3)
    optimizer = optim.AdamW8bit(conv.parameters())

    def step():
        for p in conv.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    conv.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"strides \(27, 1, 9, 3\), its state on cpu with"):
        step()
    optimizer.load_state_dict(optimizer.state_dict())
    step()
    optimizer = optim.AdamW8bit([p := Parameter(torch.ones(3, 3))])
    p.grad = torch.ones_like(p)
    optimizer.state[p] = {"step": torch.zeros((), dtype=torch.int64, device="meta")}
    with pytest.raises(RuntimeError, match="step of .* is on meta, the parameter on cpu. Load"):
        optimizer.step()
