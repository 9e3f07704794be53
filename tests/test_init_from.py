"""Starting from weights: a run, a checkpoint, other libraries' files."""

import json
import pickle
from types import SimpleNamespace

import pytest
import steps
import torch
from torch import nn

from fastssl.config import PretrainConfig
from fastssl.models import build_backbone
from fastssl.models.keys import names_in
from fastssl.train import load_backbone, load_method, pretrain
from fastssl.train.checkpoint import save_checkpoint, save_sharded
from fastssl.train.ranks import Ranks
from fastssl.train.weights import (
    _channels,
    fit,
    published,
    read_weights,
    split_role,
    start_heads,
    summary,
)

pytest.importorskip("yaml")
pytest.importorskip("sklearn")
save_file = pytest.importorskip("safetensors.torch").save_file


@pytest.fixture
def backbone():
    return build_backbone("resnet_small", 1, 8)


@pytest.fixture
def trained():
    """Other weights of the same network."""
    torch.manual_seed(7)
    return {
        name: torch.rand_like(t) if t.is_floating_point() else t
        for name, t in build_backbone("resnet_small", 1, 8).state_dict().items()
    }


def below(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


def assert_loaded(backbone, weights):
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def config(out, **changes):
    values = {"data": "digits", "out": str(out), "epochs": 1, "batch_size": 512, "device": "cpu"}
    return PretrainConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return pretrain(config(tmp_path_factory.mktemp("runs") / "first", backbone="vit_small")).path


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "backbone.", "model.", "module.encoder_q.", "student.", "trunk._orig_mod."],
)
def test_what_stands_before_the_names_is_found(backbone, trained, prefix):
    weights = below(prefix, trained) | {
        "fc.weight": torch.zeros(10, 4),
        "head.0.bias": torch.ones(3),
    }
    record = fit(backbone, weights, "file")
    assert_loaded(backbone, trained)
    assert record["before_names"] == prefix
    assert record["loaded"] == record["of"] == len(trained) and record["missing"] == []
    assert record["unused"] == (["fc.weight", "head.0.bias"] if not prefix else [])


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("student.module.backbone.", "teacher.backbone."),
        ("model.backbone.", "model.teacher.module."),
        ("module.encoder_q.", "module.encoder_k."),
        ("state_dict.", "state_dict_ema."),
        ("online_network.", "target_network."),
        ("net.backbone.", "net.backbone_momentum."),
    ],
)
@pytest.mark.parametrize("teacher_first", [False, True])
def test_student_and_teacher(backbone, trained, student, teacher, teacher_first):
    other = {name: tensor + 1 for name, tensor in trained.items()}
    pair = [below(student, trained), below(teacher, other)]
    if teacher_first:
        pair.reverse()
    weights = pair[0] | pair[1]
    for role, expected in ((None, trained), ("student", trained), ("teacher", other)):
        fit(backbone, weights, "file", role)
        assert_loaded(backbone, expected)


def test_a_teacher_alone_is_taken_and_a_missing_one_refused(backbone, trained):
    fit(backbone, below("teacher.", trained), "file")
    assert_loaded(backbone, trained)
    with pytest.raises(ValueError, match="file holds no teacher of this backbone"):
        fit(backbone, trained, "file", "teacher")
    with pytest.raises(ValueError, match="file holds no student"):
        fit(backbone, below("teacher.", trained), "file", "student")


def test_few_matches_are_refused_with_both_styles(backbone, trained):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    half = dict(list(trained.items())[: len(trained) // 2 - 1])
    strange = {"encoder.0.w": torch.zeros(2), "encoder.1.w": torch.zeros(2)}
    for weights, share in ((half, r"\d\d%"), (strange, "0%")):
        with pytest.raises(
            ValueError, match=f"{share} of the backbone's tensors, too few"
        ) as caught:
            fit(backbone, weights, "file")
        assert next(iter(weights)) in str(caught.value) and "conv.weight, bn.weight" in str(
            caught.value
        )
    assert_loaded(backbone, before)


def test_other_shapes_are_refused_by_name(backbone, trained):
    trained["bn.weight"] = torch.ones(3)
    with pytest.raises(
        ValueError, match=r"file has 1 tensors of another shape: bn.weight is \(3,\)"
    ):
        fit(backbone, trained, "file")


def test_weights_that_are_not_finite_are_refused_by_name(backbone, trained):
    trained["bn.bias"] = torch.full_like(trained["bn.bias"], torch.nan)
    with pytest.raises(ValueError, match="holds NaN or infinity in 'model.bn.bias'"):
        fit(backbone, below("model.", trained), "file")


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 3), (1, 3), (3, 6)])
def test_first_filters_answer_alike_to_a_grey_image(old, new):
    source, target = build_backbone("resnet_small", old, 8), build_backbone("resnet_small", new, 8)
    record = fit(target, source.state_dict(), "file")
    assert record["resized"] == ([] if old == new else ["conv.weight"])
    grey = torch.rand(2, 1, 8, 8)
    one = source.eval()(grey.expand(-1, old, -1, -1))
    torch.testing.assert_close(target.eval()(grey.expand(-1, new, -1, -1)), one)


