import errno
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastssl.augment import Custom, Packed, augment, byol, pack, simclr
from fastssl.data import TensorSource, batches, decode, epoch_order, load, resident
from fastssl.data import images as images_module
from fastssl.data.loader import Transfer

Image = pytest.importorskip("PIL.Image")


def picture(path, size=(40, 30), colour=None, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if colour is not None:
        pixels[:] = colour
    Image.fromarray(pixels).save(path)


def unpack(images):
    """The images of one `Packed`."""
    pairs = zip(images.offsets.tolist(), images.sizes.tolist(), strict=True)
    C = images.channels
    return [images.pixels[start : start + C * H * W].view(C, H, W) for start, (H, W) in pairs]


def same(one, other):
    """Whether batches are: the same images, labels and numbers."""
    images = [unpack(x[0]) if isinstance(x[0], Packed) else x[0] for x in (one, other)]
    pairs = [*zip(*images, strict=True), *zip(one[1:], other[1:], strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


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
    assert tuple(image.shape) == (3, 48, 23) and (label, index) == (1, 9)  # of 50 x 24: 3 * 16
    images, labels = train.batch(torch.tensor([0, 9, 9]))
    assert labels.tolist() == [0, 1, 1] and torch.equal(unpack(images)[1], image)
    assert images.sizes.tolist() == [[30, 40], [48, 23], [48, 23]]
    assert load(classes, "train", 16, max_side=10)[9][0].shape == (3, 10, 5)
    with pytest.raises(ValueError, match="max_side must be at least 1 pixel, got 0"):
        load(classes, "train", 16, max_side=0)


def test_folder_with_splits_keeps_labels_aligned(tmp_path):
    for number in range(3):
        for name in ("a", "b", "c"):
            picture(tmp_path / "train" / name / f"{number}.png")
        picture(tmp_path / "val" / "c" / f"{number}.png")
    assert load(tmp_path, "train").labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert load(tmp_path, "test").labels.tolist() == [2, 2, 2]


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_names_of_the_folder_to_test_on(tmp_path, name):
    for part, count in (("train", 3), (name, 2)):
        for number in range(count):
            picture(tmp_path / part / "a" / f"{number}.png")
    for part, count in (("train", 3), ("test", 2)):
        source = load(tmp_path, part)
        assert source.class_names == ("a",) and len(source) == count


def test_flat_folder_is_unlabelled(tmp_path):
    for number in range(3):
        picture(tmp_path / f"{number}.png")
    source = load(tmp_path)
    assert source.labels.tolist() == [-1, -1, -1] and source.num_classes == 0
    with pytest.raises(FileNotFoundError, match="without labels"):
        load(tmp_path, "test")


def test_missing_empty_and_wrong_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="'digit': no such folder"):
        load("digit")
    with pytest.raises(FileNotFoundError, match="no images in .*Expected files ending in .avif"):
        load(tmp_path)
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="which is a file"):
        load(tmp_path / "file.png")
    with pytest.raises(ValueError, match='"train" or "test", got \'trian\''):
        load("digits", "trian")


@pytest.mark.parametrize("kept_bytes", [1 << 30, 20000, 0])
def test_corrupt_images_are_replaced_by_the_next(classes, monkeypatch, kept_bytes):
    monkeypatch.setattr(images_module, "KEPT_BYTES", kept_bytes)
    broken = sorted((classes / "cats").glob("*.PNG"))[1:4]
    broken[0].write_bytes(b"")
    broken[1].write_bytes(b"not an image")
    broken[2].write_bytes(broken[2].read_bytes()[:200])
    source, everything = load(classes, "train", 16), torch.arange(16)
    with pytest.warns(UserWarning, match="cannot read") as caught:
        images = unpack(source.batch(everything)[0])
    assert len(caught) == 3
    assert list(source.corrupt) == list(map(str, broken))
    assert "OSError" in source.corrupt[str(broken[2])]
    # The fifth file is the test split's, so the next one is number 4 of the training split.
    assert all(torch.equal(images[i], images[4]) for i in (1, 2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = unpack(source.batch(everything)[0])
    assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))
    source = load(classes, "train", 16)
    with pytest.warns(UserWarning):  # read in another order, the replacement is the same
        assert torch.equal(unpack(source.batch(torch.tensor([2]))[0])[0], images[4])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_machine_fails_at_makes_no_file_corrupt(classes, monkeypatch, workers):
    source, order = load(classes, "train", 16), torch.arange(16).view(2, 8)

    def fails(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(images_module, "decode", fails)
        with pytest.raises(OSError, match="Too many open files: .*PNG"):
            next(batches(source, order, workers=workers))
    assert not source.corrupt
    got, expected = (next(batches(x, order)) for x in (source, load(classes, "train", 16)))
    assert same(got, expected)


def test_a_small_folder_is_read_once(classes, monkeypatch):
    source, reads = load(classes, "train", 16), []
    real = images_module.decode
    monkeypatch.setattr(images_module, "decode", lambda *a: (reads.append(a), real(*a))[1])
    one, other = (source.batch(torch.arange(16)) for _ in range(2))
    assert same(one, other) and len(reads) == 16


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
    assert all(same(one, other) for one, other in zip(plain, threaded, strict=True))


class Stacked:
    """Any source that gives a tensor."""

    def batch(self, index):
        return index.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).byte(), index % 3


def test_threads_for_any_source_and_none_for_a_tensor(monkeypatch):
    order = epoch_order(100, 10, seed=0, epoch=0)
    got = list(batches(Stacked(), order, workers=4, ahead=3))
    assert all(same(a, b) for a, b in zip(got, batches(Stacked(), order), strict=True))
    source = TensorSource("x", *Stacked().batch(torch.arange(100)), ["a", "b", "c"])
    monkeypatch.setattr("fastssl.data.loader.ThreadPoolExecutor", None)
    assert all(same(a, b) for a, b in zip(got, batches(source, order, workers=4), strict=True))


def test_batches_without_threads_or_room():
    for setting in ({"workers": -1}, {"workers": 2, "ahead": 0}, {"ahead": -1}):
        with pytest.raises(
            ValueError, match=r"batches: (workers|ahead) must be at least [01], got"
        ):
            next(batches(Stacked(), torch.zeros(1, 1, dtype=torch.int64), **setting))


def test_an_abandoned_loader_stops(classes):
    loader = batches(load(classes, "train", 16), epoch_order(16, 2, seed=0, epoch=0), workers=2)
    next(loader)
    loader.close()


def test_an_error_while_decoding_arrives(tmp_path):
    picture(tmp_path / "0.png")
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(FileNotFoundError, match="none of the 1 files"):
        next(batches(load(tmp_path), torch.zeros(3, 1, dtype=torch.int64), workers=2))


def test_views_do_not_depend_on_workers_ranks_or_packing(classes):
    """From files to views: threads, ranks, and images of one size packed or stacked."""
    views = [*byol(16), Custom(lambda x: torch.rand(3, 8, 8) + x.float().mean(), 8)]

    def epoch(source, workers=0, world=1):
        orders = [epoch_order(16, 8, seed=0, epoch=1, rank=r, world=world) for r in range(world)]
        loaders = [batches(source, order, workers=workers) for order in orders]
        steps = []
        for parts in zip(*loaders, strict=True):
            parts = [augment(x, index, views, seed=0, epoch=1) for x, _, index in parts]
            steps.append([torch.cat(x) for x in zip(*parts, strict=True)])
        return [x for step in steps for x in step]

    def equal(one, other):
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    whole = epoch(load(classes, "train", 16))
    assert equal(epoch(load(classes, "train", 16), workers=4), whole)
    assert equal(epoch(load(classes, "train", 16), world=2), whole)

    images = torch.stack([load(classes, "train", 16)[i][0][:, :20, :20] for i in range(16)])
    index = torch.arange(16)
    stacked, packed = (augment(x, index, views, seed=0, epoch=0) for x in (images, pack(images)))
    assert equal(stacked, packed)


def test_transfer_on_a_cpu_gives_back_what_it_gets(classes):
    transfer = Transfer("cpu")
    batch = (*load(classes, "train", 16).batch(torch.arange(3)), torch.arange(3))
    assert transfer.finish(transfer.start(batch)) is batch


def test_what_stays_on_the_gpu(classes, monkeypatch):
    source = TensorSource("x", torch.zeros(2, 3, 4, 4), torch.full((2,), -1), [])
    monkeypatch.setattr(TensorSource, "to", lambda self, device: (self, device))
    free = 8 * source.images.nbytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    assert resident(source, "cuda:1") == (source, torch.device("cuda:1"))
    assert resident(source, "cpu") is source
    free -= 8
    folder = load(classes, "train", 16)
    assert resident(source, "cuda:1") is source and resident(folder, "cuda:1") is folder


def test_transfer_waits_for_the_copy_and_keeps_memory_from_its_stream(classes, monkeypatch):
    """The steps a GPU is asked for, without one."""
    transfer, done = Transfer("cpu"), []
    transfer.stream = SimpleNamespace(record_event=lambda: done.append("copied") or "event")
    current = SimpleNamespace(wait_event=lambda event: done.append(f"wait for {event}"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: done.append("pin") or x.clone())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, _: done.append("used by current"))
    batch = (*load(classes, "train", 16).batch(torch.arange(3)), torch.arange(3))
    started = transfer.start(batch)
    assert done == ["pin"] * 5 + ["copied"]
    assert same(transfer.finish(started), batch)
    assert done[6:] == ["wait for event"] + ["used by current"] * 5


def test_transfer_from_one_gpu_to_another(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    there = SimpleNamespace(is_cuda=True, to=lambda device, **_: device)
    assert Transfer("cuda:0")._send(there) == torch.device("cuda:0")


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 3])
def test_batches_on_a_gpu(classes, workers):
    order = epoch_order(16, 5, seed=0, epoch=0)
    folder = load(classes, "train", 16)
    tensor = TensorSource("x", *Stacked().batch(torch.arange(16)), ["a", "b", "c"])
    on_gpu = resident(tensor, "cuda")
    assert on_gpu.images.is_cuda and tensor.images.device.type == "cpu"
    for source in (folder, tensor, on_gpu):
        plain = list(batches(folder if source is folder else tensor, order))
        for images, *others in batches(source, order, workers=workers, device="cuda"):
            assert all(x.is_cuda for x in others)
            torch.cuda._sleep(10_000_000)  # later batches arrive while this one is still wanted
            got = (images.to("cpu"), *(x.cpu() for x in others))
            assert same(got, plain.pop(0))


