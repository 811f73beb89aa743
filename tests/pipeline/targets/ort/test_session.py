"""Session options, as ONNX Runtime gets them."""

from __future__ import annotations

import pytest

from pipeline.targets.ort.session import SPIN_US, Settings, _spin_limit, options


def test_what_is_asked_for_is_set() -> None:
    made = options(Settings(spinning=False, entries={"session.set_denormal_as_zero": "1"}), 1)
    assert made.intra_op_num_threads == 1
    assert made.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert made.get_session_config_entry("session.set_denormal_as_zero") == "1"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1.25.2", {"session.force_spinning_stop": "1"}),
        ("1.26.0", {"session.intra_op.spin_duration_us": str(SPIN_US)}),
        ("2.0.0.dev1", {"session.intra_op.spin_duration_us": str(SPIN_US)}),
    ],
)
def test_threads_do_not_wait_actively_for_long(version: str, expected: dict[str, str]) -> None:
    assert _spin_limit(version) == expected
