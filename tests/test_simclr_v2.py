import copy
import math

import pytest
import steps
import torch
import torch.nn.functional as F

from fastssl.augment import GaussianBlur
from fastssl.data import load
from fastssl.methods import SimCLRv2
from fastssl.methods.blocks import Branch
from fastssl.optim import replay

SMALL = {"hidden_dim": 16, "out_dim": 8, "temperature": 0.3}
MEMORY = {"queue_size": 40, "momentum": 0.5}


@pytest.mark.parametrize("memory, keys", [({}, math.e + 2), ({"queue_size": 1}, math.e + 2.5)])
def test_closed_form(memory, keys):
    """Both views are the unit vectors, whose product with the key in the memory is ln 1/2."""
    method = SimCLRv2(steps.Rows(2), temperature=1.0, out_dim=2, **memory)
    method.head = torch.nn.Identity()
    if memory:
        method.ema.model = method.ema.module = Branch(method.backbone, method.head)
        method.queue.features.fill_(math.log(0.5))
    loss, _ = steps.loss_of_rows(method, torch.eye(2), 3 * torch.eye(2))
    assert float(loss) == pytest.approx(math.log(keys) - 1)


def reference(method, batch):
    """Row by row: of all rows but itself, and of the memory, the other view is the right one."""
    z = torch.cat([F.normalize(method.head(method.backbone(x)), dim=1) for x in batch.views])
    memory = method.queue.features if method.queue else z[:0]
    B, terms = len(batch.index), []
    for i in range(2 * B):
        logits = torch.cat([z[torch.arange(2 * B) != i], memory]) @ z[i] / 0.3
        terms.append(logits.logsumexp(0) - z[i] @ z[(i + B) % (2 * B)] / 0.3)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("memory", [{}, MEMORY], ids=["batch", "memory"])
def test_step_is_the_papers(memory):
    method = steps.built("simclr_v2", **SMALL, **memory)
    kinds = [type(layer).__name__ for layer in method.head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    other = copy.deepcopy(method)
    want = steps.with_gradients(other, reference(other, steps.batch()))
    loss, scalars = method.loss(steps.batch())
    got = steps.with_gradients(method, loss)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert got.keys() - {"loss"} == {n for n, p in method.named_parameters() if p.requires_grad}
    assert 0.2 < scalars["std"] < 1.2


def test_the_memory_takes_the_averages_keys_after_the_step():
    method = steps.built("simclr_v2", **SMALL, **MEMORY)
    steps.disturb_teacher(method)
    before, again = copy.deepcopy(method.teacher), replay(method)
    first = method.loss(steps.batch())[0]
    with again:  # a second loss of the step meets the same memory
        assert torch.equal(method.loss(steps.batch())[0], first)
    with torch.no_grad():
        k = F.normalize(before(steps.batch().views[0]), dim=1)
    name = "backbone.conv.weight"
    old, now = before.get_parameter(name), method.backbone.conv.weight.detach()
    method.after_step(1, 10)
    torch.testing.assert_close(method.queue.features[:16], k)
    torch.testing.assert_close(method.teacher.get_parameter(name), (old + now) / 2)
    assert not method.queue.features.requires_grad
    assert steps.built("simclr_v2", **SMALL).teacher is None


@pytest.mark.parametrize("memory", [{}, MEMORY], ids=["batch", "memory"])
def test_steps(ranks, memory):
    steps.assert_repeats_and_goes_on("simclr_v2", **SMALL, **memory)
    steps.assert_ranks_are_one_process(ranks, "simclr_v2", **SMALL, **memory)


def test_views_follow_the_data():
    pytest.importorskip("sklearn")
    method = steps.built("simclr_v2", **SMALL)
    assert not method.views(8, load("digits"))[0].get(GaussianBlur)
    assert method.views(224, load("digits"))[1].get(GaussianBlur).p == 0.5
