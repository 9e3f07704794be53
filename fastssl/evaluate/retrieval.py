"""Search by cosine: how high images of the query's class, or its copies, rank in a gallery."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import check_split
from .knn import nearest
from .multilabel import ap_of_rows, ranked

_BLOCK = 1 << 21  # similarities ranked at once; bounds the memory


def retrieval(
    gallery_h: Tensor,
    gallery_y: Tensor,
    query_h: Tensor | None = None,
    query_y: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict:
    """Rank the gallery by cosine for every query; an image is relevant if it has the query's label.

        recall@k     share of queries with a relevant image among the first k
        precision@1  share of queries whose first image is relevant, which is recall@1
        map          mean over queries of average precision over the whole gallery
        map@r        mean over queries of 1/R sum_{i <= R, relevant} precision@i for R relevant

    Args:
        gallery_h, query_h: (N, D) and (M, D) features, floating point. Without queries every image
            of the gallery is one and is searched among the others.
        gallery_y, query_y: (N,) and (M,) integer labels >= 0.
        ks: of recall@k, numbers >= 1.

    Returns:
        `percent` by metric and the `protocol`, with the number of queries that have nothing to find
        and are left out.

    Raises:
        ValueError: wrong shapes, labels, an empty split, values that are not finite, k < 1, or no
            query with a relevant image.

    Memory: blocks of 2 M similarities and their ranks, some 350 MB, for any M.

    Notes: images of equal cosine are one threshold of `map`, as in scikit-learn; for the others the
        irrelevant ones come first, so that features that are all alike find nothing.

    Example:
        >>> h, y = torch.eye(4).repeat(3, 1), torch.arange(4).repeat(3)
        >>> retrieval(h, y)["percent"]["map@r"]
        100.0

    Paper: MAP@R from Musgrave et al., "A Metric Learning Reality Check", arXiv 2003.08505.
    """
    check_split("retrieval", "gallery", gallery_h, gallery_y)
    if not ks or min(ks) < 1:
        raise ValueError(f"retrieval: ks must be numbers >= 1, got {tuple(ks)}.")
    alone = query_h is None
    query_h, query_y = (gallery_h, gallery_y) if alone else (query_h, query_y)
    _check_queries("retrieval", query_h, query_y, gallery_h)
    queries, gallery = F.normalize(query_h, dim=1), F.normalize(gallery_h, dim=1)
    scores = []
    for rows in torch.arange(len(queries)).split(max(1, _BLOCK // len(gallery))):
        similarity = queries[rows] @ gallery.T  # (rows, N)
        relevant = query_y[rows, None] == gallery_y
        if alone:  # below everything else, where an irrelevant image changes no score
            own = torch.arange(len(rows)), rows
            similarity[own], relevant[own] = -torch.inf, False
        some = relevant.any(1)
        scores.append(_scores(similarity[some], relevant[some], ks))
    scores = torch.cat(scores)
    if len(scores) == 0:
        raise ValueError(
            "retrieval: gallery_y must hold the label of some query, got no query with a relevant "
            "image. Use a gallery with the same classes."
        )
    names = [*(f"recall@{k}" for k in ks), "precision@1", "map", "map@r"]
    return {
        "percent": dict(zip(names, (100 * scores.mean(0)).tolist(), strict=True)),
        "protocol": {
            "similarity": "cosine",
            "gallery": len(gallery),
            "queries": len(scores),
            "queries_without_relevant": len(queries) - len(scores),
            "query_removed_from_gallery": alone,
            "recall": "share of queries with at least one relevant image among the first k",
        },
    }


def _scores(similarity: Tensor, relevant: Tensor, ks: Sequence[int]) -> Tensor:
    """recall@k for each k, precision@1, AP and AP@R of each query, (rows, len(ks) + 3) float64."""
    relevant, _, last = ranked(similarity, relevant)
    count = relevant.cumsum(1)
    hits = count.gather(1, last)  # up to the end of the ties
    total = count[:, -1]
    ap = (relevant * hits.double() / (last + 1)).sum(1) / total
    # Place of each relevant image, from 0, when it stands behind the irrelevant ones of its cosine.
    place = last - (hits - count)
    first = torch.where(relevant, place, relevant.shape[1]).amin(1)
    counted = relevant & (place < total[:, None])
    ap_r = (counted * count.double() / (place + 1)).sum(1) / total
    return torch.stack((*((first < k).double() for k in (*ks, 1)), ap, ap_r), 1)


def copy_detection(
    gallery_h: Tensor,
    gallery_y: Tensor,
    query_h: Tensor,
    query_y: Tensor,
    k: int | None = None,
) -> float:
    """Micro average precision: AP of one ranking of all pairs (query, gallery image) by cosine.

    Unlike the mean of each query's AP it asks for one threshold that serves all queries, and falls
    when images that are copies of nothing score high.

    Args:
        gallery_h, query_h: (N, D) and (M, D) features, floating point.
        gallery_y, query_y: (N,) and (M,) integers; a pair is a copy if they are equal and >= 0.
            -1 for an image that is a copy of nothing.
        k: pairs kept of each query, those of largest cosine; None keeps all. Copies that are not
            among them count as not found.

    Returns:
        muAP in [0, 1].

    Raises:
        ValueError: wrong shapes, an empty split, values that are not finite, no copy, or k < 1.

    Memory: about 100 bytes for each pair kept; a k of 10 or so bounds it for large galleries.

    Notes: pairs of equal cosine are one threshold, as in scikit-learn.

    Example:
        >>> h = torch.eye(4)
        >>> copy_detection(h[:2], torch.tensor([0, 1]), h[:3], torch.tensor([0, 1, -1]))
        1.0

    Paper: the metric of Douze et al., "The 2021 Image Similarity Dataset and Challenge",
    arXiv 2106.09672.
    """
    check_split("copy_detection", "gallery", gallery_h, gallery_y.clamp_min(0))
    _check_queries("copy_detection", query_h, query_y.clamp_min(0), gallery_h)
    if k is not None and k < 1:
        raise ValueError(f"copy_detection: k must be >= 1 or None, got {k}.")
    known, places = torch.cat((gallery_y, query_y)).unique(return_inverse=True)
    in_gallery, in_queries = (
        part.bincount(minlength=len(known)) for part in places.split((len(gallery_y), len(query_y)))
    )
    copies = int((in_gallery * in_queries)[known >= 0].sum())
    if copies == 0:
        raise ValueError(
            "copy_detection: query_y must share a number >= 0 with gallery_y, got no copy at all."
        )
    similarity, index = nearest(query_h, gallery_h, min(k or len(gallery_h), len(gallery_h)))
    copy = (gallery_y[index] == query_y[:, None]) & (query_y >= 0)[:, None]
    if not copy.any():
        return 0.0
    ap = ap_of_rows(similarity.reshape(1, -1), copy.reshape(1, -1)).item()
    return ap * int(copy.sum()) / copies


def _check_queries(caller: str, h: Tensor, y: Tensor, gallery_h: Tensor) -> None:
    check_split(caller, "query", h, y)
    if h.shape[1] != gallery_h.shape[1]:
        raise ValueError(
            f"{caller}: query_h must have gallery_h's width D={gallery_h.shape[1]}, "
            f"got {tuple(h.shape)}."
        )
