"""Features of a folder's images, with their names."""

import json

import numpy
import pytest
import torch
from torch import nn

from fastssl.augment import prepare
from fastssl.data import decode
from fastssl.evaluate import embed
from fastssl.evaluate.networks import open_network
from fastssl.models import build_backbone

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path):
    for name in ("b/2.png", "b/10.png", "a.jpg", ".hidden/c.png", "b/notes.txt", "b/.d.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + len(name), 20), (len(name) * 20, 100, 50)).save(path, "png")
    (tmp_path / "images" / "b" / "0.png").write_text("broken")
    return tmp_path / "images"


class Mean(nn.Module):
    def forward(self, x):
        return x.double().mean(dim=(2, 3))


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_rows_are_the_readable_images_by_name(folder, batch_size):
    embedding = embed(Mean(), folder, image_size=8, batch_size=batch_size)
    assert embedding.paths == ["a.jpg", "b/10.png", "b/2.png"]
    assert list(embedding.corrupt) == ["b/0.png"]
    assert "UnidentifiedImageError" in embedding.corrupt["b/0.png"]
    assert embedding.features.dtype == torch.float32
    for row, name in zip(embedding.features, embedding.paths, strict=True):
        x = prepare(decode(folder / name, 24)[None], 8)
        torch.testing.assert_close(row, Mean()(x)[0].float())


def test_a_link_to_a_folder_above_is_not_followed(folder):
    (folder / "b" / "up").symlink_to(folder)
    assert embed(Mean(), folder, image_size=8).paths == ["a.jpg", "b/10.png", "b/2.png"]


def test_files(folder, tmp_path, umask_027):
    safetensors = pytest.importorskip("safetensors")
    embedding = embed(Mean(), folder, tmp_path / "new" / "h.npz", image_size=8)
    written = numpy.load(tmp_path / "new" / "h.npz")  # without pickle
    assert written["paths"].tolist() == embedding.paths
    assert (written["features"] == embedding.features.numpy()).all()
    embed(Mean(), folder, tmp_path / "new" / "h.safetensors", image_size=8)
    for path in (tmp_path / "new").iterdir():
        assert path.stat().st_mode & 0o777 == 0o640, path
    with safetensors.safe_open(tmp_path / "new" / "h.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("features"), embedding.features)
        assert json.loads(file.metadata()["paths"]) == embedding.paths
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["h.npz", "h.safetensors"]


def test_a_file_of_weights_and_its_own_normalisation(folder, tmp_path):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    vit = build_backbone("timm:test_vit", 3, 32).eval()
    torch.save({"module." + name: w for name, w in vit.state_dict().items()}, tmp_path / "w.pth")
    name = str(tmp_path / "w.pth")
    embedding = embed(name, folder, backbone="timm:test_vit", image_size=32)
    inputs = open_network(name, image_size=32, backbone="timm:test_vit").inputs
    x = torch.cat([inputs(decode(folder / path, 96)[None]) for path in embedding.paths])
    with torch.no_grad():
        torch.testing.assert_close(embedding.features, vit(x))


def test_messages(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("")
    for where, kind, message in (
        (tmp_path / "nowhere", FileNotFoundError, "nowhere must be a folder of images"),
        (tmp_path / "empty", FileNotFoundError, "no images in .*empty. Expected files ending"),
        (tmp_path / "bad", FileNotFoundError, "none of the 1 images .* x.png: Unidentified"),
    ):
        with pytest.raises(kind, match=message):
            embed(Mean(), where, image_size=8)
    with pytest.raises(ValueError, match="image_size must be given with a module"):
        embed(Mean(), folder)
    with pytest.raises(
        ValueError, match=r"must return features \(B, D\) = \(3, D\), got \(3, 3, 8"
    ):
        embed(nn.Identity(), folder, image_size=8)
    with pytest.raises(RuntimeError, match="backbone must stay frozen"):
        embed(Moving(), folder, image_size=8)


class Moving(Mean):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)