# ----------------------------------------------------------------------------------- decoding


def saved(path, pixels, mode=None, **options):
    image = Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(path, **options)
    return path


RAMP = np.arange(6 * 4, dtype=np.uint8).reshape(4, 6) * 10


MODES = {
    "png": "1 L LA P RGB RGBA I;16",
    "tif": "1 L LA P RGB RGBA CMYK I;16",
    "gif": "1 L P RGB",
    "bmp": "1 L P RGB",
    "ppm": "1 L RGB I;16",
}


@pytest.mark.parametrize(
    ("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes.split()]
)
def test_modes(tmp_path, kind, mode):
    expected = (RAMP > 127) * np.uint8(255) if mode == "1" else RAMP
    pixels, mode = (expected.astype(np.uint16) * 257, None) if mode == "I;16" else (expected, mode)
    x = decode(saved(tmp_path / f"a.{kind}", pixels, mode), 100)
    assert x.dtype == torch.uint8 and x.is_contiguous()
    assert torch.equal(x, torch.from_numpy(expected).expand(3, -1, -1))


def test_every_suffix_is_read(tmp_path):
    features = pytest.importorskip("PIL.features")
    kinds = sorted(images_module.EXTENSIONS)
    for suffix, needs in ((".avif", "avif"), (".jp2", "jpg_2000"), (".webp", "webp")):
        if not features.check(needs):
            kinds.remove(suffix)
    for kind in kinds:
        saved(tmp_path / f"a{kind}", RAMP > 9 if kind == ".pbm" else np.stack([RAMP] * 3, -1))
    source = load(tmp_path)
    images = unpack(source.batch(torch.arange(len(source)))[0])
    assert [Path(path).suffix for path in source.paths] == kinds and not source.corrupt
    assert all(image.shape == (3, 4, 6) for image in images)


def test_transparency_is_white(tmp_path):
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, 3:, 3] = 255
    pixels[0, 0, 3] = 51
    x = decode(saved(tmp_path / "a.png", pixels), 100)
    assert x[:, 1:, :3].unique().tolist() == [255] and x[:, :, 3:].unique().tolist() == [0]
    assert x[:, 0, 0].tolist() == [204] * 3
    grey = saved(tmp_path / "b.png", RAMP, transparency=50)
    assert decode(grey, 100)[0].flatten()[[4, 5, 6]].tolist() == [40, 255, 60]


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_exif_orientation(tmp_path, kind):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: what is left comes on top
    x = decode(saved(tmp_path / f"a.{kind}", pixels, exif=exif), 100).float()
    assert x.shape == (3, 32, 16) and x[:, :14].min() > 240 and x[:, 18:].max() < 15
    broken = b"Exif\0\0MM\0*" + b"\xff" * 30
    if kind == "jpg":
        assert decode(saved(tmp_path / "b.jpg", pixels, exif=broken), 100).shape == (3, 16, 32)


