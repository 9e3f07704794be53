"""Lists, shards, tensor files, other libraries' data sets, and the memory of large folders."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import picture, unpack

from fastssl.data import DatasetSource, ShardSource, TensorSource, batches, load
from fastssl.data import listing as listing_module
from fastssl.data import shards as shards_module
from fastssl.data.folder import part_of
from fastssl.data.listing import listing

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TORCH_HOME", str(folder))
    return folder


def pictures(folder, count=4, kind="png"):
    for number in range(count):
        picture(folder / f"{number}.{kind}", (20 + number, 10), colour=20 * number)
    return [f"{number}.{kind}" for number in range(count)]


# ---------------------------------------------------------------------------------------- lists


def listed(path, text):
    path.write_text(text)
    return path


def test_lists(tmp_path):
    a, b, c, d = pictures(tmp_path / "in side")
    text = f"# comment\nin side/{a} 1\nin side/{b}\t0\n\nin side/{c} 1\nin side/{d}\n"
    source = load(listed(tmp_path / "one.txt", text), "train", 8)
    assert source.labels.tolist() == [1, 0, 1, -1] and source.class_names == ("0", "1")
    assert [Path(path).name for path in source.paths] == [a, b, c, d]
    images, labels = source.batch(torch.tensor([2, 0]))
    assert labels.tolist() == [1, 1] and images.sizes.tolist() == [[10, 22], [10, 20]]
    assert load(source.name, "train", 8).paths == source.paths
    with pytest.raises(FileNotFoundError, match="one.txt has no test split: a name with 'train'"):
        load(source.name, "test")

    rows = [f"{tmp_path}/in side/{name}" for name in (a, b, c)]
    listed(tmp_path / "train.csv", f'id,label,path\n1,dog,"{rows[0]}"\n2,cat,{rows[1]}\n')
    with pytest.raises(FileNotFoundError, match="expected test.csv or val.csv beside it"):
        load(tmp_path / "train.csv", "test")
    listed(tmp_path / "val.csv", f"{rows[2]},ant\n")
    train, test = load(tmp_path / "train.csv"), load(tmp_path / "train.csv", "test")
    assert train.class_names == test.class_names == ("ant", "cat", "dog")
    assert train.labels.tolist() == [2, 1] and test.labels.tolist() == [0]
    assert load(listed(tmp_path / "x.tsv", f"{rows[0]}\n")).labels.tolist() == [-1]


@pytest.mark.parametrize(
    ("name", "text", "kind", "message"),
    [
        ("a.txt", "\n", ValueError, "a.txt must name images, one a line, got no line"),
        ("a.txt", "0.png\n9.png\n8.png 3\n", FileNotFoundError,
         r"2 of the 3 files in .*a.txt do not exist: '9.png' \(line 2\), '8.png' \(line 3\)"),
        ("a.txt", "0.png 1\n1.png\n./0.png 2\n", ValueError, "got './0.png' in lines 1 and 3"),
        ("a.txt", "0.png 1\n1.png cat\n", ValueError, "got '1' in line 1 of a.txt and 'cat' in"),
        ("a.txt", "0.png 99999999999\n", ValueError, "class numbers below 1048576, got 99999"),
        ("a.csv", "file,label\n0.png,1\n", ValueError, "column `path`, got the heading file, lab"),
    ],
)  # fmt: skip
def test_wrong_lists(tmp_path, name, text, kind, message):
    pictures(tmp_path, 2)
    with pytest.raises(kind, match=message):
        load(listed(tmp_path / name, text))


# --------------------------------------------------------------------------------------- shards


def encoded(number, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (10 + number, 8), (number, 2 * number, 3)).save(buffer, kind)
    return buffer.getvalue()


def shard(path, members, mode="w"):
    """A tar file of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 0.5  # a fraction makes a header of another kind
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(first, count):
    for n in range(first, first + count):
        yield f"deep/{n:03}.png", encoded(n)
        yield f"deep/{n:03}.cls", str(n % 3).encode()
        yield f"deep/{n:03}.txt", f"number {n}\n".encode()


@pytest.fixture
def shards(tmp_path):
    for k in range(3):
        shard(tmp_path / f"train-{k:02}.tar", samples(4 * k, 4))
    shard(tmp_path / "val-00.tar", samples(20, 2))
    return tmp_path


