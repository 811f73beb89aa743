from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import ArtifactError
from pipeline.core.network import Images, Logits, Network, in_batches, whole_batches


@pytest.mark.parametrize(
    ("count", "size", "least", "seen"),
    [
        (5, 2, 1, [2, 2, 1]),
        (5, 2, 2, [2, 2, 2]),
        (3, 8, 1, [3]),
        (3, 8, 8, [8]),
        (0, 4, 1, [0]),
    ],
)
def test_any_number_of_images_in_batches_of_limited_sizes(
    count: int, size: int, least: int, seen: list[int]
) -> None:
    batches: list[int] = []

    def run(images: Images) -> Logits:
        batches.append(len(images))
        return images[:, 0, 0, :]

    images = np.arange(count * 4, dtype=np.float32).reshape(count, 1, 2, 2)
    logits = in_batches(run, images, size, least)
    assert batches == seen
    np.testing.assert_array_equal(logits, images[:, 0, 0, :])


@pytest.mark.parametrize(
    ("count", "size", "order"),
    [(3, 2, [0, 1, 2, 0]), (4, 2, [0, 1, 2, 3]), (1, 3, [0, 0, 0]), (2, 1, [0, 1])],
)
def test_the_last_batch_is_filled_up(count: int, size: int, order: list[int]) -> None:
    images = np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1)
    assert whole_batches(images, size).ravel().tolist() == order


STATED = Network("net", ("cat", "dog (n02)"), (3, 8, 8), {"size": 8}, {"licence": "MIT"})


def test_what_an_artifact_states_is_read_back() -> None:
    assert Network.from_facts(STATED.to_dict()) == STATED


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "d\nog"], "the class 'd..nog' holds the control character"),
        (["cat\x1b[2J", "dog"], "control character"),
        (["cat", "dog\u202e"], "control character"),
        (["cat", "cat"], "the class 'cat' is named twice"),
        (["cat", " "], "is empty"),
        ("cat", "not stated in full"),
        (["cat", 3], "not stated in full"),
        (3, "not stated in full"),
        (None, "not stated in full"),
    ],
)
def test_labels_that_are_no_names_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        Network.from_facts({**STATED.to_dict(), "labels": labels})
    assert str(caught.value).isprintable()
    assert "build it again" in str(caught.value)
