from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from care.losses import DistillationLoss, Teacher
from pipeline.core.errors import ConfigError

IMAGES = torch.zeros(4, 3, 8, 8)
TARGETS = torch.tensor([0, 1, 2, 0])


class Oracle(nn.Module):
    """A teacher that always gives the same logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[: len(images)]


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head, distilled, teacher = (torch.randn(4, 3, generator=generator) for _ in range(3))
    return head.requires_grad_(), distilled.requires_grad_(), teacher


def test_without_a_teacher_both_heads_learn_the_targets(
    logits: tuple[Tensor, Tensor, Tensor],
) -> None:
    head, distilled, _ = logits
    loss = DistillationLoss(nn.CrossEntropyLoss())(IMAGES, (head, distilled), TARGETS)
    expected = (F.cross_entropy(head, TARGETS) + F.cross_entropy(distilled, TARGETS)) / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert head.grad is not None
    assert head.grad.abs().sum() > 0
    assert distilled.grad is not None
    assert distilled.grad.abs().sum() > 0


def test_a_network_with_one_head_learns_the_targets(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    loss = DistillationLoss(nn.CrossEntropyLoss())(IMAGES, logits[0], TARGETS)
    torch.testing.assert_close(loss, F.cross_entropy(logits[0], TARGETS))


def test_hard_distillation_teaches_the_top_class(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    head, distilled, teacher = logits
    criterion = DistillationLoss(nn.CrossEntropyLoss(), "hard", Oracle(teacher), weight=0.3)
    expected = 0.7 * F.cross_entropy(head, TARGETS) + 0.3 * F.cross_entropy(
        distilled, teacher.argmax(1)
    )
    torch.testing.assert_close(criterion(IMAGES, (head, distilled), TARGETS), expected)


def test_soft_distillation_is_the_tempered_divergence(
    logits: tuple[Tensor, Tensor, Tensor],
) -> None:
    head, distilled, teacher = logits
    criterion = DistillationLoss(
        nn.CrossEntropyLoss(), "soft", Oracle(teacher), weight=0.5, temperature=3.0
    )
    p, q = (teacher / 3).softmax(1), (distilled / 3).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean() * 9
    expected = 0.5 * F.cross_entropy(head, TARGETS) + 0.5 * divergence
    torch.testing.assert_close(criterion(IMAGES, (head, distilled), TARGETS), expected)


def test_a_student_that_equals_its_teacher_has_no_soft_loss(
    logits: tuple[Tensor, Tensor, Tensor],
) -> None:
    teacher = logits[2]
    criterion = DistillationLoss(nn.CrossEntropyLoss(), "soft", Oracle(teacher), weight=1.0)
    assert criterion(IMAGES, (logits[0], teacher.clone()), TARGETS).abs() < 1e-6


def test_the_teacher_sees_images_normalized_its_own_way() -> None:
    seen: list[Tensor] = []

    class Camera(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.mean((2, 3))

    pixels = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    teacher = Teacher(Camera(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (0.1, 0.1, 0.1), (0.5, 0.5, 0.5))
    teacher((pixels - 0.1) / 0.5)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    expected = (pixels - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
    torch.testing.assert_close(seen[0], expected)


def test_a_teacher_never_trains() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(3))
    network(torch.zeros(2, 3, 8, 8))
    criterion = DistillationLoss(
        nn.CrossEntropyLoss(),
        "hard",
        Teacher(network, (0.0,) * 3, (1.0,) * 3, (0.0,) * 3, (1.0,) * 3),
    )
    criterion.train()
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_what_does_not_fit_together_is_refused() -> None:
    base = nn.CrossEntropyLoss()
    with pytest.raises(ConfigError, match="hard distillation needs a teacher"):
        DistillationLoss(base, "hard")
    with pytest.raises(ConfigError, match="choose 'hard' or 'soft'"):
        DistillationLoss(base, "none", Oracle(torch.zeros(4, 3)))
    with pytest.raises(ConfigError, match="within 0 and 1"):
        DistillationLoss(base, "none", weight=1.5)
    with pytest.raises(ConfigError, match="temperature must be positive"):
        DistillationLoss(base, "none", temperature=0)
