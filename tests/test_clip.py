import math
import signal

import pytest
import runs
import steps
import torch
import torch.nn.functional as F

from fastssl.config import PretrainConfig
from fastssl.data import Batch, Mixture, ShapesSource, check_captions, draw_captions, load
from fastssl.evaluate import class_weights, evaluate
from fastssl.methods import CLIP
from fastssl.models import build_backbone
from fastssl.optim import param_groups
from fastssl.train import load_checkpoint, pretrain
from fastssl.train.metrics import read_metrics

SMALL = {"out_dim": 8}


# ------------------------------------------------------------------------------------ captions


class Reports(ShapesSource):
    """Three captions an image, of which the second has two sentences."""

    def captions(self, index):
        return [f"first {text}\nsecond. Third.\n\n" for text in super().captions(index)]


def test_one_of_several_captions():
    source, index = Reports("shapes", size=64, image_size=2), torch.arange(64)
    lines = draw_captions(source, index, "line", seed=1, epoch=0)
    assert {text.split()[0] for text in lines} == {"first", "second."}
    sentences = draw_captions(source, index, "sentence", seed=1, epoch=0)
    assert {text.split()[0] for text in sentences} == {"first", "second.", "Third."}
    assert draw_captions(source, index[20:30], "line", seed=1, epoch=0) == lines[20:30]
    for other in ({"seed": 2, "epoch": 0}, {"seed": 1, "epoch": 1}):
        assert draw_captions(source, index, "line", **other) != lines
    # A mixture's number of a second time is of the same text, and may draw another part of it.
    twice = draw_captions(source, index + 64, "line", seed=1, epoch=0)
    assert twice != lines and set(twice) & set(lines)


def test_data_without_captions_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must have captions, which clip reads, got 'shapes'"):
        check_captions(Silent("shapes", size=4, image_size=2), "clip")
    pytest.importorskip("sklearn")
    settings = {"data": "digits", "out": tmp_path / "run", "device": "cpu"}
    with pytest.raises(ValueError, match="got 'digits', which has none. Use a .csv"):
        pretrain(PretrainConfig(method="clip", **settings))
    assert not (tmp_path / "run").exists()


class Silent(ShapesSource):
    def captions(self, index):
        return [""] * len(index)


def test_captions_of_a_list_follow_what_is_shown(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "a.csv").write_text(
        'path,caption,label\n0.png,"a ring, red",1\n1.png,"one\ntwo",0\n2.png\n'
    )
    source = load(tmp_path / "a.csv", image_size=8)
    assert source.captions(torch.tensor([2, 1, 0])) == ["", "one\ntwo", "a ring, red"]
    assert source.labels.tolist() == [1, 0, -1]
    mixture = Mixture([source, ShapesSource("shapes", size=4, image_size=8)])
    assert mixture.captions(torch.tensor([0, 3])) == [
        "a ring, red",
        *mixture.sources[1].captions(torch.tensor([0])),
    ]
    (tmp_path / "b.csv").write_text("0.png,1\n")
    silent = load(tmp_path / "b.csv", image_size=8)
    assert silent.captions is None and Mixture([silent, source]).captions is None

    (tmp_path / "0.png").write_bytes(b"broken")
    source = load(tmp_path / "a.csv", image_size=8)
    with pytest.warns(UserWarning, match="cannot read"):
        assert source[0][1] == 0
    assert source.captions(torch.tensor([0])) == ["one\ntwo"]


# ---------------------------------------------------------------------------------- the method


def of_rows(images, texts, **arguments):
    """The loss of given features; every second caption is the same."""
    method = steps.built("clip", **SMALL, **arguments)
    del method.text  # a module, in whose place there is a function now
    method.backbone, method.text = steps.Rows(images.shape[1]), lambda captions: texts
    method.image_projection = method.text_projection = torch.nn.Identity()
    views, index = [images.view(len(images), 1, 1, -1)], torch.arange(len(images))
    captions = [f"caption {i % 2}" for i in index.tolist()]
    return method.loss(Batch(views, index, index, captions=captions))[0]


def test_closed_form():
    loss = of_rows(2 * torch.eye(4), 5 * torch.eye(4), temperature=0.5)
    assert loss.item() == pytest.approx(math.log(math.e**2 + 3) - 2)


def test_equal_captions_can_be_spared():
    """Of four captions two and two are equal: each row has its own and two negatives."""
    loss = of_rows(torch.eye(4), torch.eye(4), temperature=0.5, spare_equal=True)
    assert loss.item() == pytest.approx(math.log(math.e**2 + 2) - 2)


def test_step_is_the_papers():
    method, other = steps.built("clip", **SMALL), steps.built("clip", **SMALL)
    batch = steps.batch()
    I_e = F.normalize(other.image_projection(other.backbone(batch.views[0])), dim=1)
    T_e = F.normalize(other.text_projection(other.text(batch.captions)), dim=1)
    logits, own = other.log_scale.exp() * I_e @ T_e.T, torch.arange(16)
    want = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    want = steps.with_gradients(other, want)
    loss, scalars = method.loss(batch)
    got = steps.with_gradients(method, loss)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert got.keys() - {"loss"} == {name for name, _ in method.named_parameters()}
    assert 0.1 < scalars["std"] < 1.2 and 0.1 < scalars["text_std"] < 1.2
    assert float(scalars["logit_scale"]) == pytest.approx(1 / 0.07)


