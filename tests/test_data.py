import warnings

import numpy as np
import pytest
import torch

from fastssl import data
from fastssl.data import batches, epoch_order, load
from fastssl.data import folder as folder_module

Image = pytest.importorskip("PIL.Image")


def picture(path, size=(40, 30), colour=None, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if colour is not None:
        pixels[:] = colour
    Image.fromarray(pixels).save(path)


@pytest.fixture
def classes(tmp_path):
    """Ten pictures in each of two classes; mixed sizes and spellings of the extension."""
    for number in range(10):
        picture(tmp_path / "cats" / f"{number:02}.PNG", (40 + number, 30), seed=number)
        picture(tmp_path / "dogs" / "deep" / f"{number:02}.jpeg", (24, 50), seed=100 + number)
    (tmp_path / "cats" / "notes.txt").write_text("no image")
    picture(tmp_path / "dogs" / "._05.png")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "sizes", "shape", "num_classes"),
    [("digits", (1257, 540), (1, 8, 8), 10), ("patches", (2100, 1050), (3, 32, 32), 21)],
)
def test_builtin_sets(name, sizes, shape, num_classes):
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    for split, size in zip(("train", "test"), sizes, strict=True):
        source, again = load(name, split), load(name, split)
        assert len(source) == size and source.num_classes == len(source.class_names) == num_classes
        image, label, index = source[5]
        assert image.dtype == torch.uint8 and tuple(image.shape) == shape and index == 5
        assert (source.channels, source.image_size) == shape[:2] and source.name == name
        assert set(source.labels.tolist()) == set(range(num_classes))
        assert torch.equal(source.images, again.images) and label == again[5][1]
    train, test = load(name, "train").images, load(name, "test").images
    pictures = {image.numpy().tobytes() for image in train}
    shared = sum(image.numpy().tobytes() in pictures for image in test if image.float().std() > 8)
    assert shared == 0


def test_folder_with_classes(classes):
    train, test = load(str(classes), "train", 16), load(str(classes), "test", 16)
    assert train.class_names == ("cats", "dogs") and len(train) == 16 and len(test) == 4
    assert not set(train.paths) & set(test.paths)
    image, label, index = train[9]
    assert tuple(image.shape) == (3, 24, 24) and (label, index) == (1, 9)
    images, labels = train.batch(torch.tensor([0, 9, 9]))
    assert labels.tolist() == [0, 1, 1] and torch.equal(images[1], image)


def test_folder_with_splits_keeps_labels_aligned(tmp_path):
    for number in range(3):
        for name in ("a", "b", "c"):
            picture(tmp_path / "train" / name / f"{number}.png")
        picture(tmp_path / "val" / "c" / f"{number}.png")
    assert load(tmp_path, "train").labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert load(tmp_path, "test").labels.tolist() == [2, 2, 2]


def test_flat_folder_is_unlabelled(tmp_path):
    for number in range(3):
        picture(tmp_path / f"{number}.png")
    source = load(tmp_path)
    assert source.labels.tolist() == [-1, -1, -1] and source.num_classes == 0
    with pytest.raises(FileNotFoundError, match="without labels"):
        load(tmp_path, "test")


def test_folder_centre_crop_and_sixteen_bits(tmp_path):
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(np.full((20, 20), 40000, dtype=np.uint16)).save(tmp_path / "b.png")
    source = load(tmp_path, "train", 12)
    assert source[0][0][:, :, 2:-2].unique().tolist() == [200]
    assert source[1][0].unique().tolist() == [40000 >> 8]


def test_missing_empty_and_wrong_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="'digit': no such folder"):
        load("digit")
    with pytest.raises(FileNotFoundError, match="no images in .*Expected files ending in .bmp"):
        load(tmp_path)
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="which is a file"):
        load(tmp_path / "file.png")
    with pytest.raises(ValueError, match='"train" or "test", got \'trian\''):
        load("digits", "trian")


@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
def test_corrupt_images_are_replaced_by_the_next(classes, monkeypatch, cache_bytes):
    monkeypatch.setattr(folder_module, "CACHE_BYTES", cache_bytes)
    broken = sorted((classes / "cats").glob("*.PNG"))[2:4]
    broken[0].write_bytes(b"not an image")
    broken[1].write_bytes(broken[1].read_bytes()[:200])
    source = load(classes, "train", 16)
    with pytest.warns(UserWarning, match="cannot read") as caught:
        images, labels = source.batch(torch.arange(len(source)))
    assert len(caught) == 2
    assert source.corrupt == tuple(map(str, broken))
    # The fifth file is the test split's, so the next one is number 4 of the training split.
    assert torch.equal(images[2], images[4]) and torch.equal(images[3], images[4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = load(classes, "train", 16), source.batch(torch.arange(len(source)))
        assert torch.equal(source.batch(torch.tensor([2]))[0][0], images[4])
    with pytest.warns(UserWarning):  # read in another order, the replacement is the same
        assert torch.equal(again.batch(torch.tensor([2]))[0][0], images[4])


def test_nothing_readable(tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.warns(UserWarning), pytest.raises(FileNotFoundError, match="none of the 1 files"):
        load(tmp_path)[0]


def test_order_is_the_same_for_any_number_of_ranks():
    whole = epoch_order(100, 24, seed=1, epoch=2)
    assert whole.shape == (4, 24) and len(whole.unique()) == 96
    for world in (2, 3):
        parts = [epoch_order(100, 24, seed=1, epoch=2, rank=r, world=world) for r in range(world)]
        assert torch.equal(torch.cat(parts, dim=1), whole)
    assert not torch.equal(whole, epoch_order(100, 24, seed=1, epoch=3))
    with pytest.raises(ValueError, match="number of images, 100, got 101"):
        epoch_order(100, 101, seed=0, epoch=0)
    with pytest.raises(ValueError, match="multiple of the 5 processes, got 24"):
        epoch_order(100, 24, seed=0, epoch=0, world=5)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_workers(classes, workers):
    order = epoch_order(16, 5, seed=0, epoch=0)
    plain = list(batches(load(classes, "train", 16), order))
    threaded = list(batches(load(classes, "train", 16), order, workers=workers))
    assert len(plain) == len(threaded) == 3
    for one, other in zip(plain, threaded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_abandoned_loader_stops(classes):
    loader = batches(load(classes, "train", 16), epoch_order(16, 2, seed=0, epoch=0), workers=2)
    next(loader)
    loader.close()


def test_tensor_source_wants_bytes():
    with pytest.raises(TypeError, match="must be uint8"):
        data.TensorSource("x", torch.zeros(2, 3, 4, 4), torch.zeros(2), [])
