import copy
import math

import pytest
import steps
import torch
import torch.nn.functional as F

from fastssl.augment import GaussianBlur
from fastssl.data import load
from fastssl.methods import MoCoV2
from fastssl.methods.blocks import Branch
from fastssl.optim import replay

SMALL = {"queue_size": 40, "out_dim": 8, "temperature": 0.3, "momentum": 0.5}


def test_closed_form():
    method = MoCoV2(steps.Rows(2), temperature=1.0, queue_size=2, out_dim=2)
    method.head = torch.nn.Identity()
    method.ema.model = method.ema.module = Branch(method.backbone, method.head)
    method.queue.features.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    e1 = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    loss, _ = steps.loss_of_rows(method, 5 * e1, 2 * e1)
    assert float(loss) == pytest.approx(math.log(math.e + 1 + 1 / math.e) - 1)


def reference(method, batch):
    """The released algorithm: logits of the positive and of the queue, label 0."""
    q = F.normalize(method.head(method.backbone(batch.views[0])), dim=1)
    with torch.no_grad():
        k = F.normalize(method.teacher(batch.views[1]), dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ method.queue.features.T], 1) / 0.3
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64)), q, k


def test_step_is_the_papers():
    method = steps.built("moco_v2", **SMALL)
    steps.disturb_teacher(method)
    other = copy.deepcopy(method)
    loss, scalars = method.loss(steps.batch())
    want, _, k = reference(other, steps.batch())
    want = steps.with_gradients(other, want)
    got = steps.with_gradients(method, loss)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert got.keys() - {"loss"} == trained and not method.queue.features.requires_grad
    assert all(name.startswith(("backbone.", "head.")) for name in trained)
    assert 0.2 < scalars["std"] < 1.2

    keys, before = method.queue.features.clone(), copy.deepcopy(method.teacher.state_dict())
    method.after_step(1, 10)
    torch.testing.assert_close(method.queue.features[:16], k)
    assert torch.equal(method.queue.features[16:], keys[16:])
    name = "backbone.conv.weight"
    torch.testing.assert_close(
        method.teacher.get_parameter(name),
        0.5 * before[name] + 0.5 * method.backbone.conv.weight.detach(),
    )


def test_loss_is_lightlys():
    lightly = pytest.importorskip("lightly.loss")
    method = steps.built("moco_v2", **SMALL)
    other = copy.deepcopy(method)
    peer = lightly.NTXentLoss(0.3, memory_bank_size=(40, 8))
    peer.memory_bank.bank = other.queue.features.clone()
    peer.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.int64)
    _, q, k = reference(other, steps.batch())
    want = steps.with_gradients(other, peer(q, k))
    got = steps.with_gradients(method, method.loss(steps.batch())[0])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_second_loss_of_a_step_meets_the_same_queue():
    method = steps.built("moco_v2", **SMALL)
    again = replay(method)
    first, _ = method.loss(steps.batch())
    with again:
        assert torch.equal(method.loss(steps.batch())[0], first)
    for _ in range(3):
        method.after_step(1, 10)
    assert int(method.queue.pointer) == 48 % 40 and int(method.queue.filled) == 40


def test_steps(ranks):
    steps.assert_repeats_and_goes_on("moco_v2", **SMALL)
    steps.assert_ranks_are_one_process(ranks, "moco_v2", **SMALL)


def test_views_follow_the_data():
    pytest.importorskip("sklearn")
    method = steps.built("moco_v2", **SMALL)
    assert not method.views(8, load("digits"))[0].get(GaussianBlur)
    assert method.views(96, load("digits"))[1].get(GaussianBlur).p == 0.5
