"""Distill: a student learns on all images what a teacher, fine-tuned on few labels, says of them.

Paper: Chen, Kornblith, Swersky, Norouzi, Hinton, "Big self-supervised models are strong
semi-supervised learners", arXiv 2006.10029 (SimCLRv2's third step).

Loss: the cross-entropy of the teacher's classes with the student's, of one view of each image:
-sum over y of P_T(y | x) log P_S(y | x), each P the softmax of class scores / temperature, the mean
over the images. With alpha < 1 it is alpha of that and 1 - alpha of -log P_S(label | x) without a
temperature, in which images without a label count as 0.

Figures: ImageNet, top-1 of a ResNet-50 distilled from ResNet-152, three times as wide, with
selective kernels and fine-tuned on 1 % of the labels 73.9, on 10 % 77.5 [secondary].

What differs: views are crops and, where it means the same, the mirror image, of any size. The
student begins at random weights, or where `init_from` says.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..augment import HorizontalFlip, Normalize, RandomResizedCrop, View
from ..data import Batch
from ..models import load_classifier
from ..ops import prototype_cross_entropy
from .blocks import spread


class Distill(nn.Module):
    """Args:
    backbone: the student's f, (B, C, s, s) to (B, backbone.feature_dim).
    teacher: file that fine-tuning saved (`evaluate RUN --protocol finetune --save FILE`).
    temperature: of both softmaxes.
    alpha: weight of the teacher's classes; the rest is that of the labels.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        teacher: Path | None = None,
        temperature: float = 1.0,
        alpha: float = 1.0,
    ):
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"distill: alpha must be in [0, 1], got {alpha}.")
        if not teacher:
            raise ValueError(
                "distill: teacher must be a file that fine-tuning saved, got none. Make one with: "
                "fastssl evaluate RUN --protocol finetune --save FILE."
            )
        self.backbone = backbone
        classifier, self.known = load_classifier(teacher)
        self.teacher = classifier.requires_grad_(False)
        num_classes = self.teacher.head.out_features
        self.classifier = nn.Linear(backbone.feature_dim, num_classes)
        self.temperature, self.alpha = temperature, alpha

    def train(self, mode: bool = True) -> "Distill":
        super().train(mode)
        self.teacher.eval()
        return self

    def views(self, image_size: int, source) -> list[View]:
        channels, classes = int(self.known["channels"]), self.classifier.out_features
        if channels != source.channels or (self.alpha < 1 and classes != source.num_classes):
            raise ValueError(
                f"distill: teacher must be of images like those of {source.name}, with "
                f"{source.channels} channels, and with alpha below 1 of its {source.num_classes} "
                f"classes, got one of {channels} channels and {classes} classes."
            )
        flip = (HorizontalFlip(),) if source.mirror else ()
        return [View(RandomResizedCrop(image_size), *flip, Normalize())]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        (x,) = batch.views  # one view for both
        with torch.no_grad():
            t = self.teacher(x)  # (B, classes)
        h = self.backbone(x)
        s = self.classifier(h)
        loss = self.alpha * prototype_cross_entropy(
            s, t, student_temperature=self.temperature, teacher_temperature=self.temperature
        )  # eq. 2
        if self.alpha < 1:  # eq. 3
            labelled = batch.label >= 0
            label = F.one_hot(batch.label.clamp(min=0), s.shape[1]).to(s)
            loss = loss + (1 - self.alpha) * prototype_cross_entropy(
                s, label, student_temperature=1.0, teacher_temperature=2.0**-10,
                sample_weight=labelled.to(s),
            )  # fmt: skip
        agreement = (s.argmax(1) == t.argmax(1)).float().mean()
        return loss, {"std": spread(h), "agreement": agreement}

    def after_step(self, step: int, total_steps: int) -> None:
        """Nothing moves besides the weights."""

    def features(self, x: Tensor) -> Tensor:
        """h = f(x), (B, feature_dim): the representation below the student's classifier."""
        return self.backbone(x)
