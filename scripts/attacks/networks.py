"""Networks: names that timm does not know, and arguments that no network takes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from attacks.attempt import Attempt
from care.factory import create_model

NAMES = (
    *("", "resnet", "resnet81", "care_s5", "hf-hub:timm/resnet18", "timm/resnet18", "../x", "*"),
    *("resnet18.nope", ".", "a" * 300, "resnet18 ", "Resnet18", "[", "resnet18\x1b[2J", "http://x"),
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1.5,
        2**20 + 1,
        10**9,
        10**30,
        float("nan"),
        "x",
        [],
        [1],
        [[1]],
        {"a": 1},
    ),
)
ARGUMENTS = (
    *("in_chans", "num_classes", "drop_rate", "drop_path_rate", "depths", "dims", "embed_dim"),
    *(
        "depth",
        "num_heads",
        "act_layer",
        "norm_layer",
        "global_pool",
        "img_size",
        "layers",
        "block",
    ),
    *("pretrained", "features_only", "checkpoint_path", "pretrained_cfg", "scriptable", "no_such"),
)


def attempts(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """Names, and arguments with odd values for some networks."""
    del folder, seed, count
    for name in NAMES:
        yield Attempt(f"name {name[:30]!r}", partial(create_model, name), hostile=True)
    for name in ("test_resnet", "test_vit", "care_tiny"):
        for argument in ARGUMENTS:
            for value in VALUES:
                made = partial(create_model, name, **{argument: value})
                yield Attempt(f"{name} {argument}={value!r:.20}", made)