def test_shards(shards, monkeypatch):
    source = load(f"shards:{shards}/train-{{00..02}}.tar", "train", 8)
    assert len(source) == 12 and source.num_classes == 3
    assert source.labels.tolist() == [n % 3 for n in range(12)]
    images, labels = source.batch(torch.tensor([11, 5]))
    assert labels.tolist() == [2, 2]
    assert [x[:, 0, 0].tolist() for x in unpack(images)] == [[11, 22, 3], [5, 10, 3]]
    assert source.captions(torch.tensor([7])) == ["number 7"]
    assert source.where(5) == f"{shards}/train-01.tar: deep/005.png"

    whole, test = load(f"shards:{shards}"), load(f"shards:{shards}", "test")
    assert torch.equal(whole.labels, source.labels) and test.labels.tolist() == [2, 0]
    assert load(source.name, "test").shards == test.shards == [f"{shards}/val-00.tar"]
    assert load(f"shards:{shards}/train-{{00,02}}.tar").labels.tolist() == [0, 1, 2, 0, 2, 0, 1, 2]
    assert len(load(f"shards:{shards}/train-*.tar")) == 12
    with pytest.raises(FileNotFoundError, match="val-00.tar has no test split"):
        load(shards / "val-00.tar", "test")

    monkeypatch.setattr(shards_module, "_scan", None)  # found out once
    assert torch.equal(load(source.name).labels, source.labels)


def test_shards_in_folders_of_the_splits(tmp_path):
    for part in ("train", "val"):
        for k in range(2):
            shard(tmp_path / part / f"{k}.tar", samples(k, 2))
    assert len(load(f"shards:{tmp_path}")) == len(load(f"shards:{tmp_path}", "test")) == 4
    assert load(f"shards:{tmp_path}", "test").shards[0] == f"{tmp_path}/val/0.tar"
    with pytest.raises(FileNotFoundError, match="tar files are read by the name shards:"):
        load(tmp_path / "val")


def test_shards_whose_names_have_the_split_within(tmp_path):
    for name, n in (("pets-train-00", 3), ("pets-validation-00", 2), ("pets-extra-00", 1)):
        shard(tmp_path / f"{name}.tar", samples(0, n))
    assert len(load(f"shards:{tmp_path}")) == 3
    assert len(load(f"shards:{tmp_path}", "test")) == 2


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train-00.tar", "train"),
        ("trainval/0.tar", "train"),
        ("COCO_train2017.tar", "train"),
        ("default/valid/0000.parquet", "valid"),
        ("train/test_0.tar", "test"),
        ("latest-values.tar", None),
    ],
)
def test_splits_by_name(name, part):
    assert part_of(name) == part


def test_shards_that_change_or_whose_memory_is_broken_are_read_anew(shards, cache):
    path = shards / "train-00.tar"
    assert len(load(path)) == 4
    (entry,) = (cache / "fastssl" / "shards").iterdir()
    for broken in (b"", b"PK\x03\x04", entry.read_bytes()[:-40]):
        entry.write_bytes(broken)
        assert load(path).labels.tolist() == [0, 1, 2, 0]
    shard(path, samples(1, 2))
    assert load(path).labels.tolist() == [1, 2]


def test_a_cache_that_cannot_be_written_is_no_error(shards, cache):
    (cache / "fastssl").write_text("in the way")
    assert len(load(f"shards:{shards}")) == 12


def test_labels_in_json_and_none(tmp_path):
    members = [("a.jpg", encoded(0, "JPEG")), ("a.json", b'{"label": 2}'), ("a.mask.png", b"")]
    members += [("b.PNG", encoded(1)), ("b.json", b"{}"), ("c.webp", encoded(2)), ("._c", b"")]
    source = load(shard(tmp_path / "a.tar", members))
    assert source.labels.tolist() == [2, -1, -1] and len(source.batch(torch.arange(3))[0]) == 3
    assert source.captions(torch.tensor([0])) == [""]


