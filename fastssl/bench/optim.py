"""AdamW's step with 8-bit states against torch's fused one in float32 and other 8-bit ones; moving
averages of weights against torch.optim.swa_utils."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..optim import EMA, AdamW8bit
from .baselines import add, library
from .measure import Work

VIT_B = 85_798_656
# Of ViT-B's blocks: 12 times the shapes below, beside embeddings and a final normalisation.
BLOCK = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072)] + [(768,)] * 5
_AVERAGES = {"ema_1000_tensors": [{"N": 1_000_000}], "ema_vit_b": [{"N": VIT_B}]}
SIZES = {
    "cpu": {
        "adamw8bit": [{"N": 10_000_000}, {"N": 50_000_000}],
        "adamw8bit_vit_b": [{"N": VIT_B}],
        **_AVERAGES,
    },
    "cuda": {
        "adamw8bit": [{"N": 10_000_000}, {"N": 1_000_000_000}],
        "adamw8bit_vit_b": [{"N": VIT_B}],
        **_AVERAGES,
    },
}
DTYPES = {case: ["float32", "bfloat16"] for case in SIZES["cpu"]}
SCALING = [("adamw8bit", "N", (4_000_000, 8_000_000, 16_000_000, 32_000_000), {}, 1)]


def work(case: str, dtype: str, N: int) -> Work:
    item = getattr(torch, dtype).itemsize
    if case.startswith("ema"):
        return Work(traffic=N * 3 * item)  # averages read and written, weights read
    # Parameters read and written, gradients read, two codes and their maxima read and written.
    return Work(traffic=N * (3 * item + 4 + 16 / 256))


def shapes(case: str, N: int) -> list[tuple[int, ...]]:
    if case == "adamw8bit" or N < 768:  # so few are there to warm up
        return [(N,)]
    if case == "ema_1000_tensors":
        return [(N // 1000,)] * 1000
    return [(1, 1, 768), (197, 768), (768, 3, 16, 16), (768,), *BLOCK * 12, (768,), (768,)]


def make(case: str, dtype: str, device: str, N: int) -> tuple[dict, list[str]]:
    """Providers by name, and the absent: each does a step and gives some of the parameters."""
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    all_shapes = shapes(case, N)
    start = [torch.randn(s, **random) for s in all_shapes]
    own = getattr(torch, dtype)
    if case.startswith("ema"):
        return _averages(start, own, device), []
    slopes = [torch.randn(s, **random).mul_(0.01) for s in all_shapes]

    def provider(optimizer, dtype, **options):
        parameters = [nn.Parameter(p.to(device, dtype, copy=True)) for p in start]
        for p, g in zip(parameters, slopes, strict=True):
            p.grad = g.to(device, dtype)
        optimizer = optimizer(parameters, lr=1e-3, weight_decay=0.05, **options)

        def step():
            optimizer.step()
            return (parameters[-1].detach()[:1000].clone(),)

        return step

    found, absent = {}, []
    found["ours"] = provider(AdamW8bit, own)
    found["torch fused float32"] = provider(torch.optim.AdamW, torch.float32, fused=True)
    others = {
        "bitsandbytes": lambda: provider(library("bitsandbytes.optim").AdamW8bit, own),
        "torchao": lambda: provider(library("torchao.optim").AdamW8bit, own),
    }
    if device == "cuda":
        others["apex"] = lambda: provider(library("apex.optimizers").FusedAdam, torch.float32)
    for name, build in others.items():
        add(found, absent, name, build)
    return found, absent


def _averages(start: list[torch.Tensor], dtype: torch.dtype, device: str) -> dict:
    model = nn.ParameterList(nn.Parameter(p.to(device, dtype)) for p in start)
    ours, theirs = EMA(model, 0.99), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    theirs.update_parameters(model)  # the first copies

    def provider(average, update):
        weights = [p.detach().zero_() for p in average.parameters()]

        def step():
            update()
            return (weights[-1].flatten()[:1000].clone(),)

        return step

    return {
        "ours": provider(ours.module, ours.update),
        "torch swa_utils": provider(theirs.module, lambda: theirs.update_parameters(model)),
    }
