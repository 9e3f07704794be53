"""A whole training step, from stored images to new weights: with our kernels, and with the same
method's losses, views and optimizer as plain torch would have them."""

import functools
import time
from types import MethodType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from ..augment import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomResizedCrop,
    Solarize,
    View,
    augment,
)
from ..data import Batch
from ..methods import method_class
from ..models import build_backbone
from ..models.tokens import encode_tokens
from ..optim import AdamW8bit
from .baselines import add, library
from .measure import Work
from .sigreg import published as published_sigreg
from .sinkhorn import published as published_codes

BACKBONES = ("torchvision:resnet50", "timm:vit_small_patch16_224", "timm:vit_base_patch16_224")
# Prototypes and queues as in the papers.
METHODS = {
    "simclr": {},
    "moco_v2": {},
    "swav": {"freeze_steps": 0},
    "dino": {"freeze_epochs": 0.0},
    "lejepa": {},
    "mae": {},
}
PATCHES_ONLY = ("mae",)
SIZES = {
    device: {
        name: [
            {"backbone": backbone, "B": B}
            for backbone in BACKBONES
            if name not in PATCHES_ONLY or "vit" in backbone
        ]
        for name in METHODS
    }
    for device, B in (("cpu", 8), ("cuda", 128))
}
DTYPES = {name: ["float32"] for name in METHODS}
if torch.cuda.is_available():
    DTYPES = {name: ["bfloat16"] for name in METHODS}  # autocast
SCALING: list = []
PARTS = ("data", "augmentation", "encoder", "heads and loss", "backward", "optimizer")


def work(case: str, dtype: str, backbone: str, B: int) -> Work:
    return Work()


def make(case: str, dtype: str, device: str, backbone: str, B: int) -> tuple[dict, list[str]]:
    """Providers, each a step; they return nothing to compare, since their views differ."""
    size = 224
    source = stored_images(4 * B, 256, device)
    return step_providers(case, METHODS[case], backbone, source, size, B, dtype, device)


def details(case: str, providers: dict, medians_ms: dict, device: str, B: int, **sizes) -> dict:
    """Images a second, what each part of the step takes, and on a GPU the largest batch."""
    found: dict = {
        "images_per_s": {name: 1e3 * B / ms for name, ms in medians_ms.items()},
        "parts_percent": {name: providers[name].parts() for name in medians_ms},
    }
    if device == "cuda":
        found["largest_batch"] = {name: providers[name].largest_batch() for name in medians_ms}
    return found


def step_providers(
    name: str, arguments: dict, backbone: str, source, size: int, B: int, dtype: str, device: str
) -> tuple[dict, list[str]]:
    """By name, and the absent: ours; plain losses, torch's fused AdamW and torchvision's views; the
    same with our views, of which alone the difference may come."""
    found, absent = {}, []
    kinds = {"ours": (False, False), "eager": (True, True), "eager, our views": (True, False)}
    for provider, eager in kinds.items():
        arguments_of_step = (name, arguments, backbone, source, size, B, dtype, device, *eager)
        add(found, absent, provider, functools.partial(Step, *arguments_of_step))
    return found, absent


