"""The three steps of SimCLRv2, one after the other, on few images."""

import pytest
import torch

from fastssl import evaluate as evaluation
from fastssl.cli import main
from fastssl.config import PretrainConfig
from fastssl.data import TensorSource
from fastssl.evaluate import evaluate
from fastssl.models import load_classifier
from fastssl.train import load_checkpoint, load_method, pretrain

pytest.importorskip("yaml")
pytest.importorskip("safetensors")

FEW = {"epochs": 1, "batch_size": 12, "device": "cpu", "warmup_epochs": 0.0}


@pytest.fixture(scope="module")
def source():
    pictures = torch.randint(0, 256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    return TensorSource("few", pictures.byte(), torch.arange(60) % 3, ["a", "b", "c"])


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "simclr_v2"
    arguments = {"hidden_dim": 24, "queue_size": 16}
    config = PretrainConfig(method="simclr_v2", out=out, method_args=arguments, **FEW)
    return pretrain(config, source).path


def finetuned(run, source, **settings):
    settings = {"shots": (5,), "epochs": 2, "seeds": 1, **settings}
    return evaluate(run, (source, source), ["finetune"], device="cpu", **settings)["finetune"]


def test_a_method_comes_back_whole(run):
    state = load_checkpoint(run / "checkpoints" / "last.pt")["model"]
    trained, first = load_method(run), load_method(run, trained=False)
    assert all(torch.equal(x, state[name]) for name, x in trained.state_dict().items())
    assert not torch.equal(first.head[0].weight, trained.head[0].weight)
    assert torch.equal(first.head[0].weight, first.teacher.projector[0].weight)


def test_the_first_layer_of_the_head_is_kept(run, source, tmp_path):
    path, head = tmp_path / "still.safetensors", load_method(run).head
    found = finetuned(run, source, from_head=1, save=path, lr=0.0)
    model, known = load_classifier(path)
    assert found["protocol"]["from_head"] == 1 and known["labels"] == "15"
    assert torch.equal(model.neck[0].weight, head[0].weight) and len(model.neck) == 3
    assert model.head.weight.shape == (3, 24) and not model.head.weight.any()
    finetuned(run, source, save=path, lr=0.0)
    model, _ = load_classifier(path)
    assert len(model.neck) == 0 and model.head.weight.shape == (3, 128) and model.head.weight.any()


def test_what_was_tuned_teaches_a_student(run, source, tmp_path, monkeypatch, capsys):
    path = tmp_path / "tuned" / "teacher.safetensors"
    found = finetuned(run, source, from_head=2, save=path, seeds=2)
    before = load_method(run).head[0].weight
    assert not torch.equal(load_classifier(path)[0].neck[0].weight, before)
    own = evaluate(path, (source, source), ["classifier"], device="cpu")["classifier"]
    tuned = found["protocol"]["runs"]["finetune-5-shot"][0]["top1_percent"]
    assert own["top1_percent"] == {"classifier": pytest.approx(tuned)}

    arguments = {"teacher": str(path), "alpha": 0.5}
    out = tmp_path / "student"
    pretrain(PretrainConfig(method="distill", out=out, method_args=arguments, **FEW), source)
    monkeypatch.setattr(evaluation, "load", lambda *_: source)
    assert main(["evaluate", str(out), "--protocol", "classifier", "--no-cache"]) == 0
    student = load_method(out)
    scores = student.classifier(student.features(evaluation.Inputs(8)(source.images)))
    right = 100 * (scores.argmax(1) == source.labels).float().mean()
    assert f"{right:.1f}" in capsys.readouterr().out


def test_what_cannot_be_kept_or_saved(run, source, tmp_path):
    path = tmp_path / "a.safetensors"
    net = torch.nn.Flatten()
    for network, settings, message in [
        (net, {"from_head": 1}, "from_head needs a run's folder"),
        (
            f"{run}:teacher",
            {"from_head": 1},
            "beside the student's backbone, got .*teacher",
        ),
        (run, {"from_head": 3}, "at most the 2 hidden layers"),
        (net, {"save": path}, "save needs a network of known name"),
        (run, {"save": path, "shots": (1, 5)}, "got .* for finetune-1-shot, finetune-5-shot"),
        (run, {"save": tmp_path / "a.pt"}, "must be one .safetensors file"),
    ]:
        with pytest.raises(ValueError, match=message):
            finetuned(network, source, **settings)
    with pytest.raises(ValueError, match="classifier needs a network that has one"):
        evaluate(run, (source, source), ["classifier"], device="cpu")
    assert not path.exists()
