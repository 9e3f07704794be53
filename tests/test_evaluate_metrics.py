"""Metrics of features, scores and label maps against scikit-learn, torchmetrics and loops."""

import importlib

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.data import TensorSource
from fastssl.evaluate import (
    ConfusionMatrix,
    alignment,
    average_precision,
    calibration_error,
    class_alignment,
    copy_detection,
    diagnostics,
    evaluate,
    group_report,
    knn,
    knn_leave_one_out,
    multilabel,
    retrieval,
    roc_auc,
    uniformity,
)
from fastssl.evaluate.knn import nearest


def module(name):
    """The module, not the function of its name that the package exports."""
    return importlib.import_module(f"fastssl.evaluate.{name}")


def features(count, dim=6, classes=4, dtype=torch.float64):
    y = torch.randint(0, classes, (count,))
    return torch.randn(classes, dim, dtype=dtype)[y] + torch.randn(count, dim, dtype=dtype), y


def unit(h):
    return nn.functional.normalize(h, dim=1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# several labels


def label_cases():
    torch.manual_seed(1)
    scores, targets = torch.randn(60, 5), torch.rand(60, 5) < 0.3
    sparse = torch.zeros(60, 5, dtype=torch.long)
    sparse[7] = 1
    return {
        "random": (scores, targets),
        "tied": ((2 * scores).round(), targets),
        "all equal": (torch.zeros(60, 5), targets),
        "one positive": ((2 * scores).round(), sparse),
        "one negative": (scores.double(), 1 - sparse),
        "two samples": (scores[:2], torch.tensor([[0, 1, 0, 1, 0], [1, 0, 1, 0, 1]])),
    }


@pytest.mark.parametrize("case", label_cases())
def test_average_precision_and_auc_equal_scikit_learn(case, monkeypatch):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, targets = label_cases()[case]
    monkeypatch.setattr(module("multilabel"), "_BLOCK", 2 * len(scores))  # two classes each
    ap = metrics.average_precision_score(targets.int().numpy(), scores.numpy(), average=None)
    auc = metrics.roc_auc_score(targets.int().numpy(), scores.numpy(), average=None)
    np.testing.assert_allclose(average_precision(scores, targets), ap, atol=1e-12)
    np.testing.assert_allclose(roc_auc(scores, targets), auc, atol=1e-12)
    result = multilabel(scores, targets)
    assert result["map"] == pytest.approx(ap.mean()) and result["skipped"] == []
    assert result["auc"] == pytest.approx(auc.mean())


@pytest.mark.parametrize("case", ["random", "tied"])
def test_multilabel_equals_torchmetrics(case):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    scores, targets = label_cases()[case]
    scores = scores.sigmoid()
    result = multilabel(scores, targets)
    ap = functional.multilabel_average_precision(scores, targets.int(), 5)
    auc = functional.multilabel_auroc(scores, targets.int(), 5)
    assert result["map"] == pytest.approx(ap.item(), abs=1e-6)
    assert result["auc"] == pytest.approx(auc.item(), abs=1e-6)


def test_classes_of_one_value_are_skipped_and_listed():
    scores, targets = torch.randn(30, 4), (torch.rand(30, 4) < 0.5).int()
    targets[:, 1], targets[:, 3] = 0, 1
    result = multilabel(scores, targets, names=["a", "b", "c", "d"])
    assert result["skipped"] == ["b", "d"] and list(result["roc_auc"]) == ["a", "c"]
    assert result["map"] == pytest.approx(average_precision(scores, targets)[[0, 2]].mean().item())
    assert average_precision(scores, targets)[1].isnan() and roc_auc(scores, targets)[1].isnan()
    assert average_precision(scores, targets)[3] == 1 and roc_auc(scores, targets)[3].isnan()


def test_one_sample():
    one, y = torch.ones(1, 1), torch.zeros(1, dtype=torch.long)
    assert average_precision(one, one) == 1 and average_precision(one, 0 * one).isnan()
    assert roc_auc(one, one).isnan()
    assert knn(one, y, one, y)["top1_percent"] == {"knn-1": 100}
    assert set(retrieval(one, y, one, y)["percent"].values()) == {100}
    assert copy_detection(one, y, one, y) == 1
    matrix = ConfusionMatrix(3)
    matrix.update(y + 1, y + 1)
    assert matrix.scores()["miou"] == 1 and matrix.scores()["absent"] == ["0", "2"]


def test_multilabel_errors():
    scores, targets = torch.randn(6, 2), torch.tensor([[0, 1], [1, 0]] * 3)
    for s, t, message in [
        (scores[0], targets, r"scores must be floating point \(N, C\) .* got torch.float32 \(2,\)"),
        (scores[:0], targets[:0], r"got torch.float32 \(0, 2\)"),
        (scores, targets[:, 0], r"targets must have scores' shape \(6, 2\), got \(6,\)"),
        (scores, targets * 2 - 1, "targets must be 0 or 1, got -1"),
        (scores, targets / 2, "targets must be 0 or 1, got 0.5"),
        (scores, targets * torch.nan, "targets must be 0 or 1, got nan"),
        (scores / 0, targets, "scores must be finite, got NaN or infinity in 6 of 6 rows"),
        (scores, targets * 0, r"a class with both 0 and 1, .* \(2 without a positive\)"),
    ]:
        with pytest.raises(ValueError, match=f"^multilabel: .*{message}"):
            multilabel(s, t)
    with pytest.raises(ValueError, match="names must have one for each of C=2 classes, got 1"):
        multilabel(scores, targets, names=["a"])


# retrieval


def retrieval_by_loops(h, y, query_h, query_y, ks):
    """The definitions, query by query; without queries, each image among the others."""
    metrics = pytest.importorskip("sklearn.metrics")
    alone, rows = query_h is None, []
    query_h, query_y = (h, y) if alone else (query_h, query_y)
    for i, (q, label) in enumerate(zip(unit(query_h), query_y, strict=True)):
        keep = torch.arange(len(h)) != (i if alone else -1)
        cosine, relevant = (unit(h) @ q)[keep].round(decimals=12), (y == label)[keep]
        if not relevant.any():
            continue
        ap = metrics.average_precision_score(relevant.numpy(), cosine.numpy())
        pairs = zip(cosine.tolist(), relevant.tolist(), strict=True)
        order = [found for _, found in sorted(pairs, key=lambda pair: (-pair[0], pair[1]))]
        total = sum(order)
        at_r = sum(order[j] * sum(order[: j + 1]) / (j + 1) for j in range(total)) / total
        rows.append([*(float(any(order[:k])) for k in ks), float(order[0]), ap, at_r])
    return 100 * np.mean(rows, 0)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", ["random", "tied", "all equal"])
def test_retrieval_equals_its_definition(kind, alone, monkeypatch):
    monkeypatch.setattr(module("retrieval"), "_BLOCK", 300)  # a few queries at once
    h, y = features(70, classes=5)
    query_h, query_y = features(31, classes=6)
    if kind == "tied":  # few directions, exact in any product
        h, query_h = (nn.functional.one_hot(x.argmax(1)).double() for x in (h, query_h))
    elif kind == "all equal":
        h, query_h = torch.ones_like(h), torch.ones_like(query_h)
    queries = (None, None) if alone else (query_h, query_y)
    expected = retrieval_by_loops(h, y, *queries, (1, 5, 80))
    result = retrieval(h, y, *queries, ks=(1, 5, 80))
    assert list(result["percent"]) == [
        "recall@1", "recall@5", "recall@80", "precision@1", "map", "map@r"
    ]  # fmt: skip
    np.testing.assert_allclose(list(result["percent"].values()), expected, atol=1e-6)
    if not alone:
        missing = int((query_y == 5).sum())
        assert missing and result["protocol"]["queries_without_relevant"] == missing
        assert result["protocol"]["queries"] == 31 - missing


def test_map_at_r_equals_pytorch_metric_learning():
    accuracy = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    (h, y), (query_h, query_y) = features(80), features(40)
    percent = retrieval(h, y, query_h, query_y)["percent"]
    names = ("mean_average_precision_at_r", "precision_at_1", "mean_average_precision")
    knn_func = lambda q, k, ref, _: (lambda s: (1 - s[0], s[1]))(nearest(q, ref, k))  # noqa: E731
    oracle = accuracy.AccuracyCalculator(include=names, k=len(h), knn_func=knn_func)
    expected = oracle.get_accuracy(query_h, query_y, h, y)
    for name, ours in zip(names, ("map@r", "precision@1", "map"), strict=True):
        assert percent[ours] == pytest.approx(100 * expected[name], abs=1e-5), name


@pytest.mark.parametrize("tied", [False, True])
def test_copy_detection_is_average_precision_over_all_pairs(tied):
    metrics = pytest.importorskip("sklearn.metrics")
    h = torch.randn(30, 5, dtype=torch.float64)
    if tied:
        h = nn.functional.one_hot(h.argmax(1)).double()
    gallery, query = (h[:20], torch.arange(20) // 2), (h[20:], torch.arange(10) - 2)
    gallery[1][:3] = -1  # -1 is a copy of nothing, and not of another -1
    query[1][9] = query[1][8]  # two queries of one source
    cosine = unit(query[0]) @ unit(gallery[0]).T
    copy = (query[1][:, None] == gallery[1]) & (gallery[1] >= 0)
    expected = metrics.average_precision_score(copy.flatten().numpy(), cosine.flatten().numpy())
    assert copy_detection(*gallery, *query) == pytest.approx(expected, abs=1e-12)
    assert copy_detection(*gallery, *query, k=99) == pytest.approx(expected, abs=1e-12)


def test_copies_outside_of_the_nearest_k_count_as_missed():
    gallery = torch.eye(3)[[0, 0, 1]], torch.tensor([0, 0, 1])
    query = torch.eye(3)[[0, 0]], torch.tensor([0, 1])  # the second is nearest to another's source
    assert copy_detection(*gallery, *query, k=1) == pytest.approx(0.5 / 3)  # 1 of 3, 1 wrong beside
    assert copy_detection(*gallery, query[0][1:], query[1][1:], k=1) == 0


def test_retrieval_errors():
    h, y = features(12)
    with pytest.raises(ValueError, match=r"retrieval: query_h must have gallery_h's width D=6"):
        retrieval(h, y, h[:, :4], y)
    with pytest.raises(ValueError, match="retrieval: ks must be numbers >= 1, got"):
        retrieval(h, y, ks=(0,))
    with pytest.raises(ValueError, match="retrieval: gallery_y must be integer"):
        retrieval(h, y.double())
    with pytest.raises(ValueError, match="must hold the label of some query, got no query with"):
        retrieval(h[:1], y[:1])
    with pytest.raises(ValueError, match="must share a number >= 0 with gallery_y, got no copy"):
        copy_detection(h, y, h, torch.full_like(y, -1))
    with pytest.raises(ValueError, match="copy_detection: k must be >= 1 or None, got 0"):
        copy_detection(h, y, h, y, k=0)


# kNN


@pytest.mark.parametrize("votes", ["softmax", "distance", "uniform"])
@pytest.mark.parametrize("one_out", [False, True])
def test_knn_votes_equal_scikit_learn(votes, one_out):
    neighbors = pytest.importorskip("sklearn.neighbors")
    selection = pytest.importorskip("sklearn.model_selection")
    (h, y), (test_h, test_y) = features(90), features(60)
    weights = (lambda d: np.exp((1 - d) / 0.07)) if votes == "softmax" else votes
    for k in (1, 2, 9):
        oracle = neighbors.KNeighborsClassifier(k, metric="cosine", weights=weights)
        if one_out:
            folds = selection.cross_val_predict(
                oracle, h.numpy(), y.numpy(), cv=selection.LeaveOneOut()
            )
            expected, ours = (folds == y.numpy()).mean(), knn_leave_one_out(h, y, (k,), votes=votes)
            assert ours["top1_percent"] == pytest.approx({f"knn-loo-{k}": 100 * expected})
        else:
            expected = oracle.fit(h.numpy(), y.numpy()).score(test_h.numpy(), test_y.numpy())
            ours = knn(h, y, test_h, test_y, (k,), votes=votes)
            assert ours["top1_percent"] == pytest.approx({f"knn-{k}": 100 * expected})


def test_leaving_one_out_with_more_copies_than_neighbours():
    h, y = torch.ones(40, 3), torch.tensor([0] * 39 + [1])  # any k neighbours are equally near
    result = knn_leave_one_out(h, y, ks=(3,))
    assert result["top1_percent"] == pytest.approx({"knn-loo-3": 100 * 39 / 40})
    assert result["protocol"]["alone_in_class"] == 1
    assert knn_leave_one_out(h, y, ks=(3, 100))["protocol"]["k"] == [3, 39]
    with pytest.raises(ValueError, match="knn_leave_one_out: h must have at least two rows, got 1"):
        knn_leave_one_out(h[:1], y[:1])
    with pytest.raises(ValueError, match="votes must be one of 'softmax', .* got 'rank'"):
        knn_leave_one_out(h, y, votes="rank")


def test_a_small_temperature_does_not_overflow():
    (h, y), (test_h, test_y) = features(90, dtype=torch.float32), features(60, dtype=torch.float32)
    small = knn(h, y, test_h, test_y, ks=(20,), temperature=1e-4)["top1_percent"]["knn-20"]
    assert small == knn(h, y, test_h, test_y, ks=(1,))["top1_percent"]["knn-1"]


def test_equal_features_outweigh_any_distance():
    h, y = torch.eye(5)[[0, 1, 1, 1, 1]] + 1e-3, torch.tensor([0, 1, 1, 1, 1])
    assert knn(h, y, h[:1], y[:1], ks=(5,), votes="distance")["top1_percent"]["knn-5"] == 100
    assert knn(h, y, h[:1], y[:1], ks=(5,), votes="uniform")["top1_percent"]["knn-5"] == 0


# alignment and uniformity


def test_alignment_and_uniformity_equal_their_formulas():
    h, y = features(50)
    x = h + 0.1 * torch.randn_like(h)
    for alpha in (1.0, 2.0):
        expected = (unit(h) - unit(x)).square().sum(1).pow(alpha / 2).mean().item()
        assert alignment(h, x, alpha) == pytest.approx(expected)
    pairs = torch.pdist(unit(h))
    same = torch.pdist(y[:, None].double()) == 0
    for t in (1.0, 2.0):
        expected = pairs.square().mul(-t).exp().mean().log().item()
        assert uniformity(h, t, block=7) == pytest.approx(expected)
    assert class_alignment(h, y) == pytest.approx(pairs[same].square().mean().item())


def test_collapsed_features_are_aligned_and_not_uniform():
    for h in (torch.ones(40, 3), torch.zeros(40, 3)):
        assert uniformity(h) == pytest.approx(0, abs=1e-6)
        assert class_alignment(h, torch.arange(40) % 3) == pytest.approx(0, abs=1e-6)
        assert alignment(h, h) == 0
    wide = torch.randn(500, 200)
    assert uniformity(wide) == pytest.approx(-4 + 8 / 200, abs=0.01)
    with pytest.raises(ValueError, match=r"uniformity: h must be \(N, D\) with N >= 2, got \(1, 3"):
        uniformity(torch.ones(1, 3))
    with pytest.raises(ValueError, match="alignment: x and y must be .* got .2, 3. and .3, 3."):
        alignment(torch.ones(2, 3), torch.ones(3, 3))


def test_diagnostics_take_rows_of_every_class_and_need_no_labels():
    h, y = torch.eye(4).repeat_interleave(100, 0), torch.arange(4).repeat_interleave(100)
    result = diagnostics(h, y, max_rows=40, max_pair_rows=8)
    assert result["rankme"] == pytest.approx(4, rel=1e-4), "not only the first class"
    assert (result["protocol"]["rows"], result["protocol"]["pair_rows"]) == (40, 8)
    assert result["class_alignment"] == pytest.approx(0, abs=1e-12)
    assert "class_alignment" not in diagnostics(h)
    assert "class_alignment" not in diagnostics(h, torch.full((400,), -1))


# label maps


@pytest.mark.parametrize("absent", [False, True])
def test_confusion_matrix_equals_scikit_learn_and_torchmetrics(absent):
    metrics = pytest.importorskip("sklearn.metrics")
    torchmetrics = pytest.importorskip("torchmetrics.classification")
    target, predicted = torch.randint(0, 4, (2, 6, 9, 11)).unbind()
    if absent:  # 3 in neither, 2 predicted but never right
        target, predicted = target.clamp_max(1), predicted.clamp_max(2)
    target[0, :3] = 255
    predicted[0, 0] = 77  # where nothing counts
    matrix = ConfusionMatrix(4)
    for p, t in zip(predicted.split((1, 2, 3)), target.split((1, 2, 3)), strict=True):
        matrix.update(p, t)
    scores = matrix.scores()
    counted = target != 255
    p, t = predicted[counted].numpy(), target[counted].numpy()
    assert np.array_equal(matrix.counts, metrics.confusion_matrix(t, p, labels=range(4)))
    assert scores["absent"] == (["3"] if absent else [])
    iou = metrics.jaccard_score(t, p, average=None)
    np.testing.assert_allclose(list(scores["iou_by_class"].values()), iou, atol=1e-12)
    dice = metrics.f1_score(t, p, average=None)
    np.testing.assert_allclose(list(scores["dice_by_class"].values()), dice, atol=1e-12)
    assert scores["miou"] == pytest.approx(iou.mean())
    assert scores["dice"] == pytest.approx(dice.mean())
    assert scores["pixel_accuracy"] == pytest.approx(metrics.accuracy_score(t, p))
    jaccard = torchmetrics.MulticlassJaccardIndex(4)
    assert scores["miou"] == pytest.approx(jaccard(*map(torch.tensor, (p, t))).item(), abs=1e-6)


def test_confusion_matrix_errors():
    matrix = ConfusionMatrix(3, ignore_index=None)
    label = torch.tensor([[0, 2]])
    for p, t, message in [
        (label[0], label, r"predicted must have target's shape \(1, 2\), got \(2,\)"),
        (label.float(), label, "predicted must be integers, got torch.float32"),
        (label + 1, label, r"predicted must be in \[0, 3\), got 3 in 1 pixels"),
        (label, label - 1, r"target must be in \[0, 3\), got -1 in 1 pixels"),
    ]:
        with pytest.raises(ValueError, match=f"^ConfusionMatrix: {message}"):
            matrix.update(p, t)
    with pytest.raises(ValueError, match="scores need at least one counted pixel, got none"):
        matrix.scores()
    with pytest.raises(ValueError, match="num_classes must be >= 1, got 0"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match="names must have one for each of 3 classes, got 1"):
        matrix.scores(["sky"])


# groups and calibration


def test_group_report_names_the_worst_group():
    groups = torch.tensor([0] * 10 + [2] * 30 + [3] * 5)
    correct = torch.cat((torch.ones(10), torch.arange(30) % 3 == 0, torch.ones(5))).bool()
    report = group_report(correct, groups, names=["day", "dusk", "night", "fog"])
    assert list(report["groups"]) == ["day", "night", "fog"]
    assert report["worst_group"] == "night"
    assert report["worst_group_percent"] == pytest.approx(100 / 3)
    assert report["gap_percent"] == pytest.approx(200 / 3)
    assert report["ratio"] == pytest.approx(1 / 3)
    assert report["top1_percent"] == pytest.approx(100 * 25 / 45)
    assert report["group_mean_percent"] == pytest.approx(700 / 9)
    low, high = report["groups"]["night"]["ci95_percent"]
    assert (low, high) == pytest.approx((19.2307, 51.2199), abs=0.01)
    low, high = report["groups"]["fog"]["ci95_percent"]
    assert 50 < low < 60 and high == pytest.approx(100), "five right say little"


def test_group_report_errors():
    ones = torch.ones(4)
    for correct, groups, message in [
        (ones[:0], ones[:0].long(), r"correct must be \(N,\), N >= 1, got \(0,\)"),
        (ones * 2, ones.long(), "correct must be 0 or 1, got other values"),
        (ones, ones, "groups must be integers >= 0, one for each of 4 .* got torch.float32"),
        (ones, -ones.long(), "groups must be integers >= 0"),
        (ones, ones[:3].long(), r"got torch.int64 \(3,\)"),
        (ones, ones.long(), "names must have one for each group, got 1 and group 1"),
    ]:
        with pytest.raises(ValueError, match=f"^group_report: .*{message}"):
            group_report(correct, groups, names=["a"])


@pytest.mark.parametrize("bins", [1, 15])
def test_calibration_error_equals_torchmetrics(bins):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    p = (2 * torch.randn(400, 5)).softmax(1)
    # Right in 68 % at any confidence: too modest below, too certain above, so that the bins matter.
    y = torch.where(torch.rand(400) < 0.6, p.argmax(1), torch.randint(0, 5, (400,)))
    expected = functional.multiclass_calibration_error(p, y, 5, n_bins=bins).item()
    assert calibration_error(p, y, bins) == pytest.approx(expected, abs=1e-6)


def test_certain_and_wrong_is_the_worst_calibration():
    p, y = torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 0])
    assert calibration_error(p, y) == 0
    assert calibration_error(p, (y + 1) % 3) == 1
    assert calibration_error(p[:1], y[:1], bins=1) == 0
    for rows, labels, message in [
        (p[0], y, r"probabilities must be floating point \(N, C\)"),
        (2 * p, y, "rows that sum to 1, got other values. Pass logits.softmax"),
        (p, y + 1, r"y must be \(4,\) integers in \[0, 3\)"),
    ]:
        with pytest.raises(ValueError, match=f"^calibration_error: .*{message}"):
            calibration_error(rows, labels)


# the protocols of a run


def test_evaluate_runs_the_protocols_on_the_right_splits():
    y = torch.arange(60) % 3
    images = 60 + 30 * y[:, None, None, None] * torch.tensor([1, 2, -2])[:, None, None]
    noisy = (images + torch.randint(-40, 41, (60, 3, 8, 8))).clamp(0, 255).byte()
    train = TensorSource("train", noisy[:45], y[:45], ["a", "b", "c"])
    test = TensorSource("test", noisy[45:], y[45:], ["a", "b", "c"])
    net = nn.Flatten()
    results = evaluate(net, (train, test), ["knn-loo", "retrieval", "diagnostics"])
    assert results["knn-loo"]["protocol"]["k"] == [10, 20, 44]
    assert results["knn-loo"]["protocol"]["votes"] == "exp(similarity / temperature)"
    protocol = results["retrieval"]["protocol"]
    assert (protocol["gallery"], protocol["queries"], protocol["test_images"]) == (45, 15, 15)
    assert not protocol["query_removed_from_gallery"]
    assert results["retrieval"]["percent"]["recall@10"] == 100
    assert results["diagnostics"]["class_alignment"] < 2
