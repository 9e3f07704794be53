"""A run's backbone as other libraries' files, read there and compared."""

import json
import sys

import pytest
import torch
from torch import nn

from fastssl.config import PretrainConfig
from fastssl.models import build_backbone
from fastssl.train import export, exporting, load_backbone, pretrain
from fastssl.train.weights import fit, read_weights

pytest.importorskip("yaml")
pytest.importorskip("safetensors")


@pytest.fixture
def given(monkeypatch):
    """Exports read this backbone instead of a run's."""

    def give(backbone, name, channels=3, side=32):
        info = {"backbone": name, "channels": channels, "image_size": side, "method": "simclr"}
        monkeypatch.setattr(
            exporting, "load_backbone", lambda run, weights: (backbone.eval(), info)
        )
        for part in backbone.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.running_mean, std=0.1)
                nn.init.uniform_(part.running_var, 0.5, 2)
        return backbone

    return give


def tiny(kind, channels=3):
    """A small network of timm's or torchvision's, and what its name would begin with."""
    library, kind = kind.split()
    models = pytest.importorskip(f"{library}.models")
    if kind == "vit" and library == "timm":
        size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
        network = models.VisionTransformer(in_chans=channels, num_classes=0, **size)
        nn.init.normal_(network.pos_embed)
    elif kind == "vit":
        network = models.VisionTransformer(32, 8, 2, 3, 24, 96)
        network.heads = nn.Identity()
    else:
        block = getattr(models.resnet, {"basic": "BasicBlock"}.get(kind, "Bottleneck"))
        wide = {"wide": {"base_width" if library == "timm" else "width_per_group": 80}}
        wide = wide.get(kind, {})
        if library == "timm":
            wide |= {"in_chans": channels}
        network = models.ResNet(block, [1, 2, 1, 1], **wide)
        network.fc = nn.Identity()
    return network, f"{library}:tiny"


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("timm vit", "torchvision"),
        ("timm vit", "hf"),
        ("timm basic", "torchvision"),
        ("timm bottleneck", "hf"),
        ("timm basic", "hf"),
        ("timm wide", "torchvision"),
        ("torchvision vit", "timm"),
        ("torchvision vit", "hf"),
        ("torchvision bottleneck", "timm"),
        ("torchvision wide", "timm"),
    ],
)
def test_other_libraries_read_it(given, tmp_path, kind, format):
    pytest.importorskip("transformers" if format == "hf" else format)
    network = given(*tiny(kind))
    out = tmp_path / ("folder" if format == "hf" else "file.safetensors")
    result = export("run", format, out)
    assert result["difference"] < 1e-5 and result["tensors"] == len(network.state_dict())
    # And back again, by the names of the library.
    again = given(*tiny(kind))
    path = out / "model.safetensors" if format == "hf" else out
    record = fit(again, read_weights(path), str(path))
    assert record["loaded"] == record["of"] and record["unused"] == []
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(x), network(x))


@pytest.mark.parametrize("backbone", ["timm:test_vit", "timm:test_resnet", "torchvision:resnet18"])
def test_a_library_reads_its_own(given, tmp_path, backbone):
    library = backbone.partition(":")[0]
    pytest.importorskip(library)
    given(build_backbone(backbone, 3, 32), backbone)
    for ending in (".safetensors", ".pth"):
        assert export("run", library, tmp_path / f"file{ending}")["difference"] == 0


