"""Features of a frozen backbone, extracted once and shared by every protocol."""

import hashlib
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..augment import prepare


def fingerprint(module: nn.Module) -> dict[str, str]:
    """Digest of the bytes of every parameter and buffer of `module`, by name."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    digests = {}
    for name, tensor in tensors:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digests[name] = hashlib.blake2b(raw.numpy().tobytes(), digest_size=16).hexdigest()
    return digests


@contextmanager
def frozen(module: nn.Module):
    """Hold `module` in eval mode, without gradients and autocast, and prove that it stays as it is.

    A probe on a network that still trains, or whose BatchNorm still follows the test images,
    reports several points too much without any other sign. So the bytes of all parameters and
    buffers are compared before and after. The train/eval mode is given back at the end.

    Raises:
        RuntimeError: naming the first parameter or buffer that changed inside the block.
    """
    modes = {part: part.training for part in module.modules()}
    before = fingerprint(module)
    module.eval()
    device = next((p.device.type for p in module.parameters()), "cpu")
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield module
    finally:
        for part, training in modes.items():
            part.training = training
    after = fingerprint(module)
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    if changed:
        raise RuntimeError(
            f"evaluate: backbone must stay frozen, got a changed {changed[0]!r} "
            f"({len(changed)} of {len(before)} tensors differ). Its forward pass writes to its own "
            "weights or buffers in eval mode: remove that, or evaluate a copy without it."
        )


def extract(
    backbone: nn.Module, source, image_size: int, batch_size: int = 256, device="cpu"
) -> tuple[Tensor, Tensor]:
    """Features and labels of every image of `source`, in its order, without augmentation.

    Args:
        backbone: maps (B, C, S, S) float32 to (B, D). It is moved to `device`.
        source: a data source, see `fastssl.data.load`.
        image_size: S, side of the network's input in pixels (`fastssl.augment.prepare`).
        batch_size: images per forward pass; bounds the memory.
        device: where the backbone computes.

    Returns:
        h, float32 (N, D), and y, int64 (N,), both on the CPU.

    Raises:
        ValueError: for an empty source or features that are not (B, D).
        RuntimeError: if the backbone changes its weights or buffers meanwhile.
    """
    if len(source) == 0:
        raise ValueError(f"evaluate: data must hold images, got an empty split of {source.name!r}.")
    backbone.to(device)
    features, labels = [], []
    with frozen(backbone):
        for index in torch.arange(len(source)).split(batch_size):
            images, y = source.batch(index)
            h = backbone(prepare(images, image_size).to(device))
            if not isinstance(h, Tensor) or h.ndim != 2 or len(h) != len(index):
                got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
                raise ValueError(
                    f"evaluate: backbone must return features (B, D) = ({len(index)}, D), "
                    f"got {got}. Pool the feature map, or return one tensor."
                )
            features.append(h.float().cpu())
            labels.append(y)
    return torch.cat(features), torch.cat(labels)


def check_split(caller: str, name: str, h: Tensor, y: Tensor) -> None:
    """Raise ValueError unless h is finite (N, D) and y holds N labels >= 0, N >= 1."""
    if h.ndim != 2 or not h.is_floating_point():
        raise ValueError(
            f"{caller}: {name}_h must be floating point (N, D), got {h.dtype} {tuple(h.shape)}."
        )
    if len(h) == 0:
        raise ValueError(f"{caller}: {name}_h must have at least one row, got an empty split.")
    if y.shape != h.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(
            f"{caller}: {name}_y must be integer ({len(h)},), one label for each row of {name}_h, "
            f"got {y.dtype} {tuple(y.shape)}."
        )
    if (y < 0).any():
        raise ValueError(
            f"{caller}: {name}_y must be labelled, got no label (-1) on {int((y < 0).sum())} of "
            f"{len(y)} images. Sort the images into one subfolder per class."
        )
    if not h.isfinite().all():
        rows = int((~h.isfinite().all(1)).sum())
        raise ValueError(
            f"{caller}: {name}_h must be finite, got NaN or infinity in {rows} of {len(h)} rows. "
            "The run has diverged, or the images were not normalised."
        )


def check_splits(
    caller: str, train_h: Tensor, train_y: Tensor, test_h: Tensor, test_y: Tensor
) -> int:
    """Check both splits and that they fit each other; return the number of classes."""
    check_split(caller, "train", train_h, train_y)
    check_split(caller, "test", test_h, test_y)
    if train_h.shape[1] != test_h.shape[1]:
        raise ValueError(
            f"{caller}: test_h must have train_h's width D={train_h.shape[1]}, "
            f"got {tuple(test_h.shape)}."
        )
    missing = sorted(set(test_y.tolist()) - set(train_y.tolist()))
    if missing:
        raise ValueError(
            f"{caller}: train_y must contain every class of the test split, "
            f"got no training sample of {missing[:10]}. Use another split, or drop these classes."
        )
    return int(train_y.max()) + 1


def standardise(reference: Tensor, *others: Tensor) -> list[Tensor]:
    """Each of `others` (n, D) minus the mean and over the standard deviation of `reference` (N, D).

    Dimensions that never vary in `reference` carry nothing and become zero.
    """
    mean, sd = reference.mean(0), reference.std(0, correction=0)
    # Rounding leaves about |mean| * eps of spread in a constant column: it is no signal.
    alive = sd > 1e-6 * (1e-6 + mean.abs())
    scale = torch.where(alive, 1 / torch.where(alive, sd, 1), 0)
    return [(h - mean) * scale for h in others]


def top1_percent(predicted: Tensor, y: Tensor) -> float:
    """Share of predicted (N,) labels that equal y (N,), in percent."""
    return 100.0 * (predicted == y).double().mean().item()