def test_large_and_thin_images(tmp_path, monkeypatch):
    smooth = np.linspace(0, 255, 1600).astype(np.uint8)[None, :, None].repeat(800, 0).repeat(3, 2)
    path, sizes = saved(tmp_path / "a.jpg", smooth), []
    real = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, *a, **k: (sizes.append(self.size), real(self, *a, **k))[1],
    )
    x = decode(path, 150).float()
    assert x.shape == (3, 75, 150) and sizes[0] == (200, 100)  # JPEG's own eighth
    assert (x[0, 30, 1:] - x[0, 30, :-1] - 1.7).abs().max() < 2
    for size in ((1, 5000), (5000, 1), (1, 1)):
        x = decode(saved(tmp_path / "b.png", np.zeros(size, np.uint8)), 100)
        assert x.shape == (3, min(size[0], 100), min(size[1], 100))
        (view,) = augment(pack([x]), torch.arange(1), [simclr(32)], seed=0, epoch=0)
        assert view.shape == (1, 3, 32, 32) and view.isfinite().all()


def test_pixels_of_unknown_range_are_refused(tmp_path):
    for pixels in (np.full((2, 2), 1 << 20, np.int32), RAMP.astype(np.int32), np.float32(RAMP)):
        with pytest.raises(ValueError, match="32 bits have no known range"):
            decode(saved(tmp_path / "a.tif", pixels), 100)
    x = decode(saved(tmp_path / "a.tif", RAMP.astype(np.int32) * 257), 100)
    assert torch.equal(x[0], torch.from_numpy(RAMP))
    for kind in ("ppm", "png", "tif"):  # 16 bits, dark
        assert not decode(saved(tmp_path / f"b.{kind}", RAMP.astype(np.uint16)), 100).any()


