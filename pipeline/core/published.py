"""Published results of the networks, to stand beside our own.

Source: the CARE paper (CVPR 2025). Latencies are in milliseconds, as the paper gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published row.

    Attributes:
        model: The network's name in this project.
        title: Its name in the paper.
        gmacs: Multiply-accumulates at 224, in 1e9.
        parameters: In 1e6.
        latency_ms: Latency by device, in ms.
        top1: ImageNet-1K top-1, in %.
    """

    model: str
    title: str
    gmacs: float
    parameters: float
    latency_ms: Mapping[str, float]
    top1: float


DEVICES = IPHONE, INTEL, RTX = "iPhone 13", "Intel i9", "RTX 4090"
"""Devices of the published latencies."""

Latencies = tuple[float, float, float]
"""Latencies by device, in the order of `DEVICES`, in ms."""


def _row(
    model: str, title: str, gmacs: float, parameters: float, latencies: Latencies, top1: float
) -> Published:
    by_device = dict(zip(DEVICES, latencies, strict=True))
    return Published(model, title, gmacs, parameters, by_device, top1)


PUBLISHED = (
    _row("mlla_t", "MLLA-T", 4.2, 25.0, (5.1, 21.3, 51.5), 83.5),
    _row("care_s0", "CARE-S0", 0.7, 7.3, (1.1, 4.3, 9.8), 78.4),
    _row("care_s1", "CARE-S1", 1.0, 9.6, (1.4, 6.6, 14.2), 80.1),
    _row("care_s2", "CARE-S2", 1.9, 19.5, (2.0, 9.4, 20.4), 82.1),
)
