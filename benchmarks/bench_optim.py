"""AdamW's step with 8-bit states against torch's fused one in float32, and bitsandbytes'; moving
averages of weights against torch's foreach."""

import harness
import pytest
import torch

from fastssl.optim import AdamW8bit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of ViT-B's blocks: 12 times the shapes below, beside embeddings and a final normalisation.
BLOCK = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072)] + [(768,)] * 5
SIZES = {
    "adamw8bit": {"cpu": [10_000_000, 50_000_000], "cuda": [10_000_000, 1_000_000_000]},
    "adamw8bit_vit_b": {"cpu": [85_798_656], "cuda": [85_798_656]},
}
CASES = [(case, N) for case, sizes in SIZES.items() for N in sizes[DEVICE]]
AVERAGES = [("ema_1000_tensors", 1_000_000), ("ema_vit_b", 85_798_656)]


def shapes(case: str, N: int) -> list[tuple[int, ...]]:
    if case == "adamw8bit" or N < 768:  # so few are the harness's warm-up
        return [(N,)]
    if case == "ema_1000_tensors":
        return [(N // 1000,)] * 1000
    return [(1, 1, 768), (197, 768), (768, 3, 16, 16), (768,), *BLOCK * 12, (768,), (768,)]


def make(case: str, N: int, M: int, dtype: str, device: str) -> dict:
    """Ours, the baseline and others by name: each does a step and gives some of the parameters."""
    generator = torch.Generator().manual_seed(0)
    all_shapes = shapes(case, N)
    start = [torch.randn(s, generator=generator) for s in all_shapes]
    if case.startswith("ema"):
        return averages(start, getattr(torch, dtype), device)
    slopes = [torch.randn(s, generator=generator) * 0.01 for s in all_shapes]

    def provider(optimizer, dtype, **options):
        parameters = [torch.nn.Parameter(p.to(device, dtype, copy=True)) for p in start]
        for p, g in zip(parameters, slopes, strict=True):
            p.grad = g.to(device, dtype)
        optimizer = optimizer(parameters, lr=1e-3, weight_decay=0.05, **options)

        def step():
            optimizer.step()
            return (parameters[-1].detach()[:1000].clone(),)

        return step

    own = getattr(torch, dtype)
    providers = {
        "ours": provider(AdamW8bit, own),
        "torch fused float32": provider(torch.optim.AdamW, torch.float32, fused=True),
    }
    try:
        from bitsandbytes.optim import AdamW8bit as Theirs
    except ImportError:
        return providers
    return providers | {"bitsandbytes": provider(Theirs, own)}


def averages(start: list[torch.Tensor], dtype: torch.dtype, device: str) -> dict:
    values = [p.to(device, dtype) for p in start]

    def provider(update):
        averages = [torch.zeros_like(v) for v in values]

        def step():
            update(averages, values)
            return (averages[-1][:1000].clone(),)

        return step

    def one_call(averages, values):
        torch.ops.fastssl.ema_(averages, values, torch.tensor(0.01, device="cpu"))

    def foreach(averages, values):
        torch._foreach_lerp_(averages, values, 0.01)

    return {"ours": provider(one_call), "torch foreach": provider(foreach)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case,N", CASES)
def test_step(benchmark, case, N, dtype):
    params = {"case": case, "N": N, "M": 1, "dtype": dtype, "device": DEVICE}
    # Parameters read and written, gradients read, two codes and their maxima read and written.
    traffic = N * (3 * getattr(torch, dtype).itemsize + 4 + 16 / 256)
    harness.measure(benchmark, __name__, params, (N, 1), 0, 0, traffic)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case,N", AVERAGES)
def test_ema(benchmark, case, N, dtype):
    params = {"case": case, "N": N, "M": 1, "dtype": dtype, "device": DEVICE}
    traffic = N * 3 * getattr(torch, dtype).itemsize  # averages read and written, weights read
    harness.measure(benchmark, __name__, params, (N, 1), 0, 0, traffic)
