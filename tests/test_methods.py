import inspect

import pytest
import runs
import steps
import torch
import torch.nn.functional as F
from runs import IMAGES_ONLY
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.augment import GaussianBlur, HorizontalFlip
from fastssl.config import PretrainConfig
from fastssl.data import Batch, ShapesSource, load
from fastssl.dist import SyncBatchNorm
from fastssl.methods import METHODS, LeJEPA, SimCLR, method_class
from fastssl.methods.recipes import RECIPES, resolve
from fastssl.models import build_backbone
from fastssl.optim import LARS, param_groups
from fastssl.train import load_backbone, pretrain
from fastssl.train.backbones import seeded_backbone
from fastssl.train.folder import read_config
from fastssl.train.metrics import read_metrics
from fastssl.train.parallel import Objective


def batch_of(views):
    return Batch(views, torch.arange(len(views[0])), torch.full((len(views[0]),), -1))


def test_simclr_loss_is_the_papers():
    torch.manual_seed(0)
    method = SimCLR(build_backbone("resnet_small", 1, 8), temperature=0.3, out_dim=16).eval()
    x = torch.randn(2, 6, 1, 8, 8)
    loss, scalars = method.loss(batch_of(list(x)))

    z = F.normalize(method.head(method.features(x.flatten(0, 1))), dim=1).double()  # (12, 16)
    similarity = z @ z.T / 0.3
    terms = []
    for i in range(12):
        others = [j for j in range(12) if j != i]
        terms.append(similarity[i, others].logsumexp(0) - similarity[i, (i + 6) % 12])
    torch.testing.assert_close(loss.double(), torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)
    assert 0 < float(scalars["std"]) < 1.2
    loss.backward()
    assert all(p.grad is not None for p in method.parameters())


def test_std_tells_collapse_from_health():
    backbone = torch.nn.Flatten()
    backbone.feature_dim = 64
    method = SimCLR(backbone)
    method.head = torch.nn.Identity()
    spread = torch.randn(2, 512, 1, 8, 8)
    assert float(method.loss(batch_of(list(spread)))[1]["std"]) == pytest.approx(1, abs=0.02)
    equal = torch.ones(2, 512, 1, 8, 8) + 0.01 * spread
    assert float(method.loss(batch_of(list(equal)))[1]["std"]) < 0.05


def test_simclr_views_follow_the_data():
    pytest.importorskip("sklearn")
    method = SimCLR(build_backbone("resnet_small", 1, 8))
    views = method.views(8, load("digits"))
    assert len(views) == 2 and not views[0].get(HorizontalFlip) and not views[0].get(GaussianBlur)
    assert method.views(224, load("digits"))[0].get(GaussianBlur).p == 0.5


def test_lejepa_has_local_views():
    pytest.importorskip("sklearn")
    method = LeJEPA(build_backbone("resnet_small", 1, 8), global_views=1, local_views=2)
    for size, local in ((224, 98), (8, 8)):
        views = method.views(size, load("digits"))
        assert [view.size for view in views] == [size, local, local]
        assert not any(view.get(HorizontalFlip) for view in views)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("data", ["digits", "patches", "shapes:multi", "/some/folder"])
