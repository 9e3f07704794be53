"""Forward and backward of the contrastive losses against eager open_clip and lightly."""

import harness
import pytest
import torch
from torch.nn.functional import normalize

import fastssl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASELINES = {"clip": "open_clip ClipLoss", "nt_xent": "lightly NTXentLoss"}
CASES = {
    "cpu": [("clip", N, 256) for N in (64, 256, 1024, 8192)]
    + [("nt_xent", N, 128) for N in (64, 256, 1024, 4096)],
    "cuda": [("clip", N, D) for N in (256, 1024, 4096, 16384, 32768) for D in (128, 512)]
    + [("clip", 16384, 1024)]
    + [("nt_xent", N, 128) for N in (256, 1024, 4096, 16384)],
}
# A product of fp16 matrices takes eager CPU torch 40 times as long as one of bf16: no baseline.
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}


def make(case: str, N: int, D: int, dtype: str, device: str):
    """(ours, baseline): each returns the loss and the gradients of all inputs."""
    a, b = (torch.randn(N, D, generator=torch.Generator().manual_seed(i)) for i in range(2))
    if case == "clip":
        import open_clip.loss

        inputs = [normalize(x).to(device, getattr(torch, dtype)) for x in (a, b)]
        inputs.append(torch.tensor(14.3, device=device))
        losses = fastssl.losses.ClipLoss(), open_clip.loss.ClipLoss()
    else:
        import lightly.loss

        inputs = [x.to(device, getattr(torch, dtype)) for x in (a, b)]
        losses = fastssl.losses.NTXentLoss(0.2), lightly.loss.NTXentLoss(0.2)
    inputs = [x.requires_grad_() for x in inputs]

    def call(loss):
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs)

    return lambda: call(losses[0]), lambda: call(losses[1])


@pytest.mark.parametrize("dtype", DTYPES[DEVICE])
@pytest.mark.parametrize("case,N,D", CASES[DEVICE])
def test_forward_backward(benchmark, case, N, D, dtype):
    rows = 2 * N if case == "nt_xent" else N
    q = torch.randn(rows, D).to(DEVICE, getattr(torch, dtype))
    params = {"case": case, "N": N, "D": D, "dtype": dtype, "device": DEVICE}
    # What must be computed without storing the logits: 4 products, or 2.5 where q is k.
    flop = (2.5 if case == "nt_xent" else 4.0) * 2 * rows**2 * D
    harness.measure(benchmark, __name__, params, BASELINES[case], flop, lambda: q @ q.T)
