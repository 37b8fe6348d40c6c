"""The networks of ``drive``: the same sensors fused early, in the middle or late."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmedge.tasks.drive.data import CAMERA_SIZE, FASTEST, LIDAR_CELLS, OBJECTS

CHANNELS = (32, 32, 64, 64)
EGO = 32
TYPICAL_DISTANCE = 15.0  # metres: where the regression starts


def convolution(inputs: int, outputs: int, stride: int = 2) -> nn.Sequential:
    """A 3 x 3 convolution with norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def tower(inputs: int, channels: tuple[int, ...], size: int, features: int) -> nn.Sequential:
    """Strided convolutions over a picture of ``size`` pixels, then ``(batch, features)``.

    Flattened, not averaged: where something is says how far it is.
    """
    layers = [convolution(*pair) for pair in zip((inputs, *channels[:-1]), channels, strict=True)]
    edge = size // 2 ** len(channels)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * edge * edge, features), nn.ReLU())


def ego_tower(features: int) -> nn.Sequential:
    """The car's own speed, metres per second, to ``(batch, features)``."""
    first = nn.Linear(1, features)
    with torch.no_grad():
        first.weight.div_(FASTEST)
    return nn.Sequential(first, nn.ReLU())


def distance_head(features: int) -> nn.Linear:
    """Features to metres."""
    head = nn.Linear(features, 1)
    nn.init.constant_(head.bias, TYPICAL_DISTANCE)
    return head


class EarlyFusion(nn.Module):
    """All inputs on one raster of 16 x 16, then one convolutional trunk.

    ``camera (batch, 3, 48, 48)``, ``lidar (batch, 1, 32, 32)``, ``speed (batch, 1)`` to logits ``(batch, classes)`` and
    metres ``(batch, 1)``, as for all three. The speed is a plane of the raster, the same everywhere.
    """

    def __init__(self, channels: tuple[int, ...] = CHANNELS, ego: int = EGO) -> None:
        super().__init__()
        first, second, third, fourth = channels
        coarse = nn.Conv2d(3, first, 5, 3, padding=1, bias=False)
        self.camera = nn.Sequential(coarse, nn.BatchNorm2d(first), nn.ReLU(), convolution(first, second, 1))
        self.lidar = nn.Sequential(convolution(1, first), convolution(first, second, 1))
        self.ego = ego_tower(ego)
        layers = [convolution(2 * second + ego, third), convolution(third, fourth), nn.Flatten()]
        self.trunk = nn.Sequential(*layers, nn.Linear(fourth * 16, fourth), nn.ReLU())
        self.object = nn.Linear(fourth, len(OBJECTS))
        self.distance = distance_head(fourth)

    def forward(self, camera: Tensor, lidar: Tensor, speed: Tensor) -> tuple[Tensor, Tensor]:
        seen, swept = self.camera(camera), self.lidar(lidar)
        ego = self.ego(speed)[:, :, None, None].expand(-1, -1, 16, 16)
        features = self.trunk(torch.cat([seen, swept, ego], 1))
        return self.object(features), self.distance(features)


class MiddleFusion(nn.Module):
    """A tower for each input, whose features are weighted by gates that see all of them, then shared layers."""

    def __init__(self, channels: tuple[int, ...] = CHANNELS, ego: int = EGO) -> None:
        super().__init__()
        features = channels[-1]
        joined = 2 * features + ego
        self.camera = tower(3, channels, CAMERA_SIZE, features)
        self.lidar = tower(1, channels[:-1], LIDAR_CELLS, features)
        self.ego = ego_tower(ego)
        self.gate = nn.Sequential(nn.Linear(joined, joined), nn.Sigmoid())
        self.shared = nn.Sequential(nn.Linear(joined, 3 * features // 2), nn.ReLU())
        self.object = nn.Linear(3 * features // 2, len(OBJECTS))
        self.distance = distance_head(3 * features // 2)

    def forward(self, camera: Tensor, lidar: Tensor, speed: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([self.camera(camera), self.lidar(lidar), self.ego(speed)], 1)
        features = self.shared(joined * self.gate(joined))
        return self.object(features), self.distance(features)


class LateFusion(nn.Module):
    """A tower and an answer for each sensor; gates say how far each is to be believed.

    The speed answers nothing alone: it says how old the lidar's distance is.
    """

    def __init__(self, channels: tuple[int, ...] = CHANNELS, ego: int = EGO) -> None:
        super().__init__()
        features = channels[-1]
        self.camera = tower(3, channels, CAMERA_SIZE, features)
        self.lidar = tower(1, channels[:-1], LIDAR_CELLS, features)
        self.ego = ego_tower(ego)
        self.camera_object, self.lidar_object = (nn.Linear(features, len(OBJECTS)) for _ in range(2))
        self.camera_distance, self.lidar_distance = distance_head(features), distance_head(features)
        self.driven = nn.Linear(ego, 1)
        self.camera_gate, self.lidar_gate = nn.Linear(features, 2), nn.Linear(features, 2)

    def forward(self, camera: Tensor, lidar: Tensor, speed: Tensor) -> tuple[Tensor, Tensor]:
        seen, swept = self.camera(camera), self.lidar(lidar)
        trust = torch.sigmoid(self.camera_gate(seen) + self.lidar_gate(swept))  # in the camera
        logits = _between(self.camera_object(seen), self.lidar_object(swept), trust[:, :1])
        corrected = self.lidar_distance(swept) + self.driven(self.ego(speed))
        return logits, _between(self.camera_distance(seen), corrected, trust[:, 1:])


def _between(camera: Tensor, lidar: Tensor, trust: Tensor) -> Tensor:
    return lidar + trust * (camera - lidar)


FUSIONS = {"early": EarlyFusion, "middle": MiddleFusion, "late": LateFusion}
