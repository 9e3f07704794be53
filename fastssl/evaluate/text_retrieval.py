"""Search between images and captions, in both directions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import frozen
from .task import Task
from .towers import open_towers

_BLOCK = 1 << 22  # similarities ranked at once; bounds the memory


def text_ranks(image_h: Tensor, text_h: Tensor, owned: Tensor) -> tuple[Tensor, Tensor]:
    """The place of the best caption of each image, and of the best image of each caption.

    A place is 1 + the wrong ones that are at least as similar: ties count against the network.

    Args:
        image_h: (N, D) floating point. text_h: (M, D), of captions that differ from each other.
        owned: (P, 2) int64, the pairs (image, caption) that belong together. Every image and every
            caption is in one or more.

    Returns:
        (N,) and (M,) int64, from 1 on.

    Raises:
        ValueError: an image or a caption without any pair.

    Memory: blocks of 4 M similarities, some 40 MB, for any N and M.

    Example:
        >>> texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> text_ranks(torch.eye(2), texts, torch.tensor([[0, 0], [1, 1], [0, 2]]))
        (tensor([1, 2]), tensor([1, 1, 2]))
    """
    image_h, text_h = (F.normalize(h.float(), dim=1) for h in (image_h, text_h))
    return _ranks(image_h, text_h, owned), _ranks(text_h, image_h, owned.flip(1))


def _ranks(query_h: Tensor, gallery_h: Tensor, pairs: Tensor) -> Tensor:
    counts = torch.bincount(pairs[:, 0], minlength=len(query_h))
    if (counts == 0).any():
        raise ValueError(
            "text-retrieval: every image must have a caption and every caption an image, got "
            f"{int((counts == 0).sum())} of {len(query_h)} without."
        )
    pairs = pairs[pairs[:, 0].argsort(stable=True)]
    ends, ranks = counts.cumsum(0), []
    for rows in torch.arange(len(query_h)).split(max(1, _BLOCK // len(gallery_h))):
        first, last = int(rows[0]), int(rows[-1])
        own = pairs[int(ends[first] - counts[first]) : int(ends[last])]
        similarity = query_h[rows] @ gallery_h.T
        right = torch.zeros_like(similarity, dtype=torch.bool)
        right[own[:, 0] - first, own[:, 1]] = True
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + (~(similarity < best) & ~right).sum(1))  # NaN finds nothing
    return torch.cat(ranks)


def text_retrieval(task: Task, ks: Sequence[int] = (1, 5, 10)) -> dict:
    """Find the captions of each scored image among all of them, and the images of each caption.

        R@k     share of queries with a right answer among the first k, by cosine
        median  place of the first right answer

    Args:
        task: of a run whose method has a text tower; data with captions. Each line of an image's
            text is a caption. Equal captions are one, right for all images that have it.
        ks: numbers >= 1.

    Returns:
        `percent` of each R@k, "image" from image to text and "text" the other way, both medians,
        the sum of all R@k, and the `protocol`.

    Raises:
        ValueError: not such a run, images without captions, or k < 1.

    Notes: ties count against the network.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"text-retrieval: ks must be numbers >= 1, got {tuple(ks)}.")
    source, index = task.test.source, task.test.index
    if getattr(source, "captions", None) is None:
        raise ValueError(f"text-retrieval: data must have captions, got none in {source.name!r}.")
    numbers, pairs = {}, []
    for image, text in enumerate(source.captions(index)):
        lines = {line.strip() for line in text.splitlines() if line.strip()}
        pairs += [(image, numbers.setdefault(line, len(numbers))) for line in sorted(lines)]
    towers = open_towers("text-retrieval", task)
    image_h, _ = task.features("test", towers)
    with frozen(towers):
        text_h = towers.texts(list(numbers), task.batch_size)
    ranks = text_ranks(image_h, text_h, torch.tensor(pairs).view(-1, 2))
    percent = {
        f"{name} R@{k}": 100 * (rank <= k).double().mean().item()
        for name, rank in zip(("image", "text"), ranks, strict=True)
        for k in ks
    }
    medians = (rank.double().quantile(0.5).item() for rank in ranks)
    return {
        "percent": percent,
        **dict(zip(("image_median_rank", "text_median_rank"), medians, strict=True)),
        "recall_sum": sum(percent.values()),
        "protocol": {
            "images": len(index),
            "captions": len(numbers),
            "pairs": len(pairs),
            "ties": "wrong answers of equal cosine come first",
        },
    }
