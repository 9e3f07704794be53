"""A whole training step, from stored images to new weights: with our kernels, and with the same
method's losses, averages, views and optimizer as plain torch has them."""

import copy
import functools
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from ..augment import augment
from ..data import Batch
from ..methods import method_class
from ..models import build_backbone
from ..models.tokens import encode_tokens
from ..optim import AdamW8bit
from .baselines import add, library
from .measure import Work
from .plain import make_plain, torchvision_view

BACKBONES = {  # with the batches by device; a CPU does all of it in a quarter of an hour
    "torchvision:resnet50": {"cpu": 4, "cuda": 128},
    "timm:vit_small_patch16_224": {"cpu": 4, "cuda": 128},
    "timm:vit_base_patch16_224": {"cpu": 2, "cuda": 128},
}
METHODS = {  # prototypes and queues as in the papers
    "simclr": {},
    "moco_v2": {},
    "swav": {},
    "dino": {},
    "lejepa": {"local_size": 96},  # a multiple of the patches
    "mae": {},
}
PATCHES_ONLY = ("mae",)
SIZES = {
    device: {
        name: [
            {"backbone": backbone, "B": B[device]}
            for backbone, B in BACKBONES.items()
            if name not in PATCHES_ONLY or "vit" in backbone
        ]
        for name in METHODS
    }
    for device in ("cpu", "cuda")
}
DTYPES = {name: ["float32"] for name in METHODS}
if torch.cuda.is_available():
    DTYPES = {name: ["bfloat16"] for name in METHODS}  # autocast
SCALING: list = []
PARTS = ("data", "augmentation", "encoder", "heads and loss", "backward", "optimizer")
SEARCH_S = 10
"""Seconds for a provider's largest batch, after its first step."""
STEPS_BEFORE, STEPS_PER_EPOCH = 10_000, 100
"""In the midst of a run: queues take part, nothing is held still any more."""


def work(case: str, dtype: str, backbone: str, B: int) -> Work:
    return Work()


def make(case: str, dtype: str, device: str, backbone: str, B: int) -> tuple[dict, list[str]]:
    """Providers, each a step; they return nothing to compare, since their views differ."""
    size = 224
    source = stored_images(4 * B, 256, device)
    return step_providers(case, METHODS[case], backbone, source, size, B, dtype, device)


def details(case: str, providers: dict, medians_ms: dict, device: str, B: int, **sizes) -> dict:
    """Images a second, what each part of the step takes, MiB of weights and states that stay from
    step to step, and on a GPU the largest batch."""
    found: dict = {
        "images_per_s": {name: 1e3 * B / ms for name, ms in medians_ms.items()},
        "parts_percent": {name: providers[name].parts() for name in medians_ms},
        "held_mib": {name: providers[name].held_mib() for name in medians_ms},
    }
    if device == "cuda":
        for step in providers.values():
            step.forget()  # each has the memory to itself
        searched = {name: providers[name].largest_batch() for name in medians_ms}
        found["largest_batch"] = {name: B for name, (B, _) in searched.items()}
        found["larger_not_tried"] = [name for name, (_, at_end) in searched.items() if not at_end]
    return found


