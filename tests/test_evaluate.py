import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.config import PretrainConfig
from fastssl.data import TensorSource
from fastssl.evaluate import (
    diagnostics,
    evaluate,
    extract,
    feature_std,
    fit_logistic,
    frozen,
    knn,
    kshot,
    linear,
    rankme,
    read_results,
    table,
)
from fastssl.evaluate.features import standardise
from fastssl.evaluate.knn import nearest
from fastssl.evaluate.kshot import draw
from fastssl.evaluate.linear import held_out
from fastssl.train import pretrain


def clusters(count, dim=12, classes=4, spread=1.0, seed=0):
    """Features (count, dim) around one centre a class, and labels; every class occurs."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    y = torch.arange(count) % classes
    return centres[y] + spread * torch.randn(count, dim, generator=g), y


TRAIN, TEST = clusters(200), clusters(90, seed=1)


class Net(nn.Module):
    """Channel means through BatchNorm: features (B, C)."""

    def __init__(self, channels=3):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.norm(x).mean(dim=(2, 3))


def source(count=60, classes=3, labels=None, name="colours"):
    """Images whose class is a colour: channel means separate them."""
    y = torch.arange(count) % classes
    g = torch.Generator().manual_seed(count)
    images = torch.randint(0, 100, (count, 3, 8, 8), generator=g)
    images += 120 * torch.eye(3, dtype=torch.int64)[y][:, :, None, None]
    names = [str(c) for c in range(classes)]
    return TensorSource(name, images.byte(), y if labels is None else labels, names)


# features


def test_extract_gives_eval_mode_features_in_order_whatever_the_batch():
    net, data = Net().train(), source()
    h, y = extract(net, data, 8, batch_size=7)
    assert net.training, "the caller's mode is given back"
    assert h.dtype == torch.float32 and torch.equal(y, data.labels)
    whole, _ = extract(net, data, 8, batch_size=60)
    torch.testing.assert_close(h, whole)
    assert int(net.norm.num_batches_tracked) == 0


def test_frozen_gives_every_mode_back_after_an_error():
    net = nn.Sequential(Net(), nn.Dropout())
    net[1].eval()
    with pytest.raises(ZeroDivisionError), frozen(net):
        assert not net[0].norm.training
        raise ZeroDivisionError
    assert net[0].norm.training and not net[1].training


class TrainsItself(Net):
    def forward(self, x):
        self.norm.train()
        return super().forward(x)


class WritesWeights(Net):
    def forward(self, x):
        self.norm.weight.data.mul_(1.0001)
        return super().forward(x)


class WritesHidden(Net):
    """A buffer outside of the state dict."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)


@pytest.mark.parametrize(
    ("net", "changed"),
    [(TrainsItself, "norm.running_mean"), (WritesWeights, "norm.weight"), (WritesHidden, "seen")],
)
def test_a_backbone_that_changes_is_refused_by_name(net, changed):
    with pytest.raises(RuntimeError, match=f"must stay frozen, got a changed '{changed}'"):
        extract(net(), source(), 8)


def test_extract_refuses_maps_and_empty_splits():
    with pytest.raises(ValueError, match=r"must return features \(B, D\) .* got \(60, 3, 8, 8\)"):
        extract(nn.BatchNorm2d(3), source(), 8)
    with pytest.raises(ValueError, match="got an empty split of 'colours'"):
        extract(Net(), source(0), 8)


def test_standardise_zeroes_dead_dimensions():
    h = torch.randn(50, 3)
    h[:, 1] = 0.1  # constant up to rounding of its mean
    (out,) = standardise(h, h)
    assert out[:, 1].eq(0).all()
    torch.testing.assert_close(out[:, [0, 2]].std(0, correction=0), torch.ones(2))


# knn


def test_nearest_equals_sorting_all_similarities():
    q, k = torch.randn(37, 5), torch.randn(101, 5)
    similarity, index = nearest(q, k, 13, block=(8, 17))
    every = nn.functional.normalize(q, dim=1) @ nn.functional.normalize(k, dim=1).T
    expected, order = every.sort(dim=1, descending=True)
    torch.testing.assert_close(similarity, expected[:, :13])
    assert torch.equal(index, order[:, :13])


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_equals_a_loop_over_neighbours(temperature):
    result = knn(*TRAIN, *TEST, ks=(1, 10, 500), temperature=temperature)
    assert result["protocol"]["k"] == [1, 10, 200], "capped by the training split"
    train_h, test_h = (nn.functional.normalize(h.double(), dim=1) for h in (TRAIN[0], TEST[0]))
    for k in (1, 10, 200):
        right = 0
        for h, y in zip(test_h, TEST[1].tolist(), strict=True):
            cosine = train_h @ h
            votes = [0.0] * 4
            for i in cosine.argsort(descending=True)[:k].tolist():
                votes[int(TRAIN[1][i])] += float((cosine[i] / temperature).exp())
            right += votes.index(max(votes)) == y
        assert result["top1_percent"][f"knn-{k}"] == pytest.approx(100 * right / 90)


