import sys

import pytest
import torch

from fastssl.extras import require
from fastssl.models import build_backbone, grid_side, mlp, patch_size, patch_tokens
from fastssl.models.vit import sincos_positions


@pytest.mark.parametrize("name", ["resnet_small", "vit_small"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16), (5, 32), (3, 64)])
def test_backbone_maps_images_to_features(name, channels, size):
    backbone = build_backbone(name, channels, size)
    features = backbone(torch.randn(2, channels, size, size))
    assert features.shape == (2, backbone.feature_dim)
    features.sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert 1e5 < sum(p.numel() for p in backbone.parameters()) < 5e5


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet_smal", "resnet_small"), ("vit-small", "vit_small")]
)
def test_unknown_backbone_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"Did you mean '{nearest}'"):
        build_backbone(name, 3, 32)


def test_sizes_a_backbone_cannot_take():
    with pytest.raises(ValueError, match="at least 8 pixels, got 4"):
        build_backbone("resnet_small", 3, 4)
    with pytest.raises(ValueError, match="multiple of the patch size 3, got 28"):
        build_backbone("vit_small", 3, 28)
    vit = build_backbone("vit_small", 3, 16)
    for height, width in ((16, 32), (15, 15)):
        with pytest.raises(ValueError, match="must be squares of a multiple of 2 pixels"):
            vit(torch.zeros(1, 3, height, width))


def test_transformers_take_crops_of_other_sizes():
    vit = build_backbone("vit_small", 3, 32).eval()
    crop = torch.rand(2, 3, 16, 16)
    assert vit(crop).shape == (2, 96)
    # A crop of half the side has the positions of the whole, every second one between them.
    torch.testing.assert_close(sincos_positions(8, 16, spread=8), sincos_positions(8, 16))
    by_hand = sincos_positions(4, 16, spread=8)[5, 8:12]  # x of the second column: 2.5
    torch.testing.assert_close(by_hand, (2.5 * 10000.0 ** -torch.arange(0, 1, 0.25)).sin())
    pytest.importorskip("timm")
    vit = build_backbone("timm:test_vit", 3, 64).eval()
    assert vit(torch.rand(2, 3, 32, 32)).shape == (2, vit.feature_dim)


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:resnet18"])
def test_other_libraries_keep_their_names(name):
    library, _, model = name.partition(":")
    try:
        require("timm" if library == "timm" else "torchvision.models", "vision")
    except ImportError as error:
        pytest.skip(str(error))
    backbone = build_backbone(name, 3, 32)
    assert backbone.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, backbone.feature_dim)
    assert "conv1.weight" in backbone.state_dict() or "conv1.0.weight" in backbone.state_dict()
    with pytest.raises(ValueError, match="has no .*model"):
        build_backbone(f"{library}:resnet_none", 3, 32)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "fastssl-kernels\[vision\]"'):
        build_backbone("timm:resnet18", 3, 32)


def test_torchvision_beside_a_cpu_torch_is_explained(monkeypatch, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="fails beside a CPU-only torch"):
        build_backbone("torchvision:resnet18", 3, 32)


def test_mlp_layers():
    head = mlp([8, 16, 4], last_norm="bn_noaffine")
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert head[0].bias is None and head[3].bias is None and not head[4].affine
    assert mlp([8, 4])[0].bias is not None
    assert mlp([8, 4], bias=False)[0].bias is None
    assert head(torch.randn(5, 8)).shape == (5, 4)


def test_sincos_positions_by_hand():
    positions = sincos_positions(3, 8)  # two frequencies: 1 and 1/100
    y, x = 2.0, 1.0
    expected = [f(v * w) for v in (y, x) for f in (torch.sin, torch.cos) for w in _frequencies()]
    torch.testing.assert_close(positions[7], torch.stack(expected))


def _frequencies():
    return torch.tensor([1.0, 0.01])


@pytest.mark.parametrize("name", ["vit_small", "timm:vit_tiny_patch16_224"])
def test_patch_tokens_are_those_of_the_forward(name):
    torch.manual_seed(0)
    library = name.partition(":")[0]
    if library == "timm":
        pytest.importorskip("timm")
    backbone = build_backbone(name, 3, 32).eval()
    sides = (32, 64) if library == "timm" else (32, 16)
    for size in sides:
        x = torch.randn(2, 3, size, size)
        cls, patches = patch_tokens(backbone, x)
        L = grid_side(backbone, size) ** 2
        assert patches.shape == (2, L, backbone.feature_dim)
        torch.testing.assert_close(cls, backbone(x))
        order = torch.stack([torch.randperm(L) for _ in range(2)])
        same, moved = patch_tokens(backbone, x, keep=order)
        torch.testing.assert_close(same, cls, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(moved[0], patches[0, order[0]], atol=1e-5, rtol=1e-4)


def test_hidden_patches_say_nothing():
    torch.manual_seed(0)
    backbone = build_backbone("vit_small", 1, 16).eval()
    x = torch.randn(2, 1, 16, 16)
    other = x.clone()
    other[:, :, :2, :2] = 5.0  # the first patch
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[:, 0] = True
    token = torch.randn(96, requires_grad=True)
    hidden = [patch_tokens(backbone, y, mask=mask, mask_token=token) for y in (x, other)]
    torch.testing.assert_close(hidden[0], hidden[1])
    kept = torch.arange(1, 64).expand(2, -1)
    torch.testing.assert_close(
        patch_tokens(backbone, x, keep=kept), patch_tokens(backbone, other, keep=kept)
    )
    assert not torch.equal(backbone(x), backbone(other))
    hidden[0][1][:, 0].sum().backward()
    assert token.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="vision transformer, got ResNetSmall"):
        patch_tokens(build_backbone("resnet_small", 1, 16), x)


def test_blocks_that_want_more_than_tokens_are_refused():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="vision transformer, got Eva"):  # rotary positions
        patch_size(build_backbone("timm:eva02_tiny_patch14_224", 3, 28))


def test_hooks_see_the_class_token():
    backbone, seen = build_backbone("vit_small", 1, 16), []
    backbone.register_forward_hook(lambda module, inputs, output: seen.append(output))
    cls, _ = patch_tokens(backbone, torch.randn(2, 1, 16, 16))
    assert len(seen) == 1 and seen[0] is cls
