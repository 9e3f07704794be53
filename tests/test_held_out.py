"""The checkpoint that classifies images best which were held out of training."""

import dataclasses

import pytest
import torch

from fastssl.augment import prepare
from fastssl.config import PretrainConfig
from fastssl.data import Mixture, TensorSource, epoch_order
from fastssl.evaluate.knn import knn
from fastssl.methods import SimCLR
from fastssl.models import ResNetSmall
from fastssl.train import held_out, load_checkpoint, pretrain
from fastssl.train.ranks import Ranks

pytest.importorskip("yaml")
pytest.importorskip("safetensors")


def source(n=120, classes=4):
    """Pictures whose class shows as a stripe."""
    labels = torch.arange(n) % classes
    images = torch.randint(0, 120, (n, 3, 16, 16), dtype=torch.uint8)
    for number, label in enumerate(labels.tolist()):
        images[number, :, 4 * label : 4 * label + 4] += 100
    return TensorSource("stripes", images, labels, [*"abcd"[:classes]])


def test_split():
    data = source()
    rest, held = held_out.split(data, 0.1, seed=3)
    assert len(held) == 12 and sorted([*rest.samples.tolist(), *held.tolist()]) == [*range(120)]
    assert torch.equal(held_out.split(data, 0.1, seed=3)[1], held)
    assert not torch.equal(held_out.split(data, 0.1, seed=4)[1], held)
    assert held_out.split(data, 0.0, seed=3)[0] is data
    assert len(held_out.split(data, 1e-9, seed=3)[1]) == 1
    orders = [epoch_order(rest, 12, seed=0, epoch=epoch) for epoch in range(2)]
    assert all(sorted(o.flatten().tolist()) == rest.samples.tolist() for o in orders)
    assert not torch.equal(*orders)
    with pytest.raises(ValueError, match=r"hold_out must be in \[0, 1\), got 1.0"):
        held_out.split(data, 1.0, seed=3)
    unlabelled = TensorSource("x", data.images, torch.full((120,), -1), [])
    with pytest.raises(ValueError, match="one label an image.*got x, which lacks"):
        held_out.split(unlabelled, 0.1, seed=3)
    with pytest.raises(ValueError, match="got a mixture"):
        held_out.split(Mixture([data, data]), 0.1, seed=3)


def test_top1_is_that_of_knn_and_the_same_for_any_ranks(monkeypatch):
    torch.manual_seed(0)
    backbone, data = ResNetSmall(3, 16).eval(), source()
    rest, held = held_out.split(data, 0.2, seed=0)
    train = rest.samples
    settings = {"image_size": 16, "batch_size": 16}
    seen = []

    def features(x):
        seen.append(len(x))
        return backbone(x)

    alone = Ranks(0, 1, torch.device("cpu"), False)
    top1 = held_out.top1_percent(features, data, train, held, **settings, ranks=alone)
    with torch.no_grad():
        h = [backbone(prepare(data.images[i], 16)) for i in (train, held)]
    want = knn(h[0], data.labels[train], h[1], data.labels[held], ks=(20,))["top1_percent"]
    assert top1 == pytest.approx(want["knn-20"]) and 30 < top1

    # Seven ranks: each its part, as many forwards as the others.
    parts, counts = [], []

    def gather(self, part):
        parts.append(part)
        counts.append(len(seen))
        return [part] * self.world

    monkeypatch.setattr(Ranks, "gather", gather)
    for rank in range(7):
        seen.clear()
        ranks = Ranks(rank, 7, torch.device("cpu"), False)
        held_out.top1_percent(features, data, train, held, **settings, ranks=ranks)
    assert len(set(counts)) == 1
    torch.testing.assert_close(torch.cat(parts)[:120], torch.cat(h))
    monkeypatch.undo()
    monkeypatch.setattr(held_out, "BANK", 30)  # every fourth of the 96
    seen.clear()
    held_out.top1_percent(features, data, train, held, **settings, ranks=alone)
    assert sum(seen) == 24 + 24


def test_the_best_checkpoint_of_a_run(tmp_path, monkeypatch):
    data = source()
    monkeypatch.setattr("fastssl.train.setup.load", lambda *args: data)
    scores, seen = iter([50.0, 80.0, 70.0]), set()
    real, loss = held_out.top1_percent, SimCLR.loss

    def score(features, *args, **settings):
        assert 0 <= real(features, *args, **settings) <= 100
        return next(scores)

    def watched(self, batch):
        assert self.training
        seen.update(batch.index.tolist())
        return loss(self, batch)

    monkeypatch.setattr(held_out, "top1_percent", score)
    monkeypatch.setattr(SimCLR, "loss", watched)
    config = PretrainConfig(
        data="stripes", out=str(tmp_path / "run"), image_size=16, epochs=3, batch_size=20, lr=1e-3,
        device="cpu", save_every=1, hold_out=0.1, workers=0,
    )  # fmt: skip
    run = pretrain(config)
    assert run.metrics["best_step"] == 10 and run.metrics["best_held_out_top1_percent"] == 80.0
    best, last = (load_checkpoint(run.path / "checkpoints" / f"{x}.pt") for x in ("best", "last"))
    assert (best["step"], best["score"]) == (10, 80.0) and (last["step"], last["score"]) == (
        15,
        70.0,
    )
    assert seen.isdisjoint(held_out.split(data, 0.1, config.seed)[1].tolist())

    # Looking at the images held out changes no weight.
    monkeypatch.setattr(held_out, "top1_percent", lambda *args, **settings: 0.0)
    other = pretrain(dataclasses.replace(config, out=str(tmp_path / "other")))
    again = load_checkpoint(other.path / "checkpoints" / "last.pt")
    for name, x in last["model"].items():
        assert torch.equal(x, again["model"][name]), name
