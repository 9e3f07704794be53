import copy
import dataclasses
import math

import pytest
import steps
import torch
import torch.nn.functional as F

from fastssl.augment import ColorJitter
from fastssl.config import PretrainConfig
from fastssl.data import TensorSource, load
from fastssl.methods import LOOK
from fastssl.methods.blocks import Branch
from fastssl.train import pretrain

SMALL = {"k": 4, "queue_size": 24, "hidden_dim": 16, "out_dim": 8, "momentum": 0.5}


def of_rows(k, keys, labels, ids):
    """A method whose features are the pixels, with tau = 1 and this queue."""
    method = LOOK(steps.Rows(2), k=k, temperature=1.0, queue_size=len(keys) + 1, out_dim=2)
    method.head = torch.nn.Identity()
    method.ema.model = method.ema.module = Branch(method.backbone, method.head)
    method.queue.enqueue(F.normalize(torch.tensor(keys)), torch.tensor(labels), torch.tensor(ids))
    return method


def loss_of(method, label, index=0):
    batch = steps.batch(count=2)
    views = [torch.tensor([[3.0, 0.0]] * 2).view(2, 1, 1, 2)]
    label, index = torch.tensor([label] * 2), torch.tensor([index] * 2)
    return float(method.loss(dataclasses.replace(batch, views=views, label=label, index=index))[0])


def test_closed_forms():
    # The nearest two of e1 are e1 and e2, of classes 0 and 1; -e1 is the only key of class 2.
    method = of_rows(2, [[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]], [1, 0, 2], [7, 8, 9])
    e = math.e
    assert loss_of(method, 0) == pytest.approx(math.log(e + 1) - 1)
    assert loss_of(method, 1) == pytest.approx(math.log(e + 1))
    assert loss_of(method, 2) == pytest.approx(math.log(e + 1 + 1 / e) + 1)  # it joins them
    # Left out is the image's own key, not the one that looks like it.
    assert loss_of(method, 1, index=8) == pytest.approx(math.log(1 + 1 / e))
    assert loss_of(method, 1, index=7) == 0  # no other key of the class
    assert loss_of(method, 3) == loss_of(method, -1) == 0
    assert loss_of(of_rows(2, [[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]], [5] * 3, [7, 8, 9]), 5) == 0


def test_keys_without_a_label_are_no_neighbours():
    with_gap = of_rows(3, [[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]], [1, -1, 0], [7, 8, 9])
    assert loss_of(with_gap, 0) == pytest.approx(math.log(1 + 1 / math.e) + 1)


def reference(method, batch):
    """One image at a time."""
    q = F.normalize(method.head(method.backbone(batch.views[0])), dim=1)
    queue, losses = method.queue, []
    for z, y, i in zip(q, batch.label, batch.index, strict=True):
        others = [j for j in range(24) if queue.labels[j] >= 0 and queue.ids[j] != i]
        others.sort(key=lambda j: -float(z.detach() @ queue.features[j]))
        near, same = others[:4], [j for j in others if queue.labels[j] == y]
        if not set(near) & set(same):
            near = near + same[:1]
        positive = [j for j in near if j in same]
        if positive:
            e = (queue.features @ z / 0.1).exp()
            losses.append(-(e[positive].sum() / e[near].sum()).log())
    return torch.stack(losses).mean(), len(losses)


def test_step_is_the_papers():
    method, batch = steps.built("look", **SMALL), steps.batch(1)
    batch.label[[2, 5, 11]] = torch.tensor([-1, 9, 3])  # no label; of no key; of one far away
    labels = torch.arange(20) % 3
    labels[:2] = torch.tensor([-1, 3])
    method.queue.enqueue(F.normalize(torch.randn(20, 8), dim=1), labels, torch.arange(20) // 2)
    steps.disturb_teacher(method)
    other, filled = copy.deepcopy(method), method.queue.features.clone()
    want, part = reference(other, batch)
    assert part == 14
    want = steps.with_gradients(other, want)
    loss, scalars = method.loss(batch)
    got = steps.with_gradients(method, loss)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert got.keys() - {"loss"} == {n for n, p in method.named_parameters() if p.requires_grad}
    assert 0.2 < scalars["std"] < 1.2
    with torch.no_grad():
        keys = F.normalize(other.teacher(batch.views[0]), dim=1)
    method.after_step(1, 10)
    rows = torch.arange(20, 36) % 24
    torch.testing.assert_close(method.queue.features[rows], keys)
    assert torch.equal(method.queue.features[12:20], filled[12:20])
    assert torch.equal(method.queue.labels[rows], batch.label)
    assert torch.equal(method.queue.ids[rows], batch.index)


def test_an_empty_queue_is_no_loss():
    method = steps.built("look", **SMALL)
    got = steps.with_gradients(method, method.loss(steps.batch())[0])
    assert len(got) > 1 and not any(x.any() for x in got.values())


def test_steps(ranks):
    steps.assert_repeats_and_goes_on("look", **SMALL)
    steps.assert_ranks_are_one_process(ranks, "look", **SMALL)


def test_views_follow_the_data():
    pytest.importorskip("sklearn")
    method = steps.built("look", **SMALL)
    (view,) = method.views(96, load("digits"))
    assert view.size == 96 and not view.get(ColorJitter)
    assert [view.size for view in method.views(8, load("digits"))] == [8]


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ValueError, match="k must be from 1 to less than queue_size, which is 24, "):
        steps.built("look", **SMALL | {"k": 24})
    images = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    none = TensorSource("bare", images, torch.full((8,), -1), [])
    several = TensorSource("many", images, torch.ones(8, 2, dtype=torch.int64), ["a", "b"])
    for source, has in ((none, "bare, which has none"), (several, "many, which has several an i")):
        with pytest.raises(ValueError, match=f"look needs data with one label an image, got {has}"):
            pretrain(PretrainConfig(method="look", out=tmp_path / "run", device="cpu"), source)
    assert not (tmp_path / "run").exists()