def stored_images(count: int, size: int, device: str) -> SimpleNamespace:
    """uint8 images with labels, and what a method asks of its data."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, size // 8, size // 8, generator=generator)
    images = F.interpolate(coarse, (size, size), mode="bilinear").mul(255).byte().to(device)
    labels = torch.arange(count, device=device) % 10
    return SimpleNamespace(
        images=images, labels=labels, channels=3, mirror=True, num_classes=10, image_size=size,
        name="noise",
    )  # fmt: skip


class Step:
    """A method, its views and its optimizer; a call is a step."""

    def __init__(
        self, name, arguments, backbone, source, size, B, dtype, device,
        eager: bool, eager_views: bool,
    ):  # fmt: skip
        torch.manual_seed(0)
        network = build_backbone(backbone, 3, size)
        method = method_class(name)(network, **arguments)
        self.views = method.views(size, source)
        self.method = method.to(device, memory_format=torch.channels_last).train()
        self.source, self.B, self.device, self.eager_views = source, B, device, eager_views
        self.dtype = getattr(torch, dtype)
        self.count, self.spent = 0, None
        parameters = [p for p in method.parameters() if p.requires_grad]
        if eager_views:
            self.transforms = [_torchvision(view) for view in self.views]
        if eager:
            if name in EAGER:
                EAGER[name](method)
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        else:
            self.optimizer = AdamW8bit(parameters, lr=1e-5)
        self._time_encoders()

    def __call__(self) -> tuple:
        B, method = self.B, self.method
        first = self.count * B % (len(self.source.images) - B + 1)
        with self._part("data"):
            index = torch.arange(first, first + B, device=self.device)
            images, labels = self.source.images[index], self.source.labels[index]
        with self._part("augmentation"):
            if self.eager_views:
                views = [torch.stack([t(x) for x in images]) for t in self.transforms]
            else:
                views = augment(
                    images, index, self.views, seed=0, epoch=self.count, channels_last=True
                )
        batch = Batch(views, index, labels, self.count, 10**6, float(self.count))
        half = self.dtype != torch.float32
        with self._part("heads and loss"):
            with torch.autocast(self.device, self.dtype, enabled=half):
                loss, _ = method.loss(batch)
        with self._part("backward"):
            loss.backward()
        with self._part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            method.after_step(self.count + 1, 10**6)
        self.count += 1
        return ()

    def parts(self, steps: int = 3) -> dict[str, float]:
        """What share of a step each part takes, in percent; on a GPU each is waited for."""
        self.spent = dict.fromkeys(PARTS, 0.0)
        for _ in range(steps):
            self()
        spent, self.spent = self.spent, None
        spent["heads and loss"] -= spent["encoder"]
        whole = sum(spent.values())
        return {part: round(100 * seconds / whole, 1) for part, seconds in spent.items()}

    def largest_batch(self) -> int:
        """The largest power of two, from that of the case, of which a step fits into memory."""
        own, largest = self.B, 0
        images = self.source
        try:
            while True:
                self.source = stored_images(self.B, images.image_size, self.device)
                self()
                largest, self.B = self.B, 2 * self.B
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        finally:
            self.B, self.source = own, images
        return largest

    def _part(self, name: str) -> "_Part":
        return _Part(self, name)

    def _time_encoders(self) -> None:
        """The backbone's part of the forward, and a teacher's, by whatever way it is entered."""
        teacher = getattr(self.method, "teacher", None)
        networks = [self.method.backbone]
        if teacher is not None:
            networks.append(getattr(teacher, "backbone", teacher))
        for network in networks:
            tokens = MethodType(encode_tokens, network)
            for name, function in (("forward", network.forward), ("encode_tokens", tokens)):
                setattr(network, name, self._timed_as_encoder(function))

    def _timed_as_encoder(self, function):
        def forward(*args, **kwargs):
            with self._part("encoder"):
                return function(*args, **kwargs)

        return forward


class _Part:
    """Adds the time spent inside to a step's parts, while these are wanted."""

    def __init__(self, step: Step, name: str):
        self.step, self.name = step, name

    def __enter__(self) -> None:
        self.started = self._now()

    def __exit__(self, *_) -> None:
        if self.step.spent is not None:
            self.step.spent[self.name] += self._now() - self.started

    def _now(self) -> float:
        if self.step.spent is not None and self.step.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


# --------------------------------------------------------------------------- in plain torch


