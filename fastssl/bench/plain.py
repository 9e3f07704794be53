"""What a method's kernels are measured against in whole steps: its views by torchvision, its loss
and its teacher's average in plain torch, of the same numbers."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..augment import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomResizedCrop,
    Solarize,
    View,
)
from ..methods.blocks import spread
from .augment import MEAN, STD
from .baselines import library
from .sigreg import published as published_sigreg
from .sinkhorn import published as published_codes


def torchvision_view(view: View):
    """The view by torchvision's transforms, of one image at a time."""
    T = library("torchvision.transforms.v2")
    crop = view.get(RandomResizedCrop)
    interpolation = T.InterpolationMode(crop.interpolation)
    steps = [T.RandomResizedCrop(crop.size, crop.scale, crop.ratio, interpolation, antialias=True)]
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
    return T.Compose([*steps, T.ToDtype(torch.float32, scale=True), T.Normalize(MEAN, STD)])


def make_plain(name: str, method: nn.Module) -> None:
    """Puts plain forms in the place of the method's kernels."""
    if name in LOSSES:
        LOSSES[name](method)
    if ema := getattr(method, "ema", None):
        ema.update = lambda: _average(ema)


@torch.no_grad()
def _average(ema: nn.Module) -> None:
    averages, values = (list(x.parameters()) for x in (ema.module, ema.model))
    get_ema_multi_avg_fn(ema.momentum)(averages, values, None)
    if ema.buffers_are == "copy":
        for copied, buffer in zip(ema.module.buffers(), ema.model.buffers(), strict=True):
            copied.copy_(buffer)


def _put(method: nn.Module, attribute: str, loss) -> None:
    delattr(method, attribute)  # a module gives way to modules only
    setattr(method, attribute, loss)


def _nt_xent(z: Tensor, temperature: float) -> Tensor:
    """z (2B, D), normalised, the views of an image B rows apart."""
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(logits, partner)


def _simclr(method: nn.Module) -> None:
    temperature = method.ntxent.temperature

    def loss(z0, z1):
        return _nt_xent(F.normalize(torch.cat([z0, z1]).float(), dim=1), temperature)

    _put(method, "ntxent", loss)


def _simclr_v2(method: nn.Module) -> None:
    def loss(batch):
        z = torch.cat([method.head(method.backbone(x)) for x in batch.views])
        z = F.normalize(z.float(), dim=1)
        return _nt_xent(z, method.temperature), {"std": spread(z[: len(batch.index)])}

    method.loss = loss


def _moco_v2(method: nn.Module) -> None:
    temperature = method.nce.temperature

    def loss(q, k, queue):
        # A clone, as in the released code, whose queue moves before the backward.
        positive, negative = (q * k).sum(1, keepdim=True), q @ queue.clone().T
        logits = torch.cat([positive, negative], 1) / temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))

    _put(method, "nce", loss)


def _moco_v3(method: nn.Module) -> None:
    temperature = method.nce.temperature

    def loss(q, k):
        q, k = (F.normalize(x.float(), dim=1) for x in (q, k))
        return F.cross_entropy(q @ k.T / temperature, torch.arange(len(q), device=q.device))

    loss.temperature = temperature
    _put(method, "nce", loss)


def _cross_entropies(q: Tensor, crops: list[Tensor], temperature: float) -> Tensor:
    """Mean over the pairs of other crops, of teachers q (A, B, K) and students' scores."""
    logs = [F.log_softmax(x.float() / temperature, dim=1) for x in crops]
    terms = [-(q[a] * x).sum(1).mean() for a in range(len(q)) for v, x in enumerate(logs) if v != a]
    return torch.stack(terms).mean()


def _swav(method: nn.Module) -> None:
    ours = method.swav

    def loss(high, low, queue):
        codes = []
        for a, scores in enumerate(high.detach()):
            every = scores if queue is None else torch.cat([queue[a], scores])
            every = published_codes(every, ours.sinkhorn_epsilon, ours.sinkhorn_iterations)
            codes.append(every[-len(scores) :])
        return _cross_entropies(codes, [*high, *low], ours.temperature)

    loss.temperature, loss.sinkhorn_epsilon = ours.temperature, ours.sinkhorn_epsilon
    _put(method, "swav", loss)