def test_knn_equals_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    oracle = neighbors.KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(TRAIN[0].double().numpy(), TRAIN[1].numpy())
    expected = 100 * oracle.score(TEST[0].double().numpy(), TEST[1].numpy())
    assert knn(*TRAIN, *TEST, ks=(20,))["top1_percent"]["knn-20"] == pytest.approx(expected)


def test_knn_argument_errors():
    with pytest.raises(ValueError, match="knn: ks must be numbers >= 1, got \\(0,\\)"):
        knn(*TRAIN, *TEST, ks=(0,))
    with pytest.raises(ValueError, match="knn: temperature must be > 0, got 0"):
        knn(*TRAIN, *TEST, temperature=0)


# linear probe


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_fit_logistic_reaches_scikit_learns_optimum(l2):
    models = pytest.importorskip("sklearn.linear_model")
    h, y = clusters(200, spread=3.0)  # overlapping, so that the optimum is well determined
    h = h.double()
    weight, bias = fit_logistic(h, y, 4, l2)
    oracle = models.LogisticRegression(C=1 / (len(h) * l2), tol=1e-10, max_iter=5000)
    oracle.fit(h.numpy(), y.numpy())
    torch.testing.assert_close(weight.T, torch.tensor(oracle.coef_), atol=5e-4, rtol=5e-3)
    centred = bias - bias.mean()  # a common shift of the biases changes nothing
    expected = torch.tensor(oracle.intercept_)
    torch.testing.assert_close(centred, expected - expected.mean(), atol=5e-4, rtol=5e-3)


def test_fit_logistic_gradient_vanishes_and_ignores_the_start():
    h, y = TRAIN
    weight, bias = fit_logistic(h, y, 4, 1e-2)
    w = weight.double().requires_grad_()
    loss = nn.functional.cross_entropy(h.double() @ w + bias, y) + 0.5e-2 * w.square().sum()
    (gradient,) = torch.autograd.grad(loss, w)
    assert gradient.abs().max() < 1e-5
    start = torch.randn(12, 4), torch.randn(4)
    torch.testing.assert_close(fit_logistic(h, y, 4, 1e-2, start)[0], weight, atol=1e-3, rtol=0)


