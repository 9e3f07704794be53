"""The loss modules against the libraries they replace."""

import pytest
import torch
from torch.nn.functional import normalize

from fastssl.losses import ClipLoss, NTXentLoss

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def grads(loss, leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("N,D", [(1, 8), (2, 3), (64, 100), (300, 256)])
@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_clip_loss_equals_open_clip(N, D, learnable, device):
    peer = pytest.importorskip("open_clip.loss").ClipLoss()
    image, text = (normalize(torch.randn(N, D, device=device)).requires_grad_() for _ in range(2))
    scale = torch.tensor(14.3, device=device, requires_grad=learnable)
    leaves = [image, text, scale] if learnable else [image, text]
    ours = grads(ClipLoss()(image, text, scale), leaves)
    for got, expected in zip(ours, grads(peer(image, text, scale), leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)


def test_clip_loss_output_dict_and_shared_bias():
    image, text = (normalize(torch.randn(6, 8)) for _ in range(2))
    bias = torch.tensor(-3.0, requires_grad=True)
    out = ClipLoss()(image, text, 10.0, bias, output_dict=True)
    torch.testing.assert_close(out["contrastive_loss"], ClipLoss()(image, text, 10.0) + 0 * bias)
    out["contrastive_loss"].backward()
    assert bias.grad == 0


@pytest.mark.parametrize("N,D", [(2, 3), (33, 17), (256, 128)])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("device", DEVICES)
def test_nt_xent_equals_lightly(N, D, temperature, device):
    peer = pytest.importorskip("lightly.loss").NTXentLoss(temperature)
    leaves = [torch.randn(N, D, device=device, requires_grad=True) for _ in range(2)]
    ours = grads(NTXentLoss(temperature)(*leaves), leaves)
    for got, expected in zip(ours, grads(peer(*leaves), leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)


def test_nt_xent_in_half_precision_normalises_in_fp32():
    # 1e-4 squared underflows in fp16: normalised there, such a row would become NaN or zero.
    z0, z1 = torch.randn(2, 16, 32)
    expected = NTXentLoss(0.5)(z0, z1)
    got = NTXentLoss(0.5)((1e-4 * z0).half(), (1e-4 * z1).half())
    assert got.isfinite()
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: NTXentLoss(temperature=0), "temperature must be positive, got 0"),
        (lambda: NTXentLoss(memory_bank_size=(64, 8)), "memory_bank_size must be 0"),
        (lambda: NTXentLoss(gather_distributed=True), "not gathered yet"),
        (lambda: NTXentLoss()(torch.ones(2, 3), torch.ones(3, 3)), "one shape"),
        (lambda: ClipLoss(world_size=2), "world_size must be 1, got 2"),
        (lambda: ClipLoss()(torch.ones(2, 3), torch.ones(2, 4), 1.0), "q's width D=3"),
    ],
)
def test_error_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