def test_an_unreadable_image_in_a_shard_is_replaced(tmp_path):
    members = [("a.png", b"broken"), ("b.png", encoded(7))]
    source = load(shard(tmp_path / "a.tar", members))
    with pytest.warns(UserWarning, match=r"cannot read .*a.tar: a.png \(UnidentifiedImageError"):
        assert source[0][0].shape == (3, 8, 17)
    assert list(source.corrupt) == [f"{tmp_path}/a.tar: a.png"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.cls", b"1"), ("b", b"")], "holds no image in 2 samples.*KEY.png, ..., got a"),
        ([], "holds no image in 0 samples"),
        ([("a.png", b""), ("b.png", b""), ("a.png", b"")], "holds 'a.png' twice"),
        ([("a.png", b""), ("a.jpg", b"")], "sample 'a' of shard .* one image, got png, jpg"),
        ([("a.png", b""), ("a.cls", b"cat")], "'a.cls' in shard .* class number .* got 'cat'"),
        ([("a.png", b""), ("a.json", b"[1")], r"'a.json' in shard .* mapping .* got '\[1'"),
        ([("a.png", b""), ("a.json", b'{"label": "x"}')], "'a.json' in .* got 'x'"),
    ],
)
def test_wrong_shards(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        load(shard(tmp_path / "a.tar", members))


def test_samples_without_an_image_are_left_out(tmp_path):
    path = shard(tmp_path / "a.tar", [("a.txt", b"x"), ("b.png", encoded(1))])
    with pytest.warns(UserWarning, match="1 samples of .*a.tar have no image .* instance 'a'"):
        assert len(load(path)) == 1


def test_shards_cut_off_or_compressed(shards):
    path = shards / "train-00.tar"
    data = path.read_bytes()
    for count in (len(data) // 2, 5 * 512 + 100, 3 * 512, 200, 0):
        path.write_bytes(data[:count])
        with pytest.raises(ValueError, match="train-00.tar must be a whole tar file, got one that"):
            load(path)
    path.write_bytes(data[: len(data) // 4] + b"\xff" * (len(data) - len(data) // 4))
    with pytest.raises(ValueError, match="cut off or damaged"):
        load(path)
    for mode, tool in (("w:gz", "gunzip"), ("w:bz2", "bunzip2"), ("w:xz", "unxz")):
        packed = shard(shards / "packed" / "a.tar.x", samples(0, 1), mode)
        with pytest.raises(ValueError, match=f"must be uncompressed.*with {tool}"):
            load(f"shards:{packed.parent}")


def test_missing_shards(tmp_path):
    shard(tmp_path / "a-0.tar", samples(0, 1))
    with pytest.raises(FileNotFoundError, match="no shard .*a-1.tar, nor 1 others of .*{0..2}"):
        load(f"shards:{tmp_path}/a-{{0..2}}.tar")
    with pytest.raises(FileNotFoundError, match="no shard .*b-"):
        ShardSource(tmp_path / "b-*.tar")
    with pytest.raises(FileNotFoundError, match="no .tar files in"):
        load(f"shards:{shard(tmp_path / 'x' / 'a.zip', []).parent}")
    with pytest.raises(
        FileNotFoundError, match="no test split: expected tar files with the word train"
    ):
        load(f"shards:{tmp_path}", "test")


# --------------------------------------------------------------------------------- tensor files


def test_tensor_files(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 9, 8, 3), dtype=np.uint8)
    labels = np.arange(6, dtype=np.uint8)[:, None]
    parts = {"train_images": images[:4], "train_labels": labels[:4]}
    np.savez(tmp_path / "a.npz", **parts, test_images=images[4:], test_labels=labels[4:])
    train, test = load(tmp_path / "a.npz"), load(tmp_path / "a.npz", "test")
    assert isinstance(train, TensorSource) and train.labels.tolist() == [0, 1, 2, 3]
    assert test.labels.tolist() == [4, 5] and train.num_classes == test.num_classes == 6
    assert torch.equal(test.images, torch.from_numpy(images[4:]).permute(0, 3, 1, 2))

    grey = torch.rand(5, 7, 7)
    several = torch.tensor([[0, 1]] * 5)
    torch.save({"images": grey, "labels": several, "note": "x"}, tmp_path / "b.pt")
    source = load(tmp_path / "b.pt")
    assert torch.equal(source.images, grey[:, None]) and torch.equal(source.labels, several)
    with pytest.raises(FileNotFoundError, match="must hold test_images or val_images, got images"):
        load(tmp_path / "b.pt", "test")

    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"images": grey}, tmp_path / "c.safetensors")
    assert load(tmp_path / "c.safetensors").labels.tolist() == [-1] * 5
    safetensors.save_file({"pixels": grey}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="must hold train_images or images, got pixels"):
        load(tmp_path / "d.safetensors")


class Evil:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 8, 8))}, "a.npz does not fit. .* got torch.float64"),
        ({"labels": np.zeros(3, np.int64)}, r"a.npz does not fit. .* got torch.int64 \(3,\)"),
        ({"labels": np.array([0.5, 1])}, "a.npz does not fit. .* got torch.float64"),
        (
            {"labels": np.array([0, -3])},
            "a.npz must hold labels from 0 on, .* got -3 to 0 in labels",
        ),
        ({"labels": np.array([[0, 1], [7, 0]])}, "a.npz must hold labels .* got 0 to 7 in labels"),
        ({"labels": np.array([0, 1 << 40])}, "labels in .*a.npz must be class numbers below"),
    ],
)
def test_wrong_tensor_files(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **{"images": np.zeros((2, 8, 8), np.uint8), **arrays})
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.npz")


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([Evil()]))
    torch.save({"images": Evil()}, tmp_path / "b.pt")
    (tmp_path / "c.npz").write_bytes(b"x")
    for name in ("a.npz", "b.pt", "c.npz"):
        with pytest.raises(ValueError, match=f"{name} must hold numbers by name, readable without"):
            load(tmp_path / name)


