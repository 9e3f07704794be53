import copy
import dataclasses
import math

import pytest
import runs
import steps
import torch

from fastssl.augment import ColorJitter, HorizontalFlip
from fastssl.config import PretrainConfig, from_dict, method_arguments, type_name
from fastssl.data import load
from fastssl.models import ResNetSmall, load_classifier, mlp
from fastssl.models.classifier import Classifier, first_layers, packed

ONE = (8,)  # sizes of the views


@pytest.fixture
def own(tmp_path):
    pytest.importorskip("safetensors")
    return runs.needed("distill", tmp_path, channels=1)


def labelled(batch):
    """With labels on some images, none of them on the last rank's."""
    return dataclasses.replace(batch, label=torch.tensor([0, 2, -1, 1] + [-1] * 12)[batch.index])


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_step_is_the_papers(own, alpha):
    method = steps.built("distill", temperature=0.5, alpha=alpha, **own).train()
    batch, other = labelled(steps.batch(sizes=ONE)), copy.deepcopy(method)
    (x,) = batch.views
    s, t = other.classifier(other.backbone(x)), other.teacher.eval()(x)
    want = -alpha * ((t / 0.5).softmax(1) * (s / 0.5).log_softmax(1)).sum(1).mean()
    want -= (1 - alpha) * sum(s[i].log_softmax(0)[batch.label[i]] for i in (0, 1, 3)) / 16
    want = steps.with_gradients(other, want)
    loss, scalars = method.loss(batch)
    got = steps.with_gradients(method, loss)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert got.keys() - {"loss"} == {n for n, _ in method.named_parameters() if "teacher" not in n}
    assert scalars["agreement"] == (s.argmax(1) == t.argmax(1)).float().mean()
    assert scalars["std"] > 0.2


def test_closed_forms(own):
    """A student that says nothing pays ln C for any teacher, one that agrees its entropy."""
    method = steps.built("distill", **own).eval()
    torch.nn.init.zeros_(method.classifier.weight), torch.nn.init.zeros_(method.classifier.bias)
    assert method.loss(steps.batch(sizes=ONE))[0].item() == pytest.approx(math.log(3))
    method.backbone, method.classifier = method.teacher.backbone, method.teacher.head
    p = method.teacher(*steps.batch(sizes=ONE).views).softmax(1)
    loss, scalars = method.loss(steps.batch(sizes=ONE))
    torch.testing.assert_close(loss, -(p * p.log()).sum(1).mean())
    assert scalars["agreement"] == 1


def test_the_teacher_stays_as_it_is_saved(own):
    method = steps.built("distill", **own)
    teacher, known = load_classifier(own["teacher"])
    steps.trained(method, method.loss, steps=2, sizes=ONE)
    assert not method.teacher.training and known["backbone"] == "resnet_small"
    for name, x in teacher.state_dict().items():  # the statistics of BatchNorm too
        assert torch.equal(x, method.teacher.state_dict()[name])


def test_steps(ranks, own):
    steps.assert_repeats_and_goes_on("distill", sizes=ONE, **own)
    steps.assert_ranks_are_one_process(ranks, "distill", sizes=ONE, **own)


def _labelled_gradients(group, own):
    rank = torch.distributed.get_rank()
    method = steps.built("distill", alpha=0.25, **own).eval()  # without shared statistics
    part = slice(rank * 4, rank * 4 + 4)
    loss, _ = method.loss(labelled(steps.batch(part=part, sizes=ONE)))
    return steps.with_gradients(method, loss)


def test_labels_count_alike_on_whatever_rank(ranks, own):
    method = steps.built("distill", alpha=0.25, **own).eval()
    want = steps.with_gradients(method, method.loss(labelled(steps.batch(sizes=ONE)))[0])
    parts = ranks.run(_labelled_gradients, 4, own)
    for name, x in want.items():
        mean = torch.stack([part[name] for part in parts]).mean(0)
        torch.testing.assert_close(mean, x, atol=1e-5, rtol=1e-4, msg=name)
        assert name != "loss" or torch.equal(parts[0][name], parts[3][name])


@pytest.mark.parametrize("norm", ["bn", None])
def test_a_classifier_comes_back_from_its_file(tmp_path, norm):
    neck = first_layers(mlp([16, 12, 12, 8], norm=norm), 1)
    kinds = [type(layer).__name__ for layer in neck]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"][:: 1 if norm else 2]
    assert len(first_layers(mlp([16, 12, 12, 8], norm=norm), 2)) == 2 * len(neck)
    model = Classifier(torch.nn.Flatten(), neck, torch.nn.Linear(12, 5))
    model.backbone = ResNetSmall(1, 8)
    neck[0] = torch.nn.Linear(128, 12, bias=norm is None)
    about = {"channels": "1", "image_size": "8", "data": "digits"}
    path = tmp_path / "a.safetensors"
    path.write_bytes(packed(model.eval(), backbone="resnet_small", **about))
    again, known = load_classifier(path)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again(x), model(x)) and known["data"] == "digits"


def test_what_is_no_teacher_is_refused(tmp_path):
    from safetensors.torch import save

    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"a": torch.zeros(1)}, {"backbone": "vit_small"}))
    with pytest.raises(ValueError, match="must be a file that fine-tuning saved .* 'vit_small'"):
        load_classifier(path)
    path.write_text("no weights")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_classifier(path)
    with pytest.raises(FileNotFoundError, match="no file .*finetune --save FILE"):
        load_classifier(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="teacher must be a file .*, got none.*--save FILE"):
        steps.built("distill")
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        steps.built("distill", alpha=2.0)
    with pytest.raises(ValueError, match="at most the 2 hidden layers .* got 3"):
        first_layers(mlp([4, 4, 4, 4]), 3)


def test_a_teacher_of_other_images_is_refused(tmp_path):
    shapes = load("shapes", "test")
    with pytest.raises(ValueError, match="like those of shapes, with 3 channels.* 1 channels"):
        steps.built("distill", **runs.needed("distill", tmp_path, channels=1)).views(8, shapes)
    other = runs.needed("distill", tmp_path, channels=3)
    assert steps.built("distill", **other).views(8, shapes)
    with pytest.raises(ValueError, match="alpha below 1 of its 8 classes, got .* 3 classes"):
        steps.built("distill", alpha=0.5, **other).views(8, shapes)


def test_the_teacher_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = PretrainConfig(method="distill", method_args={"teacher": "teacher.safetensors"})
    assert config.method_args == {"teacher": str(tmp_path / "teacher.safetensors")}
    assert from_dict(dataclasses.asdict(config)) == config
    assert type_name(method_arguments("distill")["teacher"]) == "a file or none"


def test_the_view_has_the_images_colours(own):
    pytest.importorskip("sklearn")
    (view,) = steps.built("distill", **own).views(8, load("digits"))
    assert view.size == 8 and not view.get(ColorJitter) and not view.get(HorizontalFlip)
