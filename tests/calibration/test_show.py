"""What people see of ranges."""

import json

from calibration.ranges import ACTIVATIONS_INT8, Method, Range
from calibration.show import rows, sparkline, text
from calibration.table import Table, TensorRange
from pipeline.core.figures import RangeRow


def table(count: int = 2) -> Table:
    tensors = {
        "conv": TensorRange(Range(-2, 2), Range(-4, 4), (1, 0, 100, 1)),
        "flat": TensorRange(Range(1, 1), Range(1, 1), (5, 0, 0, 0)),
        "a" * 60 + "_end": TensorRange(Range(0, 1), Range(0, 1), (1, 1, 1, 1)),
    }
    shown = dict(list(tensors.items())[:count])
    return Table(Method.ENTROPY, ACTIVATIONS_INT8, 99.99, 64, shown, ("watch out",))


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([0, 0]) == "  "
    assert sparkline([0, 7]) == " █"
    line = sparkline([1, 10, 100, 1000])
    assert line[-1] == "█"
    assert list(line) == sorted(line)
    assert line[0] == "▁"


def test_text_names_ranges_and_warnings() -> None:
    lines = text(table()).splitlines()
    assert lines[0] == "2 tensors over 64 images: entropy, symmetric int8"
    assert lines[2].split()[:6] == ["conv", "-4", "4", "-2", "2", "50%"]
    assert lines[3].split()[0] == "flat"
    assert lines[-1] == "warning: watch out"


def test_text_with_a_limit_shows_what_is_clipped_most() -> None:
    shown = text(table(3), limit=1)
    assert "conv" in shown
    assert "flat" not in shown
    assert "2 more" in shown


def test_long_names_keep_their_end() -> None:
    line = text(table(3)).splitlines()[4]
    assert line.startswith("…")
    assert line.split()[0].endswith("a_end")
    assert len(line.split()[0]) == 44


def test_a_row_for_every_tensor() -> None:
    first, second = rows(table())
    assert first == RangeRow("conv", (-4, 4), (-2, 2), 0.5, False, (1, 0, 100, 1))
    assert second.constant
    plain = json.loads(json.dumps(first.to_dict()))
    assert RangeRow.from_dict(plain, "row") == first