def _torchvision(view: View):
    """The view by torchvision's transforms, of one image at a time."""
    T = library("torchvision.transforms.v2")
    crop = view.get(RandomResizedCrop)
    steps = [T.RandomResizedCrop(crop.size, crop.scale, crop.ratio, antialias=True)]
    if flip := view.get(HorizontalFlip):
        steps.append(T.RandomHorizontalFlip(flip.p))
    if jitter := view.get(ColorJitter):
        ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
        steps.append(T.RandomApply([T.ColorJitter(*ranges)], p=jitter.p))
    if grey := view.get(Grayscale):
        steps.append(T.RandomGrayscale(grey.p))
    if blur := view.get(GaussianBlur):
        taps = 2 * max(1, view.size // 20) + 1
        steps.append(T.RandomApply([T.GaussianBlur(taps, blur.sigma)], p=blur.p))
    if solarize := view.get(Solarize):
        steps.append(T.RandomSolarize(255 * solarize.threshold, solarize.p))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return T.Compose([*steps, T.ToDtype(torch.float32, scale=True), T.Normalize(mean, std)])


def _nt_xent(method: nn.Module) -> None:
    temperature = method.ntxent.temperature

    def loss(z0, z1):
        z = F.normalize(torch.cat([z0, z1]).float(), dim=1)
        logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        partner = torch.arange(len(z), device=z.device).roll(len(z0))
        return F.cross_entropy(logits, partner)

    del method.ntxent
    method.ntxent = loss


def _moco(method: nn.Module) -> None:
    temperature = method.nce.temperature

    def loss(q, k, queue):
        positive, negative = (q * k).sum(1, keepdim=True), q @ queue.clone().T
        logits = torch.cat([positive, negative], 1) / temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))

    del method.nce
    method.nce = loss


def _swav(method: nn.Module) -> None:
    temperature, epsilon = method.swav.temperature, method.swav.sinkhorn_epsilon

    def loss(high, low, queue):
        crops, terms = [*high, *low], []
        for a, scores in enumerate(high):
            every = scores.detach() if queue is None else torch.cat([queue[a], scores.detach()])
            q = published_codes(every, epsilon)[-len(scores) :]
            others = [x for v, x in enumerate(crops) if v != a]
            terms += [
                -(q * F.log_softmax(x.float() / temperature, 1)).sum(1).mean() for x in others
            ]
        return torch.stack(terms).mean()

    loss.temperature, loss.sinkhorn_epsilon = temperature, epsilon
    del method.swav
    method.swav = loss


def _dino(method: nn.Module) -> None:
    ours = method.dino

    def loss(teacher, student, teacher_temp):
        if ours.centering == "sinkhorn":
            t = published_codes(teacher.flatten(0, 1), teacher_temp).view_as(teacher)
        else:
            t = F.softmax((teacher.float() - ours.center.flatten()) / teacher_temp, dim=2)
            ours.update_center(teacher)
        s = [F.log_softmax(x.float() / ours.student_temp, dim=1) for x in student]
        terms = [
            -(t[a] * x).sum(1).mean() for a in range(len(t)) for v, x in enumerate(s) if v != a
        ]
        return torch.stack(terms).mean()

    loss.center, loss.student_temp = ours.center, ours.student_temp
    del method.dino
    method.dino = loss


def _lejepa(method: nn.Module) -> None:
    slices = method.lejepa.sigreg.num_slices

    def terms(global_proj, local_proj=None):
        every = global_proj if local_proj is None else torch.cat([global_proj, local_proj])
        every = every.float()
        directions = F.normalize(torch.randn(every.shape[2], slices, device=every.device), dim=0)
        invariance = (global_proj.float().mean(0) - every).square().mean()
        return invariance, published_sigreg(every, directions)

    del method.lejepa
    method.lejepa = SimpleNamespace(terms=terms)


def _lightly(attribute: str, name: str):
    def swap(method: nn.Module) -> None:
        setattr(method, attribute, getattr(library("lightly.loss"), name)())

    return swap


EAGER = {
    "simclr": _nt_xent,
    "moco_v2": _moco,
    "swav": _swav,
    "dino": _dino,
    "lejepa": _lejepa,
    "vicreg": _lightly("vicreg", "VICRegLoss"),
    "barlow": _lightly("barlow", "BarlowTwinsLoss"),
}
"""What puts a plain loss in the place of a method's. The others' losses stay: most are plain."""
