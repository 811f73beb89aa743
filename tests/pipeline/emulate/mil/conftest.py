"""Programs are converted as the product converts them: without a check after each pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.targets.coreml.convert import seldom_checked
from pipeline.targets.coreml.quiet import logged


@pytest.fixture(scope="package", autouse=True)
def _seldom_checked() -> Iterator[None]:
    with logged(lambda line: None):
        pytest.importorskip("coremltools")  # it speaks on its import
    with seldom_checked():
        yield
