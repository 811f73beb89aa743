"""What a two-headed network learns from: the targets, and a teacher if there is one.

A CARE network in training mode returns the pair (head, distillation head). With a teacher the head
learns the targets and the distillation head learns the teacher, as in DeiT (Touvron et al., 2021);
without one both learn the targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from care.precision import autocast
from pipeline.core.errors import ConfigError

Distillation = Literal["none", "hard", "soft"]


class Teacher(nn.Module):
    """A frozen network that labels the student's images.

    Args:
        network: Images to logits, (batch, classes).
        mean: Per-channel mean that the teacher's images are normalized with.
        std: Per-channel standard deviation of the same.
        student_mean: Per-channel mean that the student's images are normalized with.
        student_std: Per-channel standard deviation of the same.
        precision: Of the network, see `care.evaluate.autocast`.

    The student's images are renormalized where the two differ: a teacher fed with differently
    normalized images still answers, only worse, and nothing would tell.
    """

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        student_mean: Sequence[float],
        student_std: Sequence[float],
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        network = network.to(memory_format=torch.channels_last)
        self.network = network.eval().requires_grad_(False)
        self.precision = precision
        own_std, std_ = torch.tensor(std), torch.tensor(student_std)
        scale = std_ / own_std
        shift = (torch.tensor(student_mean) - torch.tensor(mean)) / own_std
        self.register_buffer("scale", scale.reshape(1, -1, 1, 1))
        self.register_buffer("shift", shift.reshape(1, -1, 1, 1))

    def train(self, mode: bool = True) -> Teacher:
        """A teacher never trains: its norms and dropout stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Label images, (batch, channels, height, width), normalized as the student's are."""
        own = images * self.scale + self.shift  # type: ignore[operator]
        own = own.contiguous(memory_format=torch.channels_last)
        with autocast(images.device, self.precision):
            return self.network(own).float()  # type: ignore[no-any-return]


class DistillationLoss(nn.Module):
    """Loss of a network with one or two heads, with or without a teacher.

    Args:
        base: Loss of logits against the targets, such as cross-entropy.
        kind: "none"; "hard" (cross-entropy with the teacher's top class); "soft" (Kullback-Leibler
            divergence to the teacher's tempered distribution, times the squared temperature).
        teacher: The labelling network; None if and only if `kind` is "none".
        weight: Share of the teacher's part, 0 to 1; the targets have the rest.
        temperature: Softens both distributions of the soft kind.

    Raises:
        ConfigError: Kind and teacher do not fit together, or a number is out of range.
    """

    def __init__(
        self,
        base: nn.Module,
        kind: Distillation = "none",
        teacher: nn.Module | None = None,
        weight: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if (teacher is None) != (kind == "none"):
            raise ConfigError(
                f"{kind} distillation needs a teacher"
                if teacher is None
                else "a teacher is given, but distillation is 'none': choose 'hard' or 'soft'"
            )
        if not 0 <= weight <= 1:
            raise ConfigError(f"the distillation weight must be within 0 and 1, not {weight}")
        if temperature <= 0:
            raise ConfigError(f"the distillation temperature must be positive, not {temperature}")
        self.base = base
        self.kind = kind
        self.teacher = teacher
        self.weight = weight
        self.temperature = temperature

    def forward(
        self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor
    ) -> Tensor:
        """Mean loss of a batch, a scalar.

        Args:
            images: What the network saw, (batch, channels, height, width), for the teacher.
            outputs: Logits (batch, classes), or the pair (head, distillation head) of them. A
                network with one head learns both parts with it.
            targets: Class numbers (batch,) or distributions (batch, classes), as `base` takes them.
        """
        head, distilled = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        if self.teacher is None:
            if distilled is head:
                return self.base(head, targets)  # type: ignore[no-any-return]
            return (self.base(head, targets) + self.base(distilled, targets)) / 2  # type: ignore[no-any-return]
        taught = self._against_teacher(distilled, self.teacher(images))
        return (1 - self.weight) * self.base(head, targets) + self.weight * taught  # type: ignore[no-any-return]

    def _against_teacher(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.kind == "hard":
            top = labels if labels.ndim == 1 else labels.argmax(dim=1)
            return F.cross_entropy(logits, top)
        divergence = F.kl_div(
            F.log_softmax(logits / self.temperature, dim=1),
            F.log_softmax(labels / self.temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        # Gradients of tempered logits shrink with the squared temperature (Hinton et al., 2015).
        return divergence * self.temperature**2