def test_channels(given, tmp_path):
    pytest.importorskip("transformers")
    given(*tiny("timm vit", channels=1), channels=1)
    assert export("run", "hf", tmp_path / "hf")["difference"] < 1e-5
    images = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert images["image_mean"] == [0.5]
    with pytest.raises(
        ValueError, match="torchvision's networks take 3 channels, timm:tiny takes 1"
    ):
        export("run", "torchvision", tmp_path / "file.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_a_format_cannot_hold(given, tmp_path):
    given(build_backbone("vit_small", 3, 32), "vit_small")
    for format in ("timm", "torchvision"):
        with pytest.raises(
            ValueError, match=f"{format} has no network like the built-in vit_small"
        ):
            export("run", format, tmp_path / "a.pth")
    timm = pytest.importorskip("timm")
    given(timm.create_model("seresnet18", num_classes=0), "timm:seresnet18")
    with pytest.raises(ValueError, match="is no network of hf: .* got 'layer1.0.se.fc1.weight'"):
        export("run", "hf", tmp_path / "hf")
    given(*tiny("timm wide"))
    with pytest.raises(ValueError, match="no groups and no wider bottlenecks, as timm:tiny has"):
        export("run", "hf", tmp_path / "hf")
    # The same names, another network.
    network, name = tiny("timm basic")
    network.act1 = network.layer1[0].act2 = nn.SiLU()
    given(network, name)
    with pytest.raises(ValueError, match="computes other features .* differ in more than names"):
        export("run", "torchvision", tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


FILES = [("safetensors", "a.safetensors"), ("timm", "a.pth"), ("hf", "a"), ("onnx", "a.onnx")]


@pytest.fixture
def written_as(given):
    """A network that all formats of FILES can hold, where their libraries are installed."""

    def ready(format):
        for package in {"hf": ["transformers"], "onnx": ["onnxscript", "onnxruntime"]}.get(
            format, []
        ):
            pytest.importorskip(package)
        given(build_backbone("timm:test_vit", 3, 32), "timm:test_vit")

    return ready


@pytest.mark.parametrize(("format", "name"), FILES)
def test_files_have_the_mode_of_the_umask(written_as, tmp_path, umask_027, format, name):
    written_as(format)
    export("run", format, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
@pytest.mark.parametrize(("format", "name"), FILES)
def test_what_is_there_stays_if_an_export_fails(
    written_as, tmp_path, monkeypatch, format, name, error
):
    written_as(format)

    def fails(backbone, read_back, x, out):
        assert not out.exists(), "it has its name before it is compared"
        out.write_text("of another process, meanwhile")
        raise error

    monkeypatch.setattr(exporting, "_difference", fails)
    with pytest.raises(type(error)):
        export("run", format, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "of another process, meanwhile"


@pytest.mark.parametrize(
    ("format", "out", "message"),
    [
        ("tim", "a.pth", "format must be a known one, got 'tim'. Did you mean 'timm'"),
        ("timm", "a.onnx", "out must end in .safetensors or .pth for timm, got .*a.onnx"),
        ("onnx", "a.pth", "out must end in .onnx for onnx"),
        ("hf", "a.pth", "out must be a folder, without an ending, for hf"),
    ],
)
def test_wrong_arguments(tmp_path, format, out, message):
    with pytest.raises(ValueError, match=message):
        export(tmp_path, format, tmp_path / out)
    (tmp_path / "there.pth").write_text("")
    with pytest.raises(FileExistsError, match="there.pth exists"):
        export(tmp_path, "timm", tmp_path / "there.pth")


def test_a_library_that_is_missing(given, tmp_path, monkeypatch):
    given(*tiny("torchvision vit"))
    monkeypatch.setattr(exporting, "_installed", lambda format: False)
    for format, out in (("timm", "a.pth"), ("hf", "hf")):
        assert export("run", format, tmp_path / out)["difference"] is None
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"fastssl-kernels\[export\]"):
        export("run", "onnx", tmp_path / "a.onnx")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = {"data": "digits", "backbone": "vit_small", "epochs": 1, "batch_size": 512}
    return pretrain(PretrainConfig(out=str(out), device="cpu", **settings)).path


def test_onnx(run, tmp_path):
    for package in ("onnxscript", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    result = export(run, "onnx", tmp_path / "net.onnx")
    assert 0 <= result["difference"] < 1e-4


def test_a_teacher_is_in_the_checkpoint(run, tmp_path):
    with pytest.raises(ValueError, match="holds no teacher of this backbone"):
        export(run, "safetensors", tmp_path / "a.pth", "teacher")
    path = run / "checkpoints" / "last.pt"
    whole = path.read_bytes()
    state = torch.load(path, weights_only=True)
    student = {k: v for k, v in state["model"].items() if k.startswith("backbone.")}
    state["model"] |= {f"teacher.module.{k}": v + 1 for k, v in student.items()}
    torch.save(state, path)
    export(run, "safetensors", tmp_path / "teacher.pth", "teacher")
    path.write_bytes(whole)
    teacher = torch.load(tmp_path / "teacher.pth", weights_only=True)
    for name, tensor in load_backbone(run)[0].state_dict().items():
        assert torch.equal(teacher[name], tensor + 1)
