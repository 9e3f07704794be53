"""k-means and the agreement of partitions against scikit-learn."""

import pytest
import torch

from fastssl.evaluate import clusters
from fastssl.evaluate.clusters import agreement, kmeans, seeds


def blobs(count=120, classes=4, dim=8, spread=1.0):
    torch.manual_seed(0)
    y = torch.arange(count) % classes
    return 3 * torch.randn(classes, dim, dtype=torch.float64)[y] + spread * torch.randn(
        count, dim, dtype=torch.float64
    ), y


PARTITIONS = {
    "random": (torch.arange(50) * 7 % 11 // 3, torch.arange(50) % 4),
    "equal but for names": (torch.arange(50) % 5 * 3, 4 - torch.arange(50) % 5),
    "one cluster": (torch.zeros(50).long(), torch.arange(50) % 4),
    "one cluster each": (torch.zeros(50).long(), torch.ones(50).long()),
    "all apart": (torch.arange(50), torch.arange(50) % 4),
    "one sample": (torch.zeros(1).long(), torch.zeros(1).long()),
}


@pytest.mark.parametrize("case", PARTITIONS)
def test_agreement_equals_scikit_learn(case):
    metrics = pytest.importorskip("sklearn.metrics")
    a, b = PARTITIONS[case]
    expected = (
        metrics.normalized_mutual_info_score(b.numpy(), a.numpy()),
        metrics.adjusted_rand_score(b.numpy(), a.numpy()),
    )
    assert agreement(a, b) == pytest.approx(expected, abs=1e-9)


def test_kmeans_equals_scikit_learn_from_the_same_start():
    cluster = pytest.importorskip("sklearn.cluster")
    h, _ = blobs(spread=3.0)
    start = seeds(h, 6, torch.Generator().manual_seed(1))
    assigned, inertia = kmeans(h, start)
    oracle = cluster.KMeans(6, init=start.numpy(), n_init=1, tol=0, algorithm="lloyd")
    oracle.fit(h.numpy())
    assert assigned.tolist() == oracle.labels_.tolist()
    assert inertia == pytest.approx(oracle.inertia_)


def test_an_empty_cluster_keeps_its_centre():
    h = torch.tensor([[0.0], [1.0], [10.0]])
    assigned, inertia = kmeans(h, torch.tensor([[0.4], [10.0], [-50.0]]))
    assert assigned.tolist() == [0, 0, 1] and inertia == pytest.approx(0.5)


def test_seeds_are_different_rows_far_from_each_other():
    h, y = blobs(spread=0.01)
    chosen = seeds(h, 4, torch.Generator().manual_seed(0))
    nearest = torch.cdist(chosen, h).argmin(1)
    assert y[nearest].unique().numel() == 4
    assert seeds(torch.ones(5, 2), 3, torch.Generator().manual_seed(0)).shape == (3, 2)


def test_clusters_find_separate_classes_and_nothing_in_collapsed_features():
    h, y = blobs()
    result = clusters(h, y)
    assert result["nmi"] == pytest.approx(1) and result["ari"] == pytest.approx(1)
    assert result["protocol"]["k"] == 4 and result == clusters(h, y)
    collapsed = clusters(torch.ones(40, 3), torch.arange(40) % 4)
    assert collapsed["nmi"] == 0 and collapsed["ari"] == 0


def test_clusters_argument_errors():
    h, y = blobs(20)
    with pytest.raises(ValueError, match=r"clusters: k must be in \[1, 20\] .* got 21 and 5"):
        clusters(h, y, k=21)
    with pytest.raises(ValueError, match="restarts >= 1, got 4 and 0"):
        clusters(h, y, restarts=0)
    with pytest.raises(ValueError, match="clusters: train_y must be labelled, got no label"):
        clusters(h, y - 1)