def test_first_filters_as_timm_does():
    manipulate = pytest.importorskip("timm.models._manipulate")
    filters = torch.rand(5, 3, 2, 2)
    for channels in (1, 2, 4, 6):
        expected = manipulate.adapt_input_conv(channels, filters)
        torch.testing.assert_close(_channels(filters, channels), expected)


def test_positions_of_another_grid_as_timm_does():
    timm = pytest.importorskip("timm")
    from timm.layers import resample_abs_pos_embed

    make = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 0}
    vit = timm.models.VisionTransformer
    source, target = vit(img_size=32, **make), vit(img_size=48, **make)
    nn.init.normal_(source.pos_embed)
    record = fit(target, source.state_dict() | {"head.weight": torch.zeros(5, 24)}, "file")
    assert record["resized"] == ["pos_embed"] and record["unused"] == ["head.weight"]
    assert "resized: pos_embed\n  unused: head.weight" in summary(record)
    expected = resample_abs_pos_embed(source.pos_embed, (6, 6))
    torch.testing.assert_close(target.pos_embed.data, expected.data)
    with pytest.raises(ValueError, match="of another shape: pos_embed"):
        fit(target, source.state_dict() | {"pos_embed": torch.zeros(1, 12, 24)}, "file")


@pytest.mark.parametrize("library", ["timm", "torchvision", "hf"])
def test_names_of_other_libraries(library):
    timm = pytest.importorskip("timm")
    make = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
    one, other = (timm.models.VisionTransformer(num_classes=0, **make) for _ in range(2))
    theirs = {}
    for name, parts in names_in(library, one.state_dict()).items():
        theirs |= zip(parts, one.state_dict()[name].chunk(len(parts)), strict=True)
    assert len(theirs) == len(one.state_dict()) + (8 if library == "hf" else 0)
    record = fit(other, below("vit.", theirs), "file")
    assert record["names"] == ("own" if library == "timm" else library)
    assert_loaded(other, one.state_dict())


def test_a_run_starts_from_another(run, tmp_path, capsys):
    second = config(tmp_path / "a", init_from=str(run), lr=0.0, weight_decay=0.0)
    path = pretrain(second).path
    assert_loaded(load_backbone(path)[0], load_backbone(run)[0].state_dict())  # lr 0, no BatchNorm
    record = json.loads((path / "init.json").read_text())
    assert record["init_from"] == str(run) and record["loaded"] == record["of"]
    assert f"tensors from {run}" in capsys.readouterr().out
    # The backbone is that of the run, unless another is asked for, which does not fit.
    with pytest.raises(ValueError, match="too few to start from"):
        pretrain(config(tmp_path / "b", init_from=str(run), backbone="resnet_small"))
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_of_ours_and_a_bare_state_dict(run, tmp_path):
    expected = load_backbone(run)[0].state_dict()
    torch.save(below("module.", expected), tmp_path / "weights.pth")
    for path in (run / "checkpoints" / "last.pt", tmp_path / "weights.pth"):
        backbone = build_backbone("vit_small", 1, 8)
        fit(backbone, read_weights(path), "file")
        assert_loaded(backbone, expected)


def test_folders_of_weights(trained, tmp_path):
    (tmp_path / "hub").mkdir()
    save_file(trained, tmp_path / "hub" / "model.safetensors")
    state = {"model": below("backbone.", trained), "step": 3}
    save_sharded(tmp_path / "step_3", state, Ranks(0, 1, torch.device("cpu"), False))
    for folder in ("hub", "step_3"):
        backbone = build_backbone("resnet_small", 1, 8)
        fit(backbone, read_weights(tmp_path / folder), folder)
        assert_loaded(backbone, trained)


