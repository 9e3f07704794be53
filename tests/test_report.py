import json

import pytest
import torch

from fastssl import extras
from fastssl.config import PretrainConfig
from fastssl.evaluate import evaluate
from fastssl.report import plot_embedding, plot_probes, plot_training, project, report
from fastssl.train import pretrain

image = pytest.importorskip("matplotlib.image")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")


def ink(path):
    """Share of pixels that are not white; the file must be a readable PNG of a useful size."""
    pixels = torch.from_numpy(image.imread(path))[..., :3]
    assert min(pixels.shape[:2]) > 300
    return (pixels < 0.95).any(dim=-1).double().mean().item()


def test_project_finds_the_axes_of_largest_variance():
    spread = torch.tensor([[0.1, 5.0, 1.0, 0.01]])
    h = 7 + torch.randn(400, 4) * spread
    points = project(h)
    assert abs(torch.corrcoef(torch.stack((points[:, 0], h[:, 1])))[0, 1]) > 0.99
    assert abs(torch.corrcoef(torch.stack((points[:, 1], h[:, 2])))[0, 1]) > 0.99
    torch.testing.assert_close(points.std(0), torch.ones(2))


def test_project_settles_the_signs():
    for _ in range(10):
        h = torch.randn(100, 4).exp() @ torch.randn(4, 4)
        assert (project(h).pow(3).mean(0) > 0).all(), "the larger tail points up and right"


def test_project_of_collapsed_features_is_finite():
    assert project(torch.ones(20, 5)).isfinite().all()


def test_plot_training_draws_and_refuses_an_empty_run(tmp_path):
    metrics = [{"step": s, "loss": 6 / s, "lr": 1e-3 * s} for s in range(1, 20)]
    assert 0.01 < ink(plot_training(metrics, tmp_path / "training.png")) < 0.5
    plain = ink(tmp_path / "training.png")
    metrics = [{**record, "prototypes": 3000.0} for record in metrics]
    assert ink(plot_training(metrics, tmp_path / "training.png")) > plain, "a line at ln 3000"
    with pytest.raises(ValueError, match="report: metrics must hold records, got none"):
        plot_training([], tmp_path / "training.png")


def test_plot_probes_shows_what_there_is(tmp_path):
    low = {"knn": {"top1_percent": {"knn-20": 10.0}}}
    high = {
        "knn": {"top1_percent": {"knn-20": 95.0}},
        "kshot": {"top1_percent": {"5-shot": 90.0}, "sd_percent": {"5-shot": 3.0}},
        "diagnostics": {"rankme": 3.0},
    }
    one = ink(plot_probes({"a": {"random": low}}, tmp_path / "one.png"))
    both = ink(plot_probes({"a": {"random": low, "pretrained": high}}, tmp_path / "both.png"))
    assert both > one + 0.05, "higher bars take more ink"
    two = plot_probes({"a": {"random": low}, "b": {"pretrained": high}}, tmp_path / "two.png")
    assert image.imread(two).shape[0] == 2 * image.imread(tmp_path / "one.png").shape[0]


@pytest.mark.parametrize("classes", [0, 3, 21, 40])
def test_plot_embedding_takes_any_number_of_classes(tmp_path, classes):
    y = torch.arange(80) % classes if classes else torch.full((80,), -1)
    names = [f"class {c}" for c in range(classes)]
    maps = {"random weights": torch.randn(80, 2), "pretrained": torch.randn(80, 2)}
    assert ink(plot_embedding(maps, y, names, "data", tmp_path / "embedding.png")) > 0.01


def test_report_of_a_run(tmp_path):
    run = pretrain(PretrainConfig(out=tmp_path / "run", epochs=1, device="cpu")).path
    assert [path.name for path in report(run)] == ["training.png", "embedding.png"]
    evaluate(run, protocols=["knn"])
    paths = report(run)
    assert [path.name for path in paths] == ["training.png", "probes.png", "embedding.png"]
    assert all(path.parent == run and ink(path) > 0.005 for path in paths)
    assert json.loads((run / "results.json").read_text())["digits"]["pretrained"]


def test_report_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r'pip install "fastssl-kernels\[demo\]"'):
        report(tmp_path)