def test_the_scale_is_bounded_and_does_not_decay():
    method = steps.built("clip", **SMALL)
    with torch.no_grad():
        method.log_scale.fill_(9.0)
    method.after_step(1, 10)
    assert method.log_scale.exp().item() == pytest.approx(100)
    decay, rest = param_groups(method, 0.1)
    spared = {id(p) for p in rest["params"]}
    assert {id(method.log_scale), id(method.text.network.pos_embed)} <= spared
    assert all(p.ndim >= 2 for p in decay["params"])


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="CLIP: temperature must be positive, got 0"):
        steps.built("clip", temperature=0.0)


def test_steps(ranks):
    steps.assert_repeats_and_goes_on("clip", **SMALL)
    steps.assert_ranks_are_one_process(ranks, "clip", **SMALL)


# ------------------------------------------------------------------------------------ whole runs


def settings(out, **changes):
    values = {"method": "clip", "data": "shapes", "out": out, "device": "cpu", "workers": 0}
    values |= {"image_size": 8, "batch_size": 1024, "epochs": 1, "lr": 1e-3, "log_every": 1}
    return {**values, "monitor": False, "save_every": 1, "method_args": SMALL, **changes}


def test_a_resumed_run_has_the_same_bits(tmp_path, monkeypatch):
    pytest.importorskip("yaml")
    source, real = Reports("shapes", size=48, image_size=8), CLIP.after_step
    few = {"batch_size": 16, "epochs": 2}
    whole = pretrain(PretrainConfig(**settings(tmp_path / "whole", **few)), source)

    def interrupt(self, step, total_steps):
        real(self, step, total_steps)
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(CLIP, "after_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain(PretrainConfig(**settings(tmp_path / "part", **few)), source)
    part = pretrain(PretrainConfig(**settings(tmp_path / "part", resume=True, **few)), source)
    one, two = (load_checkpoint(run.path / "checkpoints" / "last.pt") for run in (whole, part))
    assert all(torch.equal(x, two["model"][name]) for name, x in one["model"].items())
    curves = [[record["loss"] for record in read_metrics(run.path)] for run in (whole, part)]
    assert curves[0] == curves[1] and len(curves[0]) == 6


def test_two_processes_in_shards_follow_the_curve_of_one(tmp_path):
    pytest.importorskip("safetensors")
    curves = []
    for world in (1, 2):
        out = tmp_path / str(world)
        parallel = {"parallel": "fsdp"} if world > 1 else {}
        runs.run(runs.pretrained, settings(str(out), **parallel), world=world)
        curves.append([record["loss"] for record in read_metrics(out)])
    assert curves[1] == pytest.approx(curves[0], abs=1e-3) and len(curves[0]) == 4


def test_zero_shot_of_a_run(tmp_path):
    pytest.importorskip("safetensors")
    run = pretrain(PretrainConfig(**settings(tmp_path / "run"))).path
    test = ShapesSource("shapes", "test", size=64, image_size=8)
    pair = (test, test)
    own = tmp_path / "prompts.txt"
    own.write_text("a red {}\n\none more {} here\n")
    results = evaluate(run, pair, ["zero-shot"], templates=own, image_size=8)["zero-shot"]

    method = CLIP(build_backbone("resnet_small", 3, 8), **SMALL).eval()
    method.load_state_dict(load_checkpoint(run / "checkpoints" / "last.pt")["model"])
    with torch.no_grad():
        found = []
        for name in test.class_names:
            texts = method.encode_text([f"a red {name}", f"one more {name} here"])
            found.append(F.normalize(F.normalize(texts, dim=1).mean(0), dim=0))
        h, y = evaluated(method, test)
        top1 = (F.normalize(h, dim=1) @ torch.stack(found).T).argmax(1) == y
    assert results["top1_percent"]["ensemble"] == 100 * top1.double().mean()
    assert results["protocol"]["templates"] == 2

    chance = evaluate(run, pair, ["zero-shot"], weights="random", image_size=8)["zero-shot"]
    assert chance["protocol"]["templates"] == len(test.templates) == 217
    assert chance["protocol"]["weights_digest"] != results["protocol"]["weights_digest"]
    (run / "checkpoints" / "last.pt").unlink()
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        evaluate(run, pair, ["zero-shot"], image_size=8)
    with pytest.raises(ValueError, match="zero-shot: network must be the folder of a run.*no run"):
        evaluate(method.backbone, pair, ["zero-shot"], image_size=8)


def evaluated(method, source):
    from fastssl.augment import prepare

    images, y = source.batch(torch.arange(len(source)))
    return method.encode_image(prepare(images, 8)), y


def test_class_weights():
    table = {"a big cat": [3.0, 0.0], "the big cat": [0.0, 0.1]}
    table |= {"a ox": [0.0, 2.0], "the ox": [0.0, 9.0]}

    def encode(texts):
        return torch.tensor([table[text] for text in texts])

    W = class_weights(encode, ["big_cat", "ox"], ["a {}", "the {}"])
    torch.testing.assert_close(W, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="got the template 'cat'"):
        class_weights(None, ["cat"], ["cat"])
