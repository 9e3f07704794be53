"""Images held out of training, by which the best checkpoint is chosen."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..augment import prepare
from ..random import SPLIT, permutation
from .ranks import Ranks

NEIGHBOURS, BANK = 20, 20_000
"""Of the kNN, and of the images trained on those that it may choose among."""


class Rest:
    """The samples of a source that are trained on, for `fastssl.data.epoch_order`."""

    def __init__(self, samples: Tensor):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def draw(self, seed: int, epoch: int) -> Tensor:
        return self.samples[permutation(len(self), seed, epoch=epoch)]


def split(source, share: float, seed: int) -> tuple[Any, Tensor]:
    """What to draw epochs from, `source` itself or the `Rest` of it, and the samples held out: the
    same in every epoch, for any number of ranks, and after a resume.

    Raises:
        ValueError: a share out of range; images without a label each.
    """
    if not 0 <= share < 1:
        raise ValueError(f"pretrain: hold_out must be in [0, 1), got {share}. Try 0.05.")
    if share == 0:
        return source, torch.arange(0)
    labels, mixed = getattr(source, "labels", None), hasattr(source, "draw")
    if mixed or labels is None or labels.ndim != 1 or (labels < 0).any():
        got = "a mixture" if mixed else f"{source.name}, which lacks labels or has several an image"
        raise ValueError(
            "pretrain: hold_out needs one source with one label an image, as the images held out "
            f"are classified by their neighbours, got {got}. Leave hold_out at 0."
        )
    order = permutation(len(source), seed, stream=SPLIT)
    count = max(1, round(share * len(source)))
    return Rest(order[count:].sort().values), order[:count].sort().values


def top1_percent(
    features: Callable[[Tensor], Tensor],
    source,
    train: Tensor,
    held: Tensor,
    *,
    image_size: int,
    batch_size: int,
    ranks: Ranks,
) -> float:
    """Share of the held-out images whose nearest neighbours among those trained on, by cosine and
    weighted with exp(cosine / 0.07), vote for their label. All ranks must call it.

    Args:
        features: of inputs (B, C, image_size, image_size), in eval mode.
        train, held: sample numbers. Of the former up to BANK are used, evenly spaced.
        batch_size: images a forward on each rank.
    """
    from ..evaluate.knn import nearest

    train = train[:: -(-len(train) // BANK)]
    index = torch.cat([train, held])
    # Each rank its share, as often as the others: their forwards may wait for each other.
    each = -(-len(index) // ranks.world)
    own = index[(torch.arange(each) + each * ranks.rank) % len(index)]
    with torch.no_grad():
        h = [
            features(prepare(source.batch(part)[0], image_size).to(ranks.device)).float().cpu()
            for part in own.split(batch_size)
        ]
    h = torch.cat(ranks.gather(torch.cat(h)))[: len(index)]
    y = source.labels.cpu()
    similarity, neighbours = nearest(h[len(train) :], h[: len(train)], min(NEIGHBOURS, len(train)))
    votes = torch.zeros(len(held), int(y.max()) + 1)
    votes.scatter_add_(1, y[train][neighbours], ((similarity - 1) / 0.07).exp())
    return 100 * (votes.argmax(1) == y[held]).double().mean().item()