def step_providers(
    name: str, arguments: dict, backbone: str, source, size: int, B: int, dtype: str, device: str
) -> tuple[dict, list[str]]:
    """By name, and the absent: ours; plain losses and averages, torch's fused AdamW and
    torchvision's views; the same with our views, of which alone the difference may come."""

    def build(eager: bool, eager_views: bool) -> Step:
        if eager_views:
            library("torchvision.transforms.v2")
        return Step(name, arguments, backbone, source, size, B, dtype, device, eager, eager_views)

    found, absent = {}, []
    kinds = {"ours": (False, False), "eager": (True, True), "eager, our views": (True, False)}
    for provider, eager in kinds.items():
        add(found, absent, provider, functools.partial(build, *eager))
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
    """A method, its views and its optimizer; a call is a step. The first call builds them, so that
    a process which measures one has the memory of one."""

    method: nn.Module | None = None

    def __init__(
        self, name: str, arguments: dict, backbone: str, source, size: int, B: int, dtype: str,
        device: str, eager: bool, eager_views: bool,
    ):  # fmt: skip
        self.name, self.arguments, self.backbone, self.size = name, arguments, backbone, size
        self.source, self.B, self.device = source, B, device
        self.dtype = getattr(torch, dtype)
        self.eager, self.eager_views = eager, eager_views
        self.calls: list[list[tuple]] = []

    def build(self) -> None:
        torch.manual_seed(0)
        network = build_backbone(self.backbone, 3, self.size)
        method = method_class(self.name)(network, **self.arguments)
        self.views = method.views(self.size, self.source)
        self.method = method.to(self.device, memory_format=torch.channels_last).train()
        parameters = [p for p in method.parameters() if p.requires_grad]
        if self.eager:
            make_plain(self.name, method)
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        else:
            self.optimizer = AdamW8bit(parameters, lr=1e-5)
        if self.eager_views:
            self.transforms = [torchvision_view(view) for view in self.views]
        self.count = STEPS_BEFORE
        self._time_encoders()

    def forget(self) -> None:
        """What the next call builds anew."""
        self.method = self.optimizer = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def __call__(self) -> tuple:
        self.backward()
        with self._part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.method.after_step(self.count + 1, 10**6)
        self.count += 1
        return ()

    def backward(self) -> torch.Tensor:
        """The loss of the next batch, with its gradients."""
        if self.method is None:
            self.build()
        self.calls.append([])
        batch = self._batch()
        half = self.dtype != torch.float32
        with self._part("heads and loss"):
            with torch.autocast(self.device, self.dtype, enabled=half):
                loss, _ = self.method.loss(batch)
        with self._part("backward"):
            loss.backward()
        return loss.detach()

    def _batch(self) -> Batch:
        with self._part("data"):
            first = self.count * self.B
            index = torch.arange(first, first + self.B, device=self.device)
            index %= len(self.source.images)
            images, labels = self.source.images[index], self.source.labels[index]
        with self._part("augmentation"):
            if self.eager_views:
                views = [torch.stack([t(x) for x in images]) for t in self.transforms]
                views = [x.contiguous(memory_format=torch.channels_last) for x in views]
            else:
                views = augment(
                    images, index, self.views, seed=0, epoch=self.count, channels_last=True
                )
        return Batch(views, index, labels, self.count, 10**6, self.count / STEPS_PER_EPOCH)

    def parts(self) -> dict[str, float]:
        """What share of a step each part takes, in percent, over all calls but the first."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        spent = dict.fromkeys(PARTS, 0.0)
        for call in self.calls[1:] or self.calls:
            for part, start, end in call:
                spent[part] += end - start if self.device == "cpu" else start.elapsed_time(end)
        spent["heads and loss"] -= spent["encoder"]
        whole = sum(spent.values())
        return {part: 100 * each / whole for part, each in spent.items()}

    def held_mib(self) -> float:
        """Of weights, teachers, queues and the optimizer's states."""
        tensors = [*self.method.parameters(), *self.method.buffers()]
        for state in self.optimizer.state.values():
            tensors += [x for x in state.values() if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        return sum(storage.nbytes() for storage in storages.values()) / 2**20

    def largest_batch(self) -> tuple[int, bool]:
        """The largest, of that of the case and its doubles, of which a step fits into memory; and
        whether the next was found not to, or the time for more was over."""
        step, largest = copy.copy(self), 0
        step.eager_views = False  # of the same size, and made faster
        at_end, begun, now = False, None, 0.0
        try:
            # The next takes about as long as all before it, but for the first, which builds.
            while begun is None or now - begun <= SEARCH_S / 2:
                step()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                now = time.perf_counter()
                begun = begun or now
                largest, step.B = step.B, 2 * step.B
        except RuntimeError:  # out of memory, or of what a library's indices of 32 bits count
            if not largest:
                raise
            at_end = True
        step.forget()  # only now: the error holds tensors
        return largest, at_end

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.calls[-1].append((name, start, self._now()))

    def _now(self):
        """Seconds; on a GPU an event, for which nothing waits."""
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

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
