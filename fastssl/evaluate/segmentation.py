"""Scores of label maps, from one confusion matrix gathered over batches."""

from collections.abc import Sequence

import torch
from torch import Tensor


class ConfusionMatrix:
    """Counts of (target, predicted) pixels over any number of batches, and the scores they give.

        IoU_c = TP / (TP + FP + FN),  Dice_c = 2 TP / (2 TP + FP + FN)

    Args:
        num_classes: C >= 1.
        ignore_index: target value of pixels that do not count; None if all do.

    Raises:
        ValueError: num_classes < 1.

    Memory: `counts`, (C, C) int64, rows are targets; exact. Sum it over ranks for all of them.

    Notes: Dice is of the whole data set, as IoU; it is not the mean of Dice over images.

    Example:
        >>> matrix = ConfusionMatrix(2)
        >>> matrix.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 255]]))
        >>> matrix.scores()["miou"]
        1.0
    """

    def __init__(self, num_classes: int, ignore_index: int | None = 255):
        if num_classes < 1:
            raise ValueError(f"ConfusionMatrix: num_classes must be >= 1, got {num_classes}.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Count a batch of label maps.

        Args:
            predicted, target: integers of one shape, (B, H, W) or any other, in [0, C); target may
                also be `ignore_index`, and what is predicted there does not matter.

        Raises:
            ValueError: differing shapes, floating point, or a label out of range.
        """
        if predicted.shape != target.shape:
            raise ValueError(
                f"ConfusionMatrix: predicted must have target's shape {tuple(target.shape)}, "
                f"got {tuple(predicted.shape)}. Pass logits.argmax(1) at the target's resolution."
            )
        if self.ignore_index is not None:
            counted = target != self.ignore_index
            predicted, target = predicted[counted], target[counted]
        predicted, target = self._labels("predicted", predicted), self._labels("target", target)
        counts = (target * self.num_classes + predicted).bincount(minlength=self.counts.numel())
        self.counts = self.counts.to(counts.device) + counts.view_as(self.counts)

    def scores(self, names: Sequence[str] | None = None) -> dict:
        """All scores in [0, 1]; means are over the classes that occur in targets or predictions.

        Args:
            names: of the classes; by default their numbers.

        Returns:
            `miou`, `dice`, `pixel_accuracy`, `iou_by_class` and `dice_by_class`, and the `absent`
            classes.

        Raises:
            ValueError: nothing counted yet, or names of another number of classes.
        """
        names = [str(c) for c in range(self.num_classes)] if names is None else list(names)
        if len(names) != self.num_classes:
            raise ValueError(
                f"ConfusionMatrix: names must have one for each of {self.num_classes} classes, "
                f"got {len(names)}."
            )
        if not self.counts.any():
            raise ValueError(
                "ConfusionMatrix: scores need at least one counted pixel, got none. Call update "
                "first; pixels of ignore_index do not count."
            )
        right = self.counts.diagonal().double()
        both = (self.counts.sum(0) + self.counts.sum(1)).double()  # 2 TP + FP + FN
        present = both > 0
        iou, dice = (right / (both - right))[present], (2 * right / both)[present]
        found = [name for name, here in zip(names, present.tolist(), strict=True) if here]
        return {
            "miou": iou.mean().item(),
            "dice": dice.mean().item(),
            "pixel_accuracy": (right.sum() / self.counts.sum()).item(),
            "iou_by_class": dict(zip(found, iou.tolist(), strict=True)),
            "dice_by_class": dict(zip(found, dice.tolist(), strict=True)),
            "absent": [name for name in names if name not in found],
        }

    def _labels(self, name: str, labels: Tensor) -> Tensor:
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"ConfusionMatrix: {name} must be integers, got {labels.dtype}.")
        labels = labels.flatten().long()
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(
                f"ConfusionMatrix: {name} must be in [0, {self.num_classes}), got "
                f"{wrong[0].item()} in {len(wrong)} pixels. Set num_classes or ignore_index."
            )
        return labels
