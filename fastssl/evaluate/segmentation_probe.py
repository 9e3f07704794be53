"""Linear segmentation: one class for each place of a frozen feature map."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import epoch_order
from .features import Split, frozen
from .layers import FeatureMap
from .segmentation import ConfusionMatrix
from .task import Task, over_seeds

_KEPT_BYTES = 1 << 30
IGNORED = 255


def segmentation_probe(
    task: Task,
    epochs: int = 20,
    train_batch_size: int = 16,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    seeds: int = 1,
) -> dict:
    """mIoU and Dice of a BatchNorm and a 1 x 1 convolution on the frozen network's last map.

    The map is a transformer's patch tokens behind its last norm, else the last output with more
    than one pixel. Logits are enlarged bilinearly to the masks; cross-entropy without pixels of
    255; AdamW at a constant rate, no augmentation; scored after the last epoch.

    Args:
        task: network and images; their source has `masks(index)`, (B, H, W) int64, of the centre
            squares, 0 to C - 1 or 255: `shapes` has, and folders with `masks`.
        epochs, train_batch_size, lr, weight_decay: of the head.
        seeds: of the order and the head's first weights; from 2 on the deviation is given.

    Returns:
        `percent`: miou, dice (of the whole split), dice_by_image (mean over images of the mean over
        classes that occur in them), pixel_accuracy; of several seeds `sd_percent`; `classes` with
        each class's IoU and Dice of the last seed; and the `protocol`.

    Raises:
        ValueError: data without masks, or a network without a map of more than one pixel.
        RuntimeError: the backbone changes meanwhile.

    Memory: maps of the training split, if they take at most 1 GiB, else they are computed again in
        every epoch.

    Notes: under torchrun every rank computes all of it.

    Example:
        >>> from fastssl.data import ShapesSource
        >>> from fastssl.evaluate import evaluate
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten())
        >>> data = [ShapesSource("shapes", split, size=32) for split in ("train", "test")]
        >>> found = evaluate(net, data, ["segmentation"], epochs=1)["segmentation"]
        >>> sorted(found["percent"])
        ['dice', 'dice_by_image', 'miou', 'pixel_accuracy']

    Paper: the linear protocol of DINOv2, arXiv 2304.07193, and BEiT's data handling; 40,000 steps
    of 16 crops of 512 pixels there.
    """
    for split in (task.train, task.test):
        if not hasattr(split.source, "masks"):
            raise ValueError(
                f"segmentation: data must have masks, got {split.source.name!r} without. Use "
                "shapes, a folder with --masks, or a source with masks(index)."
            )
    if epochs < 1 or train_batch_size < 1:
        raise ValueError(
            "segmentation: epochs and train_batch_size must be at least 1, got "
            f"{epochs} and {train_batch_size}."
        )
    net = FeatureMap(task.network.backbone).to(task.device)
    last = {}

    def once(seed: int) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]), frozen(net):
            torch.manual_seed(seed)
            head, last["classes"] = _train(
                task, net, epochs, min(train_batch_size, len(task.train)), lr, weight_decay, seed
            )
            scores, by_image = _score(task, net, head, last["classes"])
        names = getattr(task.test.source, "mask_names", None)
        found = scores.scores(names)
        last["found"] = {key: found[key] for key in ("iou_by_class", "dice_by_class", "absent")}
        percent = {key: 100 * found[key] for key in ("miou", "dice", "pixel_accuracy")}
        return percent | {"dice_by_image": 100 * by_image}

    found = over_seeds(once, seeds)
    result = {"percent": found["mean"], "classes": last["found"]}
    if "sd" in found:
        result |= {"sd_percent": found["sd"], "percent_by_seed": found["each"]}
    protocol = {
        "head": "BatchNorm and 1 x 1 convolution on the last map",
        "logits": "enlarged bilinearly to the masks",
        "loss": f"cross-entropy without pixels of {IGNORED}",
        "optimizer": "AdamW, constant rate",
        "lr": lr,
        "weight_decay": weight_decay,
        "epochs": epochs,
        "epoch": "last",
        "batch_size": min(train_batch_size, len(task.train)),
        "augmentation": "none",
        "classes": last["classes"],
        "seeds": seeds,
    }
    return result | {"protocol": protocol}


def _train(
    task: Task, net: nn.Module, epochs: int, batch_size: int, lr: float, decay: float, seed: int
) -> tuple[nn.Module, int]:
    """The head after the last epoch, and the number of classes."""
    split, kept, head, optimizer = task.train, {}, None, None
    parts = split.index.split(task.batch_size)
    classes = 1 + max(_largest(split.source.masks(index)) for index in parts)
    for epoch in range(epochs):
        for batch in epoch_order(len(split), batch_size, seed=seed, epoch=epoch):
            maps = _maps(task, net, split, batch, kept)
            masks = split.source.masks(split.index[batch]).to(task.device)
            if head is None:
                width = maps.shape[1]
                head = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1))
                head.to(task.device)
                optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=decay)
            with torch.enable_grad():
                loss = F.cross_entropy(_enlarged(head(maps), masks), masks, ignore_index=IGNORED)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
    return head.eval(), classes


def _score(task: Task, net: nn.Module, head: nn.Module, classes: int) -> tuple:
    """One matrix of the whole test split, and the mean over images of their mean Dice."""
    matrix, dice = ConfusionMatrix(classes, IGNORED), []
    for positions in torch.arange(len(task.test)).split(task.batch_size):
        maps = _maps(task, net, task.test, positions, {})
        masks = task.test.source.masks(task.test.index[positions]).to(task.device)
        predicted = _enlarged(head(maps), masks).argmax(1)
        matrix.update(predicted, masks)
        for p, m in zip(predicted, masks, strict=True):
            if (m != IGNORED).any():
                one = ConfusionMatrix(classes, IGNORED)
                one.update(p, m)
                dice.append(one.scores()["dice"])
    return matrix, sum(dice) / max(1, len(dice))


def _maps(task: Task, net: nn.Module, split: Split, positions: Tensor, kept: dict) -> Tensor:
    """Maps (B, D, h, w) of images by position; small ones are kept for the next epoch."""
    missing = [i for i in positions.tolist() if i not in kept]
    found = {}
    if missing:
        images, _ = split.source.batch(split.index[missing])
        maps = net(task.inputs(images).to(task.device)).float()
        found = dict(zip(missing, maps, strict=True))
        if maps[0].nbytes * len(split) <= _KEPT_BYTES:
            kept.update(found)
    return torch.stack([found[i] if i in found else kept[i] for i in positions.tolist()])


def _largest(masks: Tensor) -> int:
    labels = masks[masks != IGNORED]
    return int(labels.max()) if len(labels) else 0


def _enlarged(logits: Tensor, masks: Tensor) -> Tensor:
    return F.interpolate(logits, masks.shape[1:], mode="bilinear", align_corners=False)