@pytest.fixture
def byol(tmp_path):
    """The last checkpoint of a run, its student and its teacher unlike any other's."""
    method = steps.built("byol", hidden_dim=12, out_dim=6)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(torch.rand_like(p))
    save_checkpoint(tmp_path / "checkpoints" / "last.pt", {"model": method.state_dict()})
    return method


def test_heads_start_where_they_fit(byol, tmp_path):
    with_heads = PretrainConfig(init_from=f"{tmp_path}:teacher", init_heads=True)
    for out_dim, left in ((6, ()), (5, ("projector.3", "predictor.0", "predictor.3"))):
        method, record = steps.built("byol", hidden_dim=12, out_dim=out_dim), {}
        start_heads(with_heads, method, record)
        for name, p in method.named_parameters():
            loaded = "backbone" not in name and not any(part in name for part in left)
            assert (name in record["heads"]) == loaded
            assert not loaded or torch.equal(p, byol.get_parameter(name))
        assert "ema.module.projector.0.weight" in record["heads"]


def test_heads_that_are_not_there(byol, tmp_path):
    for name, init_from, message in (
        ("byol", None, "init_from must be the folder of a run .* got None"),
        ("byol", "timm", "init_from must be the folder of a run .* got 'timm'"),
        ("simclr", str(tmp_path), "must have heads of this method's, which are head.0.weight"),
    ):
        with pytest.raises(ValueError, match=f"init_heads: .*{message}"):
            start_heads(PretrainConfig(init_from=init_from, init_heads=True), steps.built(name), {})


def test_a_run_starts_from_the_heads_of_another(run, tmp_path):
    settings = {"init_from": str(run), "lr": 1e-12, "weight_decay": 0.0}
    for init_heads in (True, None):
        path = pretrain(config(tmp_path / f"{init_heads}", init_heads=init_heads, **settings)).path
        first, second = load_method(run).head[0].weight, load_method(path).head[0].weight
        assert torch.allclose(first, second, atol=1e-6) == bool(init_heads)
    record = json.loads((tmp_path / "True" / "init.json").read_text())
    assert "head.0.weight" in record["heads"] and "heads: head.0.weight" in summary(record)
    pretrain(config(tmp_path / "True", resume=True))


def test_resume_ignores_the_file_it_started_from(run, tmp_path):
    weights = tmp_path / "start.safetensors"
    save_file(load_backbone(run)[0].state_dict(), weights)
    settings = {"init_from": str(weights), "backbone": "vit_small"}
    path = pretrain(config(tmp_path / "run", **settings)).path
    weights.unlink()
    pretrain(config(path, resume=True))
    with pytest.raises(ValueError, match="resume goes on with the run .*other.pt"):
        pretrain(config(path, resume=True, init_from=str(tmp_path / "other.pt")))


def test_files_that_hold_something_else(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"step": 3}, tmp_path / "empty.pt")
    with open(tmp_path / "object.pt", "wb") as file:
        pickle.dump(SimpleNamespace(weight=torch.ones(2)), file)
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    for name, message in {
        "text.pt": "something else than tensors",
        "text.safetensors": "is no safetensors file",
        "empty.pt": "must hold tensors by name, got dict",
        "object.pt": "could run code",
        "module.pt": r"could run code .*state_dict\(\)",
        "nowhere.pt": "there is no .*nowhere.pt",
        "": "no weights in",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_published_weights(monkeypatch, tmp_path):
    timm = pytest.importorskip("timm")
    with pytest.raises(
        ValueError, match="timm has weights for backbones timm:NAME, got 'vit_small'"
    ):
        published("vit_small", "timm")
    with pytest.raises(ValueError, match="publishes no weights for 'test_nothing'"):
        published("timm:test_nothing", "timm")

    made, vit = timm.create_model("test_vit"), build_backbone("timm:test_vit", 3, 160)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: made if pretrained else None)
    record = fit(vit, published("timm:test_vit", "timm"), "timm")
    assert record["loaded"] == record["of"] and record["unused"] == ["head.weight", "head.bias"]
    assert_loaded(vit, made.state_dict())

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    state = torch.get_rng_state()
    with pytest.raises(OSError, match="timm:resnet18 could not be downloaded .no route to host"):
        published("timm:resnet18", "timm")
    assert torch.equal(torch.get_rng_state(), state)


def test_role_at_the_end_of_a_path():
    assert split_role("runs/a:teacher") == ("runs/a", "teacher")
    assert split_role("C:/runs/a") == ("C:/runs/a", None)
