"""Numbers in words, the same on the terminal, in Markdown and in HTML."""

from __future__ import annotations

from pipeline.core.figures import Number

MINUS = "\N{MINUS SIGN}"


def percent(value: Number, digits: int = 2) -> str:
    """A share as a percentage, or how it came about that there is none."""
    return str(value.state) if value.value is None else f"{100 * value.value:.{digits}f} %"


def percent_interval(value: Number) -> str:
    """The interval of a share, as percentages."""
    if value.interval is None:
        return ""
    return f"{100 * value.interval[0]:.2f} to {100 * value.interval[1]:.2f} %"


def points(value: Number) -> str:
    """A difference of two shares in percentage points, with its sign; a minus means a gain."""
    return str(value.state) if value.value is None else f"{_signed(100 * value.value)} points"


def points_interval(value: Number) -> str:
    """The interval of a difference of shares, in percentage points."""
    if value.interval is None:
        return ""
    low, high = (_signed(100 * end) for end in value.interval)
    return f"{low} to {high} points"


def _signed(value: float) -> str:
    """Two decimals with a true minus, and no sign before zero."""
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", MINUS)


def number(value: Number) -> str:
    """A number of any kind, or how it came about that there is none."""
    return str(value.state) if value.value is None else f"{value.value:.4g}"


def number_interval(value: Number) -> str:
    """The interval of a number of any kind."""
    return "" if value.interval is None else f"{value.interval[0]:.4g} to {value.interval[1]:.4g}"


def milliseconds(value: Number) -> str:
    """A latency, or how it came about that there is none."""
    return str(value.state) if value.value is None else f"{value.value:.2f} ms"


def milliseconds_interval(value: Number) -> str:
    """The interval of a latency."""
    return (
        "" if value.interval is None else f"{value.interval[0]:.2f} to {value.interval[1]:.2f} ms"
    )


def size(bytes_: int) -> str:
    """A size in megabytes."""
    return f"{bytes_ / 1e6:.2f} MB" if bytes_ else "-"
