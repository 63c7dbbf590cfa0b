"""Backbones that are no Sequential, written as users write theirs."""

import torch
from torch import nn


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, with any normalization."""

    def __init__(self, in_channels, out_channels, stride=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels)
            )

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.bn2(self.conv2(h)) + shortcut)


class ResNet(nn.Module):
    """A residual net with the attributes of torchvision's, four blocks wide."""

    def __init__(self, num_classes=10, in_channels=1, width=4, norm=nn.BatchNorm2d, layers=(2, 1, 1, 1)):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = (width, width, 2 * width, 2 * width, 4 * width)
        for stage in range(4):
            first = ResidualBlock(widths[stage], widths[stage + 1], 1 + (stage in (1, 3)), norm)
            more = (ResidualBlock(widths[stage + 1], widths[stage + 1], 1, norm) for _ in range(layers[stage] - 1))
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, *more))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Residual(nn.Module):
    """Vectors: two linear layers, of which one is called only where there are features, and a shortcut."""

    def __init__(self, features=6, num_classes=3, hidden=5, dropout=0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden))
        self.stem = nn.Linear(features, hidden)
        self.inner = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x):
        h = self.stem(x).tanh() * self.scale
        for _ in range(1):
            h = h + self.dropout(self.inner(h).tanh())
        return self.head(h)
