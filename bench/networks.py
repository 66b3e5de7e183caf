"""The networks that are measured, in plain torch."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def group_norm(channels):
    """GroupNorm in place of batch norm, with the groups of torchvision and timm."""
    groups = 32 if channels % 32 == 0 else 8
    return nn.GroupNorm(groups, channels)


class Residual(nn.Module):
    """relu(body(x) + short(x)) of He et al., https://arxiv.org/abs/1512.03385.

    ReLU is a module, because BackPACK's converter refuses the function.
    """

    def __init__(self, norm, channels, outputs, stride, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.short = nn.Sequential()
        if stride > 1 or channels != outputs:
            self.short = nn.Sequential(
                nn.Conv2d(channels, outputs, 1, stride, bias=False), norm(outputs)
            )
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.body(x) + self.short(x))


def basic(norm, channels, width, stride):
    layers = (
        *(nn.Conv2d(channels, width, 3, stride, 1, bias=False), norm(width)),
        nn.ReLU(),
        *(nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width)),
    )
    return Residual(norm, channels, width, stride, *layers)


def bottleneck(norm, channels, width, stride):
    layers = (
        *(nn.Conv2d(channels, width, 1, bias=False), norm(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width), nn.ReLU()),
        *(nn.Conv2d(width, 4 * width, 1, bias=False), norm(4 * width)),
    )
    return Residual(norm, channels, 4 * width, stride, *layers)


def stages(norm, block, channels, expansion, depths):
    for i, depth in enumerate(depths):
        width = 64 * 2**i
        for j in range(depth):
            yield block(norm, channels, width, 2 if i and not j else 1)
            channels = expansion * width


def resnet18(norm=nn.BatchNorm2d):
    """The variant for CIFAR: 3 x 3 stem, no pooling before the first stage."""
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), norm(64), nn.ReLU()]
    body = stages(norm, basic, 64, 1, (2, 2, 2, 2))
    return nn.Sequential(*stem, *body, *head(512))


def resnet50(norm=nn.BatchNorm2d):
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64), nn.ReLU()]
    stem += [nn.MaxPool2d(3, 2, 1)]
    body = stages(norm, bottleneck, 64, 4, (3, 4, 6, 3))
    return nn.Sequential(*stem, *body, *head(2048))


class Inverted(nn.Module):
    """An inverted residual of Sandler et al., https://arxiv.org/abs/1801.04381."""

    def __init__(self, norm, channels, outputs, stride, expansion):
        super().__init__()
        width = channels * expansion
        layers = [nn.Conv2d(channels, width, 1, bias=False), norm(width), nn.ReLU6()]
        self.body = nn.Sequential(
            *(layers if expansion > 1 else ()),
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
            *(norm(width), nn.ReLU6()),
            *(nn.Conv2d(width, outputs, 1, bias=False), norm(outputs)),
        )
        self.adds = stride == 1 and channels == outputs

    def forward(self, x):
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet_v2(norm=nn.BatchNorm2d):
    layers = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), norm(32), nn.ReLU6()]
    channels = 32
    for expansion, outputs, depth, stride in (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ):
        for i in range(depth):
            step = 1 if i else stride
            layers.append(Inverted(norm, channels, outputs, step, expansion))
            channels = outputs
    layers += [nn.Conv2d(320, 1280, 1, bias=False), norm(1280), nn.ReLU6()]
    return nn.Sequential(*layers, *head(1280))


def head(channels, classes=10):
    pool = nn.AdaptiveAvgPool2d(1)
    return [pool, nn.Flatten(), nn.Linear(channels, classes)]


def small_cnn(norm=nn.BatchNorm2d):
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), norm(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), norm(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), norm(128), nn.ReLU()),
        *head(128),
    )


def conv1d_net(norm=nn.BatchNorm1d):
    return nn.Sequential(
        *(nn.Conv1d(2, 32, 7, 2, 3), norm(32), nn.ReLU()),
        *(nn.Conv1d(32, 64, 5, 2, 2), norm(64), nn.ReLU()),
        *(nn.Conv1d(64, 128, 3, 2, 1), norm(128), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, 10)),
    )


def mlp():
    return nn.Sequential(
        *(nn.Linear(784, 1024), nn.BatchNorm1d(1024), nn.ReLU()),
        *(nn.Linear(1024, 512), nn.BatchNorm1d(512), nn.ReLU()),
        nn.Linear(512, 10),
    )


def chain(width, depth):
    """Equal layers in a row, to see what grows with width and with depth."""
    layers = [nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Conv2d(width, width, 3, padding=1)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, *head(width))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        n, tokens, width = x.shape
        split = self.qkv(x).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*split)
        return self.out(y.transpose(1, 2).reshape(n, tokens, width))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.think = nn.Sequential(
            *(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU()),
            nn.Linear(4 * width, width),
        )

    def forward(self, x):
        x = x + self.attend(x)
        return x + self.think(x)


class ViT(nn.Module):
    """64 tokens of 4 x 4 pixels, BatchNorm after the patches, six blocks."""

    def __init__(self, width=192, heads=3, depth=6):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.BatchNorm2d(width)
        self.place = nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x):
        x = self.norm(self.patches(x)).flatten(2).transpose(1, 2) + self.place
        return self.head(self.blocks(x).mean(1))


def tiny():
    """A network so small that only overhead counts."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64, 3)),
    )


# name: (network, shape of the batch)
NETWORKS = {
    "ResNet-18": (resnet18, (16, 3, 32, 32)),
    "ResNet-50": (resnet50, (8, 3, 64, 64)),
    "MobileNetV2": (mobilenet_v2, (16, 3, 64, 64)),
    "small CNN": (small_cnn, (32, 3, 32, 32)),
    "conv1d net": (conv1d_net, (32, 2, 512)),
    "BN MLP": (mlp, (32, 784)),
    "ViT-like": (ViT, (16, 3, 32, 32)),
    "GroupNorm ResNet-18": (lambda: resnet18(group_norm), (16, 3, 32, 32)),
    "GroupNorm ResNet-50": (lambda: resnet50(group_norm), (8, 3, 64, 64)),
    "GroupNorm MobileNetV2": (lambda: mobilenet_v2(group_norm), (16, 3, 64, 64)),
    "GroupNorm CNN": (lambda: small_cnn(group_norm), (32, 3, 32, 32)),
    "GroupNorm conv1d net": (lambda: conv1d_net(group_norm), (32, 2, 512)),
    "tiny net": (tiny, (8, 1, 8, 8)),
}

# Networks of growing size, with images of 16 x 16 after the first layer.
WIDTHS = {
    f"CNN, {width} wide": (partial(chain, width, 4), (16, 3, 32, 32))
    for width in (8, 16, 32, 64, 128, 256)
}
DEPTHS = {
    f"CNN, {depth} deep": (partial(chain, 32, depth), (16, 3, 32, 32))
    for depth in (1, 2, 4, 8, 16, 32)
}
GROWN = {**WIDTHS, **DEPTHS}


def usual_batch(net, device):
    """The batch of the table; on a GPU eight times as many samples, to keep it busy."""
    batch = {**NETWORKS, **GROWN}[net][1][0]
    return 8 * batch if device == "cuda" else batch