# ------------------------------------------------------------------------- Python's data sets


class Samples(torch.utils.data.Dataset):
    def __init__(self, samples, length=None, **attributes):
        self.samples, self.length = samples, len(samples) if length is None else length
        vars(self).update(attributes)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if isinstance(self.samples[i], Exception):
            raise self.samples[i]
        return self.samples[i]


def test_every_form_of_a_sample():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(2, 0, 1)
    pillow = Image.fromarray(pixels)
    forms = [pillow, (pillow, 3), (x, torch.tensor(3), "more"), [pixels, np.int64(3)], (x, None)]
    forms += [{"image": pixels, "label": 3}, {"img": pillow}, {"x": x, "y": [0, 1]}, pixels[::-1]]
    source = load(Samples(forms), image_size=8)
    for i in range(8):
        assert torch.equal(source[i][0], x)
    assert torch.equal(source[8][0], x.flip(1))
    assert [source[i][1] for i in range(7)] == [-1, 3, 3, 3, -1, 3, -1]
    assert source[7][1].tolist() == [0, 1]
    assert source.batch(torch.tensor([1, 2]))[1].tolist() == [3, 3]
    assert source.name == "python:Samples" and pillow.size == (5, 6)
    large = Image.new("RGB", (900, 300))
    assert load(Samples([large]), image_size=8)[0][0].shape == (3, 8, 24) and large.width == 900
    grey = DatasetSource(Samples([torch.rand(4, 4)]), "mine", mirror=False)
    assert (grey.channels, grey.name, grey.mirror) == (1, "mine", False)
    with pytest.raises(ValueError, match="'python:Samples' was given in Python"):
        load(source.name)


def test_labels_and_classes_of_torchvision():
    x = torch.zeros(3, 4, 4, dtype=torch.uint8)
    pairs = [(x, 1), (x, 0), (x, 2)]
    source = load(Samples(pairs, targets=[1, 7, 2], classes=["cat", "dog", "ant"]))
    assert source.labels.tolist() == [1, 7, 2] and source.class_names == ("cat", "dog", "ant")
    assert load(Samples(pairs, targets=[1, 7, 2])).num_classes == 8
    changed = Samples(pairs, targets=[1, 7, 2], target_transform=lambda y: y)
    assert load(changed).labels.tolist() == [1, 0, 2]
    for targets in (None, [1, 0], [1, 0, 3], ["a", "b", "c"]):  # those are not of the samples
        source = load(Samples(pairs, targets=targets))
        assert source.labels.tolist() == [1, 0, 2] and source.class_names == ()
    part = torch.utils.data.Subset(Samples(pairs, targets=[1, 7, 2]), [2, 0])
    assert load(part).labels.tolist() == [2, 1]
    several = load([(x, [0, 1]), (x, [1, 1])])
    assert several.labels.tolist() == [[0, 1], [1, 1]] and several.num_classes == 2
    datasets = pytest.importorskip("torchvision.datasets")
    fake = load(datasets.FakeData(3, (3, 8, 8)), image_size=8)
    assert fake[0][0].dtype == torch.uint8 and fake.channels == 3


def test_unreadable_samples_of_a_data_set():
    x = torch.zeros(3, 4, 4, dtype=torch.uint8)
    source = load(Samples([x, OSError("broken file"), x + 1]))
    with pytest.warns(UserWarning, match=r"python:Samples\[1\] \(OSError: broken file\)"):
        assert torch.equal(source[1][0], x + 1)
    assert source.corrupt == {"python:Samples[1]": "OSError: broken file"}
    with pytest.warns(UserWarning, match="cannot read"):
        assert load(Samples([OSError("broken file"), x])).channels == 3
    with pytest.raises(ZeroDivisionError):
        load(Samples([ZeroDivisionError(), x]))


