"""Settings that do not go together are explained before a run begins."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastssl.augment import small
from fastssl.config import PretrainConfig
from fastssl.methods import METHODS, recipes
from fastssl.models import build_backbone
from fastssl.train import combinations, pretrain
from fastssl.train.combinations import check_backbone, check_bf16, check_combinations, check_views

pytest.importorskip("yaml")
pytest.importorskip("sklearn")


def check(world=1, cores=4, saved=None, **changes):
    check_combinations(recipes.resolve(PretrainConfig(**changes)), saved, world, cores)


def test_the_recipes_go_together():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in METHODS:
            for data in recipes.RECIPES[method]:
                check(method=method, data=data)


def test_resume_and_init_from():
    saved = {"init_from": "/runs/a"}
    check(resume=True, init_from="/runs/a", saved=saved)
    for other in (saved, {}):
        with pytest.raises(ValueError, match="init_from '/runs/b' would start a new one"):
            check(resume=True, init_from="/runs/b", saved=other)


def test_batch_and_processes():
    check(batch_size=96, world=3)
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 100. Use 99"):
        check(batch_size=100, world=3)


class Queued(nn.Module):
    def __init__(self, backbone, *, queue_length: int = 1024, queue_warmup: bool = True):
        super().__init__()


def test_queue_shorter_than_the_batch(monkeypatch):
    monkeypatch.setitem(METHODS, "queued", Queued)
    recipe = recipes.RECIPES["simclr"]["digits"] | {"method_args": {}}
    monkeypatch.setitem(recipes.RECIPES, "queued", {"digits": recipe, "folder": recipe})
    check(method="queued")
    check(method="queued", method_args={"queue_length": 0})  # none
    check(method="queued", method_args={"queue_length": 256})
    message = "queue_length must be at least batch_size, got 255 and 256"
    with pytest.raises(ValueError, match=message):
        check(method="queued", method_args={"queue_length": 255})
    with pytest.raises(ValueError, match="got 1024 and 2048"):
        check(method="queued", batch_size=2048)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3, "warmup_epochs": 3.0}, "warmup_epochs is 3 of 3 epochs: the learning rate"),
        ({"optimizer": "lars"}, "lars is made for batches of thousands, batch_size is 256"),
        ({"optimizer": "lars8bit", "batch_size": 511}, "lars8bit is made for batches"),
        ({"workers": 5}, "workers is 5, and there are 4 cores"),
    ],
)
def test_what_works_badly_is_warned_of(changes, message):
    with pytest.warns(UserWarning, match=message):
        check(**changes)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("torchvision:resnet18", 32, "stem leaves 8 and its last map has 1 x 1"),
        ("timm:resnet50", 64, "last map has 2 x 2, .* Use resnet_small"),
        ("timm:convnext_tiny", 32, "made for images of 224"),
        ("timm:resnet50", 65, None),
        ("timm:vit_tiny_patch16_224", 32, None),
        ("resnet_small", 32, None),
        ("vit_small", 32, None),
    ],
)
def test_an_imagenet_stem_for_small_images(name, size, message):
    if message:
        with pytest.warns(UserWarning, match=message):
            check_backbone(name, size)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_backbone(name, size)


@pytest.mark.parametrize(
    ("name", "size", "use"),
    [
        ("timm:vit_tiny_patch16_224", 40, 32),
        ("timm:vit_small_patch14_dinov2", 224 + 5, 224),
        ("torchvision:vit_b_32", 10, 32),
    ],
)
def test_patches_that_do_not_divide_the_image(name, size, use):
    with pytest.raises(ValueError, match=f"multiple of the patches of {name}.* Use {use}, or"):
        check_backbone(name, size)


def test_views_a_transformer_cannot_take():
    backbone = build_backbone("vit_small", 3, 32).train()
    check_views(backbone, "vit_small", [small(32, 3, flip=True), small(16, 3, flip=True)], 3, 32)
    assert backbone.training
    message = (
        "vit_small, built for images of 32 pixels, cannot take .* views of 14: vit_small: images"
    )
    with pytest.raises(ValueError, match=message):
        check_views(
            backbone, "vit_small", [small(32, 3, flip=True), small(14, 3, flip=True)], 3, 32
        )


def test_bf16_on_a_gpu_without(monkeypatch):
    check_bf16(torch.device("cpu"))
    cuda = SimpleNamespace(
        is_bf16_supported=lambda including_emulation: False,
        get_device_name=lambda device: "GTX",
    )
    monkeypatch.setattr(combinations.torch, "cuda", cuda)
    with pytest.raises(ValueError, match="precision bf16 needs a GPU .* got GTX. Use fp32"):
        check_bf16(torch.device("cuda"))


def test_a_run_is_refused_before_anything_is_written(tmp_path):
    settings = {"out": str(tmp_path / "run"), "device": "cpu"}
    with pytest.raises(ValueError, match="multiple of the patches of timm:vit_tiny_patch16_224"):
        pretrain(PretrainConfig(backbone="timm:vit_tiny_patch16_224", **settings))
    with pytest.raises(ValueError, match="cannot take the method's views of 3"):
        arguments = {"local_views": 1, "local_size": 3}
        pretrain(
            PretrainConfig(method="lejepa", backbone="vit_small", method_args=arguments, **settings)
        )
    with pytest.warns(UserWarning, match="warmup_epochs is 1 of 1 epochs"):
        pretrain(PretrainConfig(backbone="vit_small", epochs=1, **settings))
    with pytest.raises(FileExistsError, match="already holds a run"):
        pretrain(PretrainConfig(init_from=settings["out"], **settings))
