"""What a run's settings do to a step: each against the step written out."""

import copy
import dataclasses
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.config import PretrainConfig
from fastssl.data import Batch
from fastssl.dist import SyncBatchNorm
from fastssl.methods import CLIP, SimCLR
from fastssl.methods.recipes import resolve
from fastssl.models import ResNetSmall, ViTSmall, patch_tokens
from fastssl.optim import SAM
from fastssl.train import setup
from fastssl.train.parallel import Objective
from fastssl.train.update import LASTING, Update

CPU = torch.device("cpu")


def simclr(vit=False):
    torch.manual_seed(0)
    return SimCLR(ViTSmall(1, 8) if vit else ResNetSmall(1, 8, 16), out_dim=8)


def batch(step=0, count=16):
    views = torch.randn(2, count, 1, 8, 8, generator=torch.Generator().manual_seed(step))
    return Batch(list(views), torch.arange(count), torch.full((count,), -1), step, 10)


def made(method, precision="fp32", **settings):
    """The method as a run prepares it, and its update; nothing decays or warms up."""
    settings = {"optimizer": "sgd", "lr": 0.02, "weight_decay": 0.0} | settings
    config = resolve(PretrainConfig(**settings))
    setup.freeze(method, config.freeze)
    setup.train_mode(method, config.freeze)
    setup.encode(method, config.chunk, compiled=config.compile)
    optimizer = setup.build_optimizer(config, method)
    return Update(config, method, optimizer, CPU, precision)


def steps(update, objective, count=3):
    return [update(objective, batch(step)) for step in range(count)]


