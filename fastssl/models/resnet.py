"""ResNets for small images: a small one, and ResNet-18 with the stem of CIFAR."""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut: (B, C, H, W) to (B, D, H / stride, W / stride)."""

    def __init__(self, fan_in: int, fan_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.shortcut = nn.Sequential()
        if stride > 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNetSmall(nn.Module):
    """ResNet with a 3 x 3 stem, no max-pool, and one block a stage; width doubles as size halves.

    The number of stages and the first strides follow the image, so that the last map has 2 to 4
    pixels a side and an image costs 2 to 5 M multiplications: up to 16 pixels three stages, the
    first at full size; larger images four stages, each of which halves; above 32 pixels the stem
    halves too. About 0.3 M parameters.

    Args:
        in_chans: channels of the images.
        image_size: side of the images, at least 8 pixels.
        feature_dim: width of the last stage, a multiple of 8.

    Paper: He et al., "Deep residual learning", arXiv 1512.03385; the stem follows SimCLR's for
    CIFAR-10 (arXiv 2002.05709, appendix B.9).
    """

    def __init__(self, in_chans: int = 3, image_size: int = 32, feature_dim: int = 128):
        super().__init__()
        if image_size < 8:
            raise ValueError(
                f"resnet_small: image_size must be at least 8 pixels, got {image_size}."
            )
        self.feature_dim = feature_dim
        stages = 3 if image_size < 24 else 4
        widths = [feature_dim >> (stages - 1 - stage) for stage in range(stages)]
        stem_stride = 2 if image_size > 32 else 1
        self.conv = nn.Conv2d(in_chans, widths[0], 3, stem_stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        fan_ins = [widths[0], *widths[:-1]]
        self.stages = nn.Sequential(
            *(
                BasicBlock(fan_in, width, 1 if stage == 0 and image_size <= 16 else 2)
                for stage, (fan_in, width) in enumerate(zip(fan_ins, widths, strict=True))
            )
        )
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) float to (B, feature_dim): the average of the last map."""
        x = F.relu(self.bn(self.conv(x)))
        return self.stages(x).mean(dim=(2, 3))


class ResNet18CIFAR(nn.Module):
    """ResNet-18 whose stem is one 3 x 3 convolution, without max-pool: at 32 pixels the four stages
    have maps of 32, 16, 8 and 4 pixels. 11 M parameters, 0.56 G multiplications an image.

    Args:
        in_chans: channels of the images.
        image_size: side of the images, at least 16 pixels.

    Paper: He et al., "Deep residual learning", arXiv 1512.03385; the stem is SimCLR's for CIFAR-10
    (arXiv 2002.05709, appendix B.9).
    """

    feature_dim = 512

    def __init__(self, in_chans: int = 3, image_size: int = 32):
        super().__init__()
        if image_size < 16:
            raise ValueError(
                f"resnet18_cifar: image_size must be at least 16 pixels, got {image_size}. Use "
                "resnet_small."
            )
        self.conv = nn.Conv2d(in_chans, 64, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(64)
        blocks, fan_in = [], 64
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [BasicBlock(fan_in, width, stride), BasicBlock(width, width, 1)]
            fan_in = width
        self.stages = nn.Sequential(*blocks)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) float to (B, 512): the average of the last map."""
        x = F.relu(self.bn(self.conv(x)))
        return self.stages(x).mean(dim=(2, 3))


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
