import copy
import math

import pytest
import steps
import torch
import torch.nn.functional as F

from fastssl.augment import Solarize
from fastssl.data import load
from fastssl.methods import MoCoV3
from fastssl.methods.blocks import Branch
from fastssl.models import ViTSmall
from fastssl.train.parallel import Objective

SMALL = {"hidden_dim": 16, "out_dim": 8, "momentum": 0.5}


def test_closed_form():
    method = MoCoV3(steps.Rows(2), temperature=0.5, out_dim=2)
    method.predictor = torch.nn.Identity()
    method.ema.model = method.ema.module = Branch(method.backbone, torch.nn.Identity())
    loss, _ = steps.loss_of_rows(method, torch.eye(2), 3 * torch.eye(2))
    # Both directions have ln(e^2 + 1) - 2 nats, times 2 tau = 1.
    assert float(loss) == pytest.approx(2 * (math.log(math.exp(2) + 1) - 2))


def reference(method):
    """The paper's algorithm 1."""
    x0, x1 = steps.batch().views
    q0, q1 = (method.predictor(method.projector(method.backbone(x))) for x in (x0, x1))
    with torch.no_grad():
        k0, k1 = (F.normalize(method.teacher(x), dim=1) for x in (x0, x1))
    ctr = [
        2 * 0.2 * F.cross_entropy(F.normalize(q, dim=1) @ k.T / 0.2, torch.arange(len(q)))
        for q, k in ((q0, k1), (q1, k0))
    ]
    return sum(ctr)


def test_step_is_the_papers():
    method = steps.built("moco_v3", **SMALL)
    steps.disturb_teacher(method)
    other = copy.deepcopy(method)
    want = steps.with_gradients(other, reference(other))
    loss, scalars = method.loss(steps.batch())
    got = steps.with_gradients(method, loss)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert got.keys() - {"loss"} == trained
    assert all(name.startswith(("backbone.", "projector.", "predictor.")) for name in trained)
    assert 0.2 < scalars["std"] < 1.2


def test_heads_have_no_biases():
    method = steps.built("moco_v3", **SMALL)
    layers = [m for m in (*method.projector, *method.predictor) if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 5 and all(layer.bias is None for layer in layers)
    assert method.projector[-1].weight is method.predictor[-1].weight is None


def test_key_encoder_follows_and_stands_at_the_end():
    method = steps.built("moco_v3", **SMALL)
    student, teacher = method.backbone.conv.weight, method.teacher.backbone.conv.weight
    with torch.no_grad():
        student.add_(1.0)
    for step in (5, 10):
        m = 1 - 0.5 * (math.cos(math.pi * step / 10) + 1) / 2
        want = m * teacher + (1 - m) * student
        method.after_step(step, 10)
        torch.testing.assert_close(teacher, want)
    assert m == 1


@pytest.mark.parametrize("frozen", [True, False])
def test_patches_of_a_transformer_stay_as_they_were(frozen):
    method = MoCoV3(ViTSmall(1, 8, depth=1), freeze_patches=frozen, **SMALL)
    before = copy.deepcopy(method.state_dict())
    after = steps.trained(method, Objective(method), steps=2)
    for name in ("patch_embed.weight", "patch_embed.bias"):
        for branch in ("backbone", "ema.module.backbone"):
            assert torch.equal(before[f"{branch}.{name}"], after[f"{branch}.{name}"]) == frozen
    assert not torch.equal(before["backbone.cls"], after["backbone.cls"])


def test_steps(ranks):
    steps.assert_repeats_and_goes_on("moco_v3", **SMALL)
    steps.assert_ranks_are_one_process(ranks, "moco_v3", **SMALL)


def test_views_follow_the_data():
    pytest.importorskip("sklearn")
    method = steps.built("moco_v3", **SMALL)
    assert len(set(method.views(8, load("digits")))) == 1
    first, second = method.views(96, load("digits"))
    assert second.get(Solarize) and not first.get(Solarize)