def _targets(ours: nn.Module, center: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Of a teacher's scores (N, K)."""
    if ours.centering == "sinkhorn":
        return published_codes(scores, temperature, ours.n_iters)
    return F.softmax((scores.float() - center.flatten()) / temperature, dim=1)


def _dino(method: nn.Module) -> None:
    ours = method.dino

    def loss(teacher, student, teacher_temp):
        teacher = torch.stack(list(teacher))
        t = _targets(ours, ours.center, teacher.flatten(0, 1), teacher_temp).view_as(teacher)
        if ours.centering == "mean":
            mean = teacher.float().mean((0, 1))
            ours.center.lerp_(mean.view_as(ours.center), 1 - ours.center_momentum)
        return _cross_entropies(t, list(student), ours.student_temp)

    loss.center, loss.student_temp = ours.center, ours.student_temp
    _put(method, "dino", loss)


def _dinov2(method: nn.Module) -> None:
    """With class tokens' centres by Sinkhorn-Knopp, as its default is."""
    ours = method.ibot

    def ibot(teacher, student, mask, teacher_temp):
        t = _targets(ours, ours.center.center, teacher, teacher_temp)
        s = F.log_softmax(student.float() / ours.student_temp, dim=1)
        weight = (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)[mask]
        return -((t * s).sum(1) * weight).sum() / len(mask)

    def koleo(x, eps=1e-8):
        x = F.normalize(x.float(), eps=eps, dim=1)
        nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)
        return -(F.pairwise_distance(x, x[nearest], eps=eps) + eps).log().mean()

    _dino(method)
    _put(method, "ibot", ibot)
    _put(method, "koleo", koleo)


def directions(D: int, slices: int, device: torch.device) -> Tensor:
    """(D, slices), drawn anew in each step, of unit length."""
    return F.normalize(torch.randn(D, slices, device=device), dim=0)


def _lejepa(method: nn.Module) -> None:
    slices = method.lejepa.sigreg.num_slices

    def terms(global_proj, local_proj=None):
        every = global_proj if local_proj is None else torch.cat([global_proj, local_proj])
        every = every.float()
        invariance = (global_proj.float().mean(0) - every).square().mean()
        return invariance, published_sigreg(every, directions(every.shape[2], slices, every.device))

    _put(method, "lejepa", SimpleNamespace(terms=terms))


def _vicreg(method: nn.Module) -> None:
    ours = method.vicreg

    def loss(z0, z1):
        z0, z1 = z0.float(), z1.float()
        total = ours.lambda_param * F.mse_loss(z0, z1)
        for z in (z0, z1):
            z = z - z.mean(0)
            N, D = z.shape
            std = (z.var(0) + ours.eps).sqrt()
            covariance = ((z.T @ z).float() / (N - 1)).fill_diagonal_(0)
            total = total + ours.mu_param * F.relu(1 - std).mean() / 2
            total = total + ours.nu_param * covariance.square().sum() / D
        return total

    _put(method, "vicreg", loss)


def _barlow(method: nn.Module) -> None:
    lam = method.barlow_twins.lambda_param

    def loss(z0, z1):
        z0, z1 = (F.batch_norm(z.float(), None, None, training=True) for z in (z0, z1))
        C = (z0.T @ z1).float() / len(z0)
        off = C.square().fill_diagonal_(0)
        return (C.diagonal() - 1).square().sum() + lam * off.sum()

    _put(method, "barlow_twins", loss)


LOSSES = {
    "simclr": _simclr,
    "simclr_v2": _simclr_v2,
    "moco_v2": _moco_v2,
    "moco_v3": _moco_v3,
    "swav": _swav,
    "seer": _swav,
    "dino": _dino,
    "dinov2": _dinov2,
    "lejepa": _lejepa,
    "vicreg": _vicreg,
    "barlow": _barlow,
}
"""What puts a plain loss in the place of a method's. The others' losses are plain themselves."""