X = torch.zeros(3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("dataset", "kind", "message"),
    [
        (iter([X]), TypeError, r"must have len\(\) and give samples by \[i\], got list_iterator"),
        (Samples([]), ValueError, "must hold samples, got length 0"),
        (Samples([X] * 3, length=5), ValueError, "below its length 5, got IndexError for 4"),
        (Samples([(None, 3)]), ValueError, "must be an image of Pillow.*got NoneType"),
        (Samples([()]), ValueError, "got NoneType"),
        (Samples([X[0, 0]]), ValueError, r"got torch.uint8 \(4,\)"),
        (Samples([X.double()]), ValueError, "must be uint8, or float32 in .*got torch.float64"),
        (Samples([X - 0.5]), ValueError, r"\[0\] must lie in \[0, 1\] without NaN, got -0.5"),
        (Samples([{"pixels": X}]), ValueError, "an image under image, img.*got the keys pixels"),
        (Samples([(X, "cat")]), ValueError, r"label of python:Samples\[0\] must be .* got 'cat'"),
        (Samples([(X, ["a"])]), ValueError, r"vector of 0 and 1, got \['a'\]"),
        (Samples([(X, 0.5)]), ValueError, "whole number or a vector of 0 and 1, got 0.5"),
        (Samples([X, X[:1]]), ValueError, r"\[1\] must have 3 channels .* got 1 of torch.uint8"),
    ],
)
def test_wrong_data_sets(dataset, kind, message):
    with pytest.raises(kind, match=message):
        load(dataset)


def test_a_misfit_within_ends_the_run():
    source = load(Samples([X, X[:1], X]))
    with pytest.raises(ValueError, match=r"Samples\[1\] must have 3 channels"):
        source.batch(torch.arange(3))
    assert not source.corrupt


# --------------------------------------------------------------------------------- Hugging Face


def test_hugging_face(tmp_path):
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    pictures(tmp_path / "files", 4)
    paths = [str(tmp_path / "files" / f"{n}.png") for n in range(4)]
    features = library.Features(
        image=library.Image(),
        label=library.ClassLabel(names=["cat", "dog"]),
        n=library.Value("int64"),
    )
    columns = {"image": paths, "label": [1, 0, None, 1], "n": [0] * 4}
    rows = library.Dataset.from_dict(columns, features)
    parts = library.DatasetDict(train=rows, validation=rows.select([3]))
    parts.save_to_disk(str(tmp_path / "saved"))
    train, test = (load(f"hf:{tmp_path}/saved", split, 8) for split in ("train", "test"))
    assert train.class_names == ("cat", "dog") and train.labels.tolist() == [1, 0, -1, 1]
    assert len(test) == 1 and test.batch(torch.tensor([0]))[0].sizes.tolist() == [[10, 23]]
    assert load(f"hf:{tmp_path}/saved:validation").labels.tolist() == [1]
    assert load(train.name).labels.tolist() == [1, 0, -1, 1] and train.where(2).endswith("saved[2]")
    order = torch.arange(4).repeat(8).view(8, 4)
    for (x, *_), (y, *_) in zip(
        batches(train, order), batches(load(train.name, "train", 8), order, workers=3), strict=True
    ):
        assert torch.equal(x.pixels, y.pixels)
    with pytest.raises(FileNotFoundError, match="must have the split trian. Did you mean 'train'"):
        load(f"hf:{tmp_path}/saved:trian")

    rows.save_to_disk(str(tmp_path / "one"))
    with pytest.raises(FileNotFoundError, match="without splits, so it has no test split"):
        load(f"hf:{tmp_path}/one", "test")
    rows.remove_columns("label").to_parquet(str(tmp_path / "table" / "train-0.parquet"))
    source = load(f"hf:{tmp_path}/table", image_size=8)
    assert source.labels.tolist() == [-1] * 4 and source[1][0].shape == (3, 10, 21)

    for part, n in (("train", 3), ("test", 1)):
        file = tmp_path / "parts" / "default" / part / "0000.parquet"
        file.parent.mkdir(parents=True)
        rows.select(range(n)).to_parquet(str(file))
    assert [len(load(f"hf:{tmp_path}/parts", part)) for part in ("train", "test")] == [3, 1]

    rows.remove_columns("image").save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="one feature of images, got 0 in label, n"):
        load(f"hf:{tmp_path}/none")
    named = rows.remove_columns("label").rename_column("n", "label")
    named.map(lambda row: {"label": "x"}, remove_columns="label").save_to_disk(str(tmp_path / "x"))
    with pytest.raises(ValueError, match="'label' of hf:.* must hold class numbers, got 'x'"):
        load(f"hf:{tmp_path}/x")
    with pytest.raises(FileNotFoundError, match="hf:.*files must be what save_to_disk wrote"):
        load(f"hf:{tmp_path}/files")