def test_broken_files_never_become_pixels(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for kind in ("jpg", "png", "webp", "tif", "gif"):
        path = saved(tmp_path / f"whole.{kind}", noise)
        data = path.read_bytes()
        path.unlink()
        for number, count in enumerate((0, 1, 10, len(data) // 2)):
            (tmp_path / f"{kind}{number}.{kind}").write_bytes(data[:count])
    picture(tmp_path / "whole.png")
    source = load(tmp_path)
    with pytest.warns(UserWarning, match="cannot read"):
        images = unpack(source.batch(torch.arange(len(source)))[0])
    assert len(images) == 21 and len(source.corrupt) == 20
    assert all(torch.equal(image, images[-1]) for image in images)


# ---------------------------------------------------------------------- tensors and functions


def test_tensor_source_says_what_it_takes():
    labels = torch.zeros(4, dtype=torch.int64)
    images = torch.rand(4, 3, 4, 4)
    for wrong, got in ((images.double(), "torch.float64"), (images[0], ""), (images.numpy(), "nd")):
        with pytest.raises(TypeError, match=f"tensor .N, C, H, W., uint8 or .*, got {got}"):
            TensorSource("x", wrong, labels, [])
    for wrong, got in ((labels[:3], r".*\(3,\)"), (labels.int(), "torch.int32"), (None, "None")):
        with pytest.raises(TypeError, match=rf"labels must be a tensor \(4,\) int64.* got {got}"):
            TensorSource("x", images, wrong, [])
    assert TensorSource("x", images, labels, ["a"]).batch(torch.tensor([2]))[0].equal(images[2:3])
    images[1, 0, 2, 2], images[3, 1, 0, 0] = torch.nan, 1.5
    with pytest.raises(ValueError, match="without NaN, got other values in 2 of 4 samples: 1, 3."):
        TensorSource("x", images, labels, [])


def test_functions_of_torchvision_are_views():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    crop = v2.Compose(
        [v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    )
    images = torch.randint(0, 256, (6, 3, 24, 20), dtype=torch.uint8)
    index, views = torch.arange(6) + 3, [simclr(16), Custom(crop, 16), Custom(crop, 16)]
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    x = augment(images, index, views, seed=5, epoch=2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert x[1].shape == x[2].shape == (6, 3, 16, 16) and not torch.equal(x[1], x[2])
    torch.manual_seed(99)
    for i in range(6):
        alone = augment(images[i : i + 1], index[i : i + 1], views, seed=5, epoch=2)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, x, strict=True))
    for other in ({"seed": 6, "epoch": 2}, {"seed": 5, "epoch": 3}):
        assert not torch.equal(augment(images, index, views, **other)[1], x[1])
    half = augment(images, index, views, seed=5, epoch=2, dtype=torch.float16, channels_last=True)
    assert half[1].dtype == torch.float16 and half[1].equal(x[1].half())
    assert half[1].is_contiguous(memory_format=torch.channels_last)
    clip = images.view(2, 3, 3, 24, 20)  # the frames of a clip are cut alike
    (got,) = augment(clip, index[:2], [Custom(crop, 16)], seed=5, epoch=2)
    (first,) = augment(clip[:, 2], index[:2], [Custom(crop, 16)], seed=5, epoch=2)
    assert torch.equal(got[:, 2], first)


def test_what_is_no_view():
    images, index = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2)
    with pytest.raises(TypeError, match=r"list of View.*as Custom\(function, size\)"):
        augment(images, index, [lambda x: x], seed=0, epoch=0)
    with pytest.raises(TypeError, match="function must be callable, got 3"):
        Custom(3, 8)
    with pytest.raises(ValueError, match="size must be a whole number"):
        Custom(abs, 0)
    for function in (lambda x: x, lambda x: x / 255, lambda x: None):
        with pytest.raises(TypeError, match=r"must return .* \(C, size, size\) = \(3, 4, 4\), got"):
            augment(images, index, [Custom(function, 4)], seed=0, epoch=0)


def test_what_a_custom_view_takes_and_gives():
    images, index = torch.rand(2, 3, 8, 8), torch.arange(2)
    weight = torch.ones(3, 1, 1, requires_grad=True)
    custom = [Custom(lambda x: weight * x, 8)]
    (x,) = augment(images, index, custom, seed=0, epoch=0)
    assert torch.equal(x, images) and not x.requires_grad
    (x,) = augment(images[:0], index[:0], custom, seed=0, epoch=0)
    assert x.shape == (0, 3, 8, 8) and x.dtype == torch.float32
    with pytest.raises(ValueError, match="take no gradient"):
        augment(images.clone().requires_grad_(), index, custom, seed=0, epoch=0)
    with pytest.raises(TypeError, match="dtype must be float32, bfloat16 or float16"):
        augment(images, index, custom, seed=0, epoch=0, dtype=torch.float64)
    with pytest.raises(ValueError, match="params must be None with a Custom"):
        augment(images, index, custom, seed=0, epoch=0, params=torch.zeros(1, 2, 20))
    with pytest.raises(TypeError, match=r"= \(3, 8, 8\), got torch.float32 \(2, 8, 8\)"):
        augment(images, index, [Custom(lambda x: x[:2], 8)], seed=0, epoch=0)