def test_fit_logistic_gives_the_thread_count_back():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fit_logistic(*TRAIN, 4, 1.0, max_iter=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_linear_chooses_on_held_out_training_samples_only():
    result = linear(*TRAIN, *TEST)
    wrong_labels = linear(*TRAIN, TEST[0], TEST[1].roll(1))
    assert wrong_labels["protocol"] == result["protocol"], "test labels must change no choice"
    protocol = result["protocol"]
    scores = protocol["held_out_top1_percent"]
    assert scores[f"{protocol['l2']:g}"] == max(scores.values())
    assert protocol["l2"] == max(float(k) for k, v in scores.items() if v == max(scores.values()))
    assert protocol["refitted_on"] == 200 and "20 of the 200" in protocol["l2_chosen_on"]
    assert result["top1_percent"]["linear"] > 80


def test_linear_scores_candidates_on_samples_it_was_not_fitted_on():
    h, y = torch.randn(120, 200), torch.arange(120) % 2  # noise: any fit is perfect, none is right
    protocol = linear(h, y, h, y)["protocol"]
    assert max(protocol["held_out_top1_percent"].values()) < 95


def test_held_out_is_a_stratified_tenth():
    y = torch.cat((torch.zeros(100), torch.ones(40), torch.full((1,), 2))).long()
    mask = held_out(y)
    assert [int(mask[y == c].sum()) for c in range(3)] == [10, 4, 0]
    assert torch.equal(mask, held_out(y)) and not torch.equal(mask, held_out(y, seed=1))


def test_linear_needs_two_samples_of_a_class():
    with pytest.raises(ValueError, match="linear: train_y must hold at least two samples"):
        linear(TRAIN[0][:4], TRAIN[1][:4], *TEST)


# k-shot


def test_draws_are_balanced_fixed_nested_and_differ():
    y = TRAIN[1][torch.randperm(200)]
    five = draw(y, 5, seed=0)
    assert len(set(five.tolist())) == 20
    assert y[five].bincount().tolist() == [5] * 4
    assert torch.equal(five, draw(y, 5, seed=0))
    assert set(draw(y, 1, seed=0).tolist()) < set(five.tolist())
    assert set(five.tolist()) != set(draw(y, 5, seed=1).tolist())


def test_kshot_equals_scikit_learn_on_the_same_draws():
    models = pytest.importorskip("sklearn.linear_model")
    result = kshot(*TRAIN, *TEST, shots=(5,), draws=3)
    train_h, test_h = standardise(TRAIN[0], TRAIN[0], TEST[0])
    scores = []
    for seed in range(3):
        i = draw(TRAIN[1], 5, seed)
        oracle = models.LogisticRegression(tol=1e-8, max_iter=1000)  # C = 1
        oracle.fit(train_h[i].double().numpy(), TRAIN[1][i].numpy())
        scores.append(100 * oracle.score(test_h.double().numpy(), TEST[1].numpy()))
    scores = torch.tensor(scores, dtype=torch.float64)
    assert result["top1_percent"]["5-shot"] == pytest.approx(scores.mean().item())
    assert result["sd_percent"]["5-shot"] == pytest.approx(scores.std().item(), abs=1e-9)
    assert result["protocol"]["draw_seeds"] == [0, 1, 2]
    assert result["protocol"]["l2"] == {"5-shot": 1 / 20}


def test_kshot_refuses_too_small_classes():
    with pytest.raises(ValueError, match=r"at least k=10 samples of each class, got 9 of class 2"):
        kshot(TRAIN[0][:38], TRAIN[1][:38], *TEST)
    with pytest.raises(ValueError, match="kshot: shots must be >= 1 and draws >= 2"):
        kshot(*TRAIN, *TEST, draws=1)


# diagnostics


def test_rankme_and_spread_of_known_features():
    assert rankme(torch.eye(8).repeat(4, 1)) == pytest.approx(8, rel=1e-4)
    assert rankme(torch.ones(50, 1) * torch.randn(1, 8)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(5, 3)) == pytest.approx(1, abs=1e-3)
    assert feature_std(torch.ones(9, 4)) == 0
    assert feature_std(torch.randn(5000, 16)) == pytest.approx(1, abs=0.02)
    assert diagnostics(torch.randn(30, 4), max_rows=20)["protocol"]["rows"] == 20


# errors


@pytest.mark.parametrize("probe", [knn, linear, kshot])
def test_wrong_features_and_labels_are_named(probe):
    h, y = TRAIN
    cases = [
        ((h, y[:-1]), TEST, r"train_y must be integer \(200,\).* got torch.int64 \(199,\)"),
        ((h, y[:, None]), TEST, r"train_y must be .* got torch.int64 \(200, 1\)"),
        ((h, y.float()), TEST, "train_y must be integer .* got torch.float32"),
        ((h[:0], y[:0]), TEST, "train_h must have at least one row"),
        ((h.view(200, 3, 4), y), TEST, r"train_h must be floating point \(N, D\)"),
        ((h.long(), y), TEST, "train_h must be floating point"),
        (TRAIN, (TEST[0][:, :5], TEST[1]), r"test_h must have train_h's width D=12, got \(90, 5\)"),
        (
            TRAIN,
            (TEST[0], TEST[1] - 1),
            r"test_y must be labelled, got no label \(-1\) on 23 of 90",
        ),
        (TRAIN, (TEST[0], TEST[1] + 2), r"got no training sample of \[4, 5\]"),
        ((h / 0, y), TEST, "train_h must be finite, got NaN or infinity in 200 of 200 rows"),
    ]
    for train, test, message in cases:
        with pytest.raises(ValueError, match=f"^{probe.__name__}: .*{message}"):
            probe(*train, *test)


def test_evaluate_argument_errors():
    pair = source(), source(30)
    with pytest.raises(
        ValueError, match="protocols must be known ones, got 'kn'. Did you mean 'kn"
    ):
        evaluate(Net(), pair, ["kn"])
    with pytest.raises(ValueError, match="must name at least one"):
        evaluate(Net(), pair, [])
    with pytest.raises(ValueError, match="weights must be"):
        evaluate(Net(), pair, weights="trained")
    with pytest.raises(ValueError, match="data must be given"):
        evaluate(Net())
    unlabelled = source(labels=torch.full((60,), -1))
    with pytest.raises(ValueError, match="train_y must be labelled, got no label .* 60 of 60"):
        evaluate(Net(), (unlabelled, source(30)))


# evaluate and results


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    for package in ("sklearn", "yaml", "safetensors"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("runs") / "tiny"
    config = PretrainConfig(out=out, epochs=1, batch_size=256, device="cpu")
    return pretrain(config).path


def test_a_module_is_evaluated_without_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = evaluate(Net(), (source(), source(30)), ["knn", "linear", "kshot", "diagnostics"])
    assert list(results) == ["knn", "linear", "kshot", "diagnostics"]
    assert results["linear"]["top1_percent"]["linear"] == 100
    assert results["kshot"]["top1_percent"]["10-shot"] == 100
    assert results["diagnostics"]["rankme"] > 1
    protocol = results["knn"]["protocol"]
    assert protocol["weights"] == "as given" and protocol["feature_dim"] == 3
    assert (protocol["train_images"], protocol["test_images"]) == (60, 30)
    assert list(tmp_path.iterdir()) == []


def test_results_file_holds_the_whole_protocol_and_keeps_earlier_ones(run):
    first = evaluate(run, protocols=["knn"])
    evaluate(run, protocols=["kshot"])
    evaluate(run, protocols=["knn"], weights="random")
    written = json.loads((run / "results.json").read_text())
    assert written == read_results(run)
    assert set(written["digits"]) == {"pretrained", "random"}
    assert set(written["digits"]["pretrained"]) == {"knn", "kshot"}
    assert written["digits"]["pretrained"]["knn"] == first["knn"]
    expected = {
        "method": "simclr",
        "backbone": "resnet_small",
        "pretrained_on": "digits",
        "weights": "pretrained",
        "step": 4,
        "data": "digits",
        "train_images": 1257,
        "test_images": 540,
        "image_size": 8,
        "feature_dim": 128,
        "k": [10, 20, 100, 200],
        "temperature": 0.07,
    }
    protocol = written["digits"]["pretrained"]["knn"]["protocol"]
    assert {key: protocol[key] for key in expected} == expected
    assert written["digits"]["random"]["knn"]["protocol"]["step"] == 0
    assert not list(run.glob("*.partial"))
    assert first["knn"]["top1_percent"] != written["digits"]["random"]["knn"]["top1_percent"]


def test_evaluation_of_a_run_repeats_exactly(run):
    probe = partial(evaluate, run, protocols=["knn", "diagnostics"])
    assert probe() == probe()


def test_evaluate_refuses_other_channels_broken_results_and_no_run(run, tmp_path):
    with pytest.raises(ValueError, match="must have the 1 channels .* got 3 in 'colours'"):
        evaluate(run, (source(), source(30)))
    with pytest.raises(FileNotFoundError, match="is not a run"):
        evaluate(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="results.json must be JSON"):
        read_results(tmp_path)


def test_table_aligns_columns_and_shows_the_gap():
    def results(value):
        return {
            "knn": {"top1_percent": {"knn-20": value}},
            "kshot": {"top1_percent": {"5-shot": value / 2}, "sd_percent": {"5-shot": 1.25}},
            "diagnostics": {"rankme": 3.0, "feature_std": 0.5},
        }

    lines = table({"random": results(40.0), "pretrained": results(90.0)}).splitlines()
    assert lines[0].split() == ["top-1,", "%", "random", "pretrained", "gap"]
    assert lines[1].split() == ["knn-20", "40.0", "90.0", "+50.0"]
    assert lines[2].split() == ["5-shot", "20.0", "±", "1.2", "45.0", "±", "1.2", "+25.0"]
    assert lines[3].split() == ["rankme", "3.00", "3.00"]
    assert (
        len(
            {
                line.index(end) + len(end)
                for line, end in zip(lines, ("gap", "+50.0", "+25.0"), strict=False)
            }
        )
        == 1
    )
    assert "gap" not in table({"pretrained": results(90.0)})


def test_protocols_done_before_an_error_are_kept(run):
    with pytest.raises(ValueError, match="at least k=900 samples"):
        evaluate(run, protocols=["diagnostics", "kshot"], shots=(900,))
    assert read_results(run)["digits"]["pretrained"]["diagnostics"]["rankme"] > 1