def test_without_hugging_face(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"fastssl-kernels\[hf\]"):
        load("hf:cifar10")


def test_unknown_files_and_prefixes(tmp_path):
    listed(tmp_path / "train.csv", "x")
    with pytest.raises(FileNotFoundError, match="no file trian.csv in .*Did you mean 'train.csv'"):
        load(tmp_path / "trian.csv")
    with pytest.raises(FileNotFoundError, match="no file a.npz in .*/none[.]$"):
        load(tmp_path / "none" / "a.npz")
    with pytest.raises(ValueError, match="known prefix, got 'shard:x'. Did you mean 'shards'"):
        load("shard:x")


# ---------------------------------------------------------------------------- folders, remembered


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A folder large enough to be remembered, whose time stamps are old enough to be trusted."""
    monkeypatch.setattr(listing_module, "CACHED_FROM", 10)
    for name in ("a", "b", "b/deep", "b.jpg"):
        for number in range(5):
            path = tmp_path / "data" / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    (tmp_path / "data" / "b" / "deep.png").touch()
    age(tmp_path / "data")
    return tmp_path / "data"


def age(root, by=100):
    for folder, *_ in os.walk(root):
        then = os.stat(folder).st_mtime - by
        os.utime(folder, (then, then))


def scanned(monkeypatch):
    """The folders read from now on."""
    folders, real = [], os.scandir
    monkeypatch.setattr(
        listing_module.os, "scandir", lambda path: (folders.append(Path(path).name), real(path))[1]
    )
    return folders


def test_a_large_folder_is_listed_once(large, monkeypatch, cache):
    first = listing(str(large))
    by_parts = sorted(p for p in large.rglob("*") if p.is_file())
    assert first.below("") == list(map(str, by_parts))
    folders = scanned(monkeypatch)
    assert listing(str(large)) == first and not folders
    (large / "b" / "deep" / "new.png").touch()
    (large / "a" / "0.jpg").unlink()
    again = listing(str(large))
    assert sorted(folders) == ["a", "deep"] and len(again.below("")) == 21
    del folders[:]
    listing(str(large))  # changed a moment ago: not trusted yet
    assert sorted(folders) == ["a", "deep"]
    age(large / "a", 50), age(large / "b" / "deep", 50)
    listing(str(large))
    del folders[:]
    assert listing(str(large)) == listing(str(large)) and not folders
    (large / "b" / "deep").rename(large / "b" / "other")
    assert len(listing(str(large)).below("b/other")) == 6


def test_a_broken_memory_is_not_used(large, cache):
    whole = listing(str(large)).below("")
    (entry,) = (cache / "fastssl" / "listings").iterdir()
    text = entry.read_bytes()
    record = json.loads(text)
    for broken in (
        b"", text[: len(text) // 2], b"[]", b'{"version": 1}',
        json.dumps({**record, "version": 0, "folders": {}}).encode(),
        json.dumps({**record, "root": "/else", "folders": {"": [1, [], []]}}).encode(),
        json.dumps({**record, "folders": {"": 3}}).encode(),
    ):  # fmt: skip
        entry.write_bytes(broken)
        assert listing(str(large)).below("") == whole
    assert json.loads(entry.read_bytes())["folders"] == record["folders"]


def test_a_link_to_a_folder_above_ends(large):
    (large / "b" / "loop").symlink_to(large)
    (large / "c").symlink_to(large / "a")
    found = listing(str(large))
    assert len(found.below("c")) == 5 and len(found.below("b/loop")) == 0


def test_a_small_folder_leaves_no_trace(large, monkeypatch, cache):
    monkeypatch.setattr(listing_module, "CACHED_FROM", 1000)
    assert len(listing(str(large)).below("")) == 21 and not (cache / "fastssl").exists()