def test_recipes_fill_every_field_and_nothing_else(name, data, tmp_path):
    needed = runs.needed(name, tmp_path)
    parameters = inspect.signature(METHODS[name].__init__).parameters.values()
    lengths = {p.name: p.default // 2 for p in parameters if type(p.default) is int}
    given = needed | dict([*lengths.items()][:1])
    config = resolve(PretrainConfig(method=name, data=data, lr=0.5, method_args=given))
    assert config.lr == 0.5 and given.items() <= config.method_args.items()
    unset = {name for name, value in vars(config).items() if value is None}
    assert unset == {
        "image_size", "init_from", "log_every", "max_side", "recipe", "trackers", "workers"
    }  # fmt: skip
    wanted = {"shapes", "folder"} | ({"digits", "patches"} if name in IMAGES_ONLY else set())
    assert set(RECIPES[name]) >= wanted
    method_class(name)(build_backbone(config.backbone, 3, 32), **config.method_args)


@pytest.mark.parametrize(
    "name, arguments",
    [("simclr", {"out_dim": 8}), ("lejepa", {"hidden_dim": 16, "out_dim": 8, "local_views": 0})],
)
def test_steps(ranks, name, arguments):
    steps.assert_repeats_and_goes_on(name, **arguments)
    steps.assert_ranks_are_one_process(ranks, name, **arguments)


@pytest.mark.parametrize("name", METHODS)
def test_sam_moves_a_methods_state_once(name, tmp_path):
    """Queues, centres and running statistics of a step with SAM are those of one without."""
    pytest.importorskip("sklearn")
    source, own = load("digits"), runs.needed(name, tmp_path, channels=1)
    config = resolve(PretrainConfig(method=name, data="digits", method_args=own))
    states = {}
    for rho in (0.0, 0.05):
        torch.manual_seed(0)
        backbone = build_backbone(config.backbone, source.channels, source.image_size)
        method = METHODS[name](backbone, **config.method_args)
        sizes = [view.size for view in method.views(source.image_size, source)]
        objective, settings = Objective(method), {"steps": 1, "sizes": sizes}
        steps.trained(method, objective, **settings)  # so that queues are not empty
        states[rho] = steps.trained(method, objective, first=1, sam_rho=rho, **settings)
        assert states[rho]["losses"].isfinite().all()
    different = {key for key, x in states[0.0].items() if not torch.equal(x, states[0.05][key])}
    assert different and not different & {*dict(method.named_buffers()), "losses"}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backbone", ["resnet_small", "vit_small"])
def test_batch_norms_can_be_shared_over_ranks(name, backbone, tmp_path):
    if name in steps.NEED_PATCHES and backbone == "resnet_small":
        return
    own = runs.needed(name, tmp_path)
    method = method_class(name)(build_backbone(backbone, 3, 32), **own)
    keys = list(method.state_dict())
    norms = [m for m in method.modules() if isinstance(m, _BatchNorm)]
    converted = SyncBatchNorm.convert_sync_batchnorm(method)
    assert list(converted.state_dict()) == keys
    shared = [m for m in converted.modules() if isinstance(m, _BatchNorm)]
    assert len(shared) == len(norms) and all(type(m) is SyncBatchNorm for m in shared)


def test_unknown_method():
    with pytest.raises(ValueError, match="got 'simclear'. Did you mean 'simclr'"):
        method_class("simclear")


@pytest.mark.parametrize("clip", [False, True])
def test_lars_by_its_formula(clip):
    torch.manual_seed(0)
    w, b = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))
    zero = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = LARS([w, b, zero], lr=0.5, momentum=0.9, weight_decay=0.1, eta=0.02, clip=clip)
    expected = [p.detach().double().clone() for p in (w, b, zero)]
    mu = [torch.zeros_like(p) for p in expected]
    for step in range(3):
        for n, p in enumerate((w, b, zero)):
            scale = 1e-3 if step == 1 else 1.0  # small gradients, so that clip matters
            p.grad = scale * torch.randn(p.shape)
            d, r = p.grad.double(), 1.0
            if p.ndim >= 2:
                d = d + 0.1 * expected[n]
                if expected[n].norm() > 0 and d.norm() > 0:
                    r = 0.02 * expected[n].norm() / d.norm()
                    r = min(r, 1.0) if clip else r
            mu[n] = 0.9 * mu[n] + r * d
            expected[n] = expected[n] - 0.5 * mu[n]
        optimizer.step()
    for got, want in zip((w, b, zero), expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="eta > 0"):
        LARS([w], lr=0.1, eta=0)


def test_param_groups_spare_one_dimensional_parameters():
    model = build_backbone("resnet_small", 3, 32)
    model.conv.weight.requires_grad_(False)
    decay, rest = param_groups(model, 0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decay["params"]) and all(p.ndim < 2 for p in rest["params"])
    count = len(decay["params"]) + len(rest["params"])
    assert count == len(list(model.parameters())) - 1


@pytest.mark.parametrize("name", METHODS)
def test_twenty_steps(name, tmp_path):
    """By the recipe, from captioned and labelled images to an exported backbone."""
    pytest.importorskip("safetensors")
    config = PretrainConfig(
        method=name, data="shapes", out=str(tmp_path / "run"), epochs=1, batch_size=8, workers=0,
        log_every=1, device="cpu", warmup_epochs=0.5, lr_schedule="constant",
        method_args=runs.needed(name, tmp_path),
    )  # fmt: skip
    run = pretrain(config, ShapesSource("shapes", size=160, image_size=32))
    losses = [record["loss"] for record in read_metrics(run.path)]
    assert run.metrics["steps"] == len(losses) == 20 and torch.tensor(losses).isfinite().all()
    backbone, _ = load_backbone(run.path)
    features = backbone(torch.rand(32, 3, 32, 32))
    assert features.isfinite().all() and features.std(dim=0).mean() > 1e-3
    trained, start = backbone.state_dict(), seeded_backbone(read_config(run.path), 3).state_dict()
    assert any(not torch.equal(x, start[key]) for key, x in trained.items() if "running" not in key)
