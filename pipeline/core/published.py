"""Published results of the networks, to stand beside our own.

Source: the CARE paper (CVPR 2025). Latencies are in milliseconds, as the paper gives them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published row.

    Attributes:
        model: The network's name in this project.
        title: Its name in the paper.
        gmacs: Multiply-accumulates at 224, in 1e9.
        parameters: In 1e6.
        iphone_ms: Latency on an iPhone 13, in ms.
        i9_ms: Latency on an Intel i9, in ms.
        rtx4090_ms: Latency on an RTX 4090, in ms.
        top1: ImageNet-1K top-1, in %.
    """

    model: str
    title: str
    gmacs: float
    parameters: float
    iphone_ms: float
    i9_ms: float
    rtx4090_ms: float
    top1: float

    def latency_ms(self, target: str) -> float:
        """Published latency of the device that a target is for."""
        return {"trt": self.rtx4090_ms, "ort": self.i9_ms, "coreml": self.iphone_ms}[target]


PUBLISHED = (
    Published("mlla_t", "MLLA-T", 4.2, 25.0, 5.1, 21.3, 51.5, 83.5),
    Published("care_s0", "CARE-S0", 0.7, 7.3, 1.1, 4.3, 9.8, 78.4),
    Published("care_s1", "CARE-S1", 1.0, 9.6, 1.4, 6.6, 14.2, 80.1),
    Published("care_s2", "CARE-S2", 1.9, 19.5, 2.0, 9.4, 20.4, 82.1),
)