def assert_same(method, other, **tolerance):
    states = method.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, x in states[0].items():
        torch.testing.assert_close(
            x, states[1][name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# Optimizers of torch and of this package, which clip in two ways.
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lars", "lion8bit"])
def test_clipped_gradients_and_their_norm_before(optimizer):
    one, other = simclr(), simclr()
    scalars = steps(made(one, optimizer=optimizer, max_grad_norm=0.1), Objective(one))
    plain = made(other, optimizer=optimizer).optimizer
    for step, of_step in enumerate(scalars):
        plain.zero_grad()
        other.loss(batch(step))[0].backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        assert norm > 1 and of_step["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
        plain.step()
    assert_same(one, other, atol=1e-5, rtol=1e-4)


def test_parameters_without_a_gradient_stay_and_keep_their_places():
    method = simclr()
    method.backbone.unused = nn.Parameter(torch.ones(3))
    update = made(method, max_grad_norm=0.1, optimizer="sgd")
    names = [name for name, _ in update.trained]
    steps(update, Objective(method), 1)
    assert torch.equal(method.backbone.unused, torch.ones(3))
    method.head[3].bias.register_hook(lambda grad: grad * torch.nan)
    update(Objective(method), batch(1))
    found = update.watch.read()
    assert (found["step"], found["what"], found["parameter"]) == (2, "gradient", "head.3.bias")
    assert found["index"] == list(range(16))
    assert names.index("backbone.unused") < names.index("head.3.bias")


class Dropping(SimCLR):
    """Draws random numbers, and counts its steps in a buffer, as a queue would."""

    def __init__(self):
        super().__init__(ResNetSmall(1, 8, 16), out_dim=8)
        self.register_buffer("pushed", torch.zeros(()))

    def loss(self, batch):
        self.pushed += 1
        z = [self.head(nn.functional.dropout(self.backbone(x), 0.3)) for x in batch.views]
        return self.ntxent(*z), {}


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_aware_step(adaptive):
    torch.manual_seed(0)
    one = Dropping()
    other = copy.deepcopy(one)
    torch.manual_seed(1)
    update = made(one, sam_rho=0.3, sam_adaptive=adaptive)
    losses = [scalars["loss"] for scalars in steps(update, Objective(one))]
    torch.manual_seed(1)
    sam = SAM(torch.optim.SGD(other.parameters(), 0.02, 0.9), other, rho=0.3, adaptive=adaptive)
    for step, loss in enumerate(losses):

        def closure(step=step):
            sam.zero_grad()
            loss = other.loss(batch(step))[0]
            loss.backward()
            return loss

        torch.testing.assert_close(sam.step(closure).detach(), loss)
    assert one.pushed == 3
    assert_same(one, other, atol=1e-6, rtol=1e-5)


def test_chunks_of_the_batch_have_its_gradients():
    one, other = (simclr(vit=True) for _ in range(2))
    keys, seen = list(one.state_dict()), []
    one.backbone.norm.register_forward_hook(lambda m, x, y: seen.append(len(y)))
    steps(made(one, chunk=5), Objective(one), 2)
    steps(made(other), Objective(other), 2)
    assert max(seen) == 5 and list(one.state_dict()) == keys
    assert_same(one, other, atol=1e-5, rtol=1e-4)
    copied = copy.deepcopy(one.backbone)  # as an export does
    with torch.no_grad():
        copied.norm.weight.zero_()
    x = batch().views[0]
    torch.testing.assert_close(one.features(x), other.features(x), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(copied(x), one.features(x), atol=1e-2)
    with torch.no_grad():
        seen.clear(), one.features(x)
    assert seen == [16]


def test_a_text_tower_encodes_in_chunks_too():
    captions = [" ".join(f"word{i * j}" for j in range(1 + i % 5)) for i in range(16)]
    pair, seen = [], []
    for chunk in (5, 0):
        torch.manual_seed(0)
        method = CLIP(ViTSmall(1, 8), out_dim=8)
        method.text.network.norm.register_forward_hook(
            lambda m, x, y, chunk=chunk: seen.append((chunk, len(y)))
        )
        update = made(method, chunk=chunk)
        for step in range(2):
            update(Objective(method), dataclasses.replace(batch(step), captions=captions))
        pair.append(method)
    assert {n for chunk, n in seen if chunk} == {5, 1} and {n for c, n in seen if not c} == {16}
    assert_same(*pair, atol=1e-5, rtol=1e-4)
    seen.clear()
    with torch.no_grad():
        expected = pair[1].encode_text(captions)
        torch.testing.assert_close(pair[0].encode_text(captions), expected, atol=1e-4, rtol=1e-4)
    assert seen == [(0, 16), (5, 16)]  # evaluation meets the tower as it is


class Masked(nn.Module):
    """Reads patch tokens, some of them hidden and some left out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = ViTSmall(1, 8)
        self.mask_token = nn.Parameter(torch.randn(96))

    def loss(self, batch):
        generator = torch.Generator().manual_seed(batch.step)
        x = batch.views[0]
        order = torch.rand(len(x), 16, generator=generator).argsort(1)
        keep, mask = order[:, :9], order % 3 == 0
        hidden = {"mask": mask, "mask_token": self.mask_token}
        cls, patches = patch_tokens(self.backbone, x, keep=keep, **hidden)
        with torch.no_grad():
            target = patch_tokens(self.backbone, x, keep=keep)[1]
        return (patches - target).square().mean() + cls[:, 0].mean(), {}


@pytest.mark.parametrize(
    "settings", [{"chunk": 5}, {"compile": True}, {"chunk": 5, "sam_rho": 0.1}]
)
def test_patch_tokens_are_chunked_and_compiled_too(monkeypatch, settings):
    calls = compiled_without_kernels(monkeypatch)
    one, other, seen = Masked(), Masked(), []
    one.backbone.blocks[0].norm1.register_forward_hook(lambda m, x, y: seen.append(len(y)))
    steps(made(one, **settings), Objective(one), 2)
    steps(made(other, **{**settings, "chunk": 0, "compile": False}), Objective(other), 2)
    chunks = [n for n in seen if n < 16]
    assert len(calls) == (2 if "compile" in settings else 0)  # by features and by tokens
    assert set(chunks) == ({5, 1} if "chunk" in settings else set())
    assert_same(one, other, atol=1e-5, rtol=1e-4)


def test_chunks_say_that_batch_norm_is_not_exact():
    with pytest.warns(UserWarning, match="statistics from 5 images at a time.*vit_small"):
        made(simclr(), chunk=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(simclr(), chunk=5, freeze=["backbone.*"])


def test_frozen_parameters_and_their_batch_norms_stay():
    method = simclr()
    before = copy.deepcopy(method.state_dict())
    update = made(method, freeze=["backbone.conv.*", "backbone.bn.*", "backbone.stages.0.bn1.bias"])
    steps(update, Objective(method))
    moved = {name for name, x in method.state_dict().items() if not torch.equal(x, before[name])}
    stem = {name for name in before if name.startswith(("backbone.conv", "backbone.bn"))}
    assert set(before) - moved == stem | {"backbone.stages.0.bn1.bias"}
    assert not method.backbone.bn.training and method.backbone.stages[0].bn1.training
    optimized = {id(p) for group in update.optimizer.param_groups for p in group["params"]}
    assert id(method.backbone.conv.weight) not in optimized


@pytest.mark.parametrize(
    "patterns, message",
    [
        (["backbone.stage.*"], r"got 'backbone.stage.*', which matches none.*'backbone.stages?"),
        (["head.9.weight"], "matches none.*Did you mean 'head.[034].weight'"),
        (["*"], "must leave something to train"),
    ],
)
def test_patterns_that_freeze_nothing_or_all_are_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        setup.freeze(simclr(), patterns)


def compiled_without_kernels(monkeypatch):
    """torch.compile without the generation of kernels, which takes a minute."""
    real, calls = nn.Module.compile, []

    def light(self, **settings):
        calls.append(self)
        real(self, backend="eager", **settings)

    monkeypatch.setattr(nn.Module, "compile", light)
    return calls


@pytest.mark.parametrize("chunk", [0, 8])
def test_compiled_backbones_take_the_same_steps(monkeypatch, chunk):
    calls = compiled_without_kernels(monkeypatch)
    one, other = (simclr(vit=True) for _ in range(2))
    keys = list(one.state_dict())
    steps(made(one, compile=True, chunk=chunk), Objective(one), 2)
    steps(made(other), Objective(other), 2)
    assert len(calls) == 2 and list(one.state_dict()) == keys  # by features and by tokens
    assert_same(one, other, atol=1e-5, rtol=1e-4)
    assert copy.deepcopy(one.backbone).eval()(batch().views[0]).shape == (16, 96)


def scaled(optimizer, scale, **settings):
    """Steps in fp16, on the CPU, where only tests may."""
    method = simclr()
    update = made(method, "fp16", optimizer=optimizer, **settings)
    update.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return method, update


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.1}, {"sam_rho": 0.1}])
@pytest.mark.parametrize("optimizer", ["sgd", "lamb"])
def test_the_scale_of_the_loss_changes_nothing(optimizer, settings):
    method, update = scaled(optimizer, 2.0**10, **settings)
    update.dtype = None  # without the rounding of fp16
    got, other = steps(update, Objective(method)), simclr()
    want = steps(made(other, optimizer=optimizer, **settings), Objective(other))
    for one, two in zip(got, want, strict=True):
        assert one["loss"].item() == pytest.approx(two["loss"].item(), rel=1e-5)
        assert one["grad_norm"].item() == pytest.approx(two["grad_norm"].item(), rel=1e-5)
    assert_same(method, other, atol=1e-6, rtol=1e-5)


def test_fp16_is_near_fp32():
    method, update = scaled("sgd", 2.0**10)
    dtypes = []
    method.backbone.stages[0].conv1.register_forward_hook(lambda m, x, y: dtypes.append(y.dtype))
    got, other = update(Objective(method), batch()), simclr()
    want = made(other)(Objective(other), batch())
    assert set(dtypes) == {torch.float16} and got["skipped_steps"] == 0
    assert 0 < abs(got["loss"] - want["loss"]) < 1e-2
    assert got["grad_norm"].item() == pytest.approx(want["grad_norm"].item(), rel=2e-2)


@pytest.mark.parametrize("optimizer", ["sgd", "lamb8bit"])
def test_a_gradient_beyond_fp16_skips_the_step_and_halves_the_scale(optimizer):
    method, update = scaled(optimizer, scale=2.0**60)
    scalars = steps(update, Objective(method), 2)
    for p, start in zip(method.parameters(), simclr().parameters(), strict=True):
        assert torch.equal(p, start)
    assert scalars[-1]["skipped_steps"] == 2 and update.scaler.get_scale() == 2.0**58
    assert update.watch.read() is None  # no mishap
    restored = scaled(optimizer, 1.0)[1]
    restored.load_state_dict(update.state_dict())
    assert restored.skipped == 2 and restored.scaler.get_scale() == 2.0**58
    # The first step that is taken is that of one that has skipped none.
    update.scaler.update(2.0**10)
    update(Objective(method), batch())
    other, fresh = scaled(optimizer, 2.0**10)
    fresh(Objective(other), batch())
    for p, want in zip(method.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, want, atol=1e-6, rtol=1e-5)
    assert not torch.equal(method.backbone.conv.weight, simclr().backbone.conv.weight)


def test_gradients_that_no_scale_makes_finite_are_a_mishap():
    method, update = scaled("sgd", scale=2.0**16)
    method.backbone.conv.weight.register_hook(lambda gradient: gradient * torch.inf)
    objective = Objective(method)
    for step in range(LASTING + 1):
        assert update.watch.read() is None
        update(objective, batch(step, count=2))
    found = update.watch.read()
    assert (found["step"], found["what"]) == (LASTING + 1, "gradient")
    assert found["parameter"] == "backbone.conv.weight"


def test_fp16_needs_a_gpu():
    config = PretrainConfig(precision="fp16")
    with pytest.raises(ValueError, match="must be fp32 or bf16 on a CPU, got 'fp16'"):
        setup.precision(config, CPU)
    assert setup.precision(config, torch.device("cuda")) == "fp16"


DISTRIBUTED = [
    {"max_grad_norm": 0.1, "freeze": ["backbone.conv.*", "backbone.bn.*"]},
    {"sam_rho": 0.3, "optimizer": "lars"},
    {"chunk": 3, "max_grad_norm": 0.1, "optimizer": "sgd8bit"},
]


def distributed(group, settings):
    """Weights and norms after three steps of four ranks."""
    method = SyncBatchNorm.convert_sync_batchnorm(simclr("chunk" in settings))
    update, rank, world = made(method, **settings), dist.get_rank(), dist.get_world_size()
    objective = DistributedDataParallel(Objective(method))
    norms = []
    for step in range(3):
        whole = batch(step)
        part = slice(rank * 16 // world, (rank + 1) * 16 // world)
        own = Batch([x[part] for x in whole.views], whole.index[part], whole.label[part], step, 10)
        norms.append(update(objective, own)["grad_norm"].item())
    return method.state_dict(), norms


@pytest.mark.parametrize("settings", DISTRIBUTED, ids=["clip, freeze", "sam", "chunk"])
def test_four_ranks_take_the_steps_of_one_process(ranks, settings):
    one = simclr("chunk" in settings)
    want = [x["grad_norm"].item() for x in steps(made(one, **settings), Objective(one))]
    for state, norms in ranks.run(distributed, 4, settings):
        assert norms == pytest.approx(want, rel=1e-3)
        other = simclr("chunk" in settings)
        other.load_state_dict(state)
        assert_same(one, other, atol=1e-4, rtol=1e-2)
