"""How threads wait that have nothing to do: actively for long, for a moment, or asleep.

Alone on a machine, active waiting is fastest: the next operator finds all threads awake. Beside
other processes it costs most: the thread that waits holds a CPU while the one that works waits for
it. Waiting for a moment keeps nearly all of the one and loses most of the other: it is the default,
and another way takes its place only by measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from calibration.kept import Kept
from pipeline.core.figures import Ratio
from pipeline.targets.ort.session import LONG_SPIN_US, SPIN_US, limits_spinning, runtime
from pipeline.targets.ort.tune import Candidate, Choice, Trial, choose

WAITS: Mapping[str, Mapping[str, Any]] = {
    ", spinning long": {"spinning": True, "spin_us": LONG_SPIN_US},
    ", spinning": {"spinning": True, "spin_us": SPIN_US},
    ", no spinning": {"spinning": False, "spin_us": SPIN_US},
}
"""How a way's name ends -> its settings; from the fastest alone to the most patient."""

MOST_BESIDE_OTHERS = 2.0
"""How many times as long a call may take, in the mean, while half of the CPUs are busy."""

MOST_WHEN_QUIET = 1.25
"""How many times as long another way may take on a quiet machine: most calls are made there.
CARE-S0 in 8 bits took 1.44 times as long with threads that sleep, and 0.67 beside others."""


def other_waits(name: str, way: Candidate) -> dict[str, Candidate]:
    """The same way with threads that wait otherwise, by name."""
    return {f"{name}{wait}": other for wait in _offered() if (other := _waiting(way, wait)) != way}


def _offered() -> Iterator[str]:
    """Ends of names; an older ONNX Runtime knows no duration."""
    limited = limits_spinning(runtime().__version__)
    return (wait for wait in WAITS if limited or WAITS[wait]["spin_us"] == SPIN_US)


def _waiting(way: Candidate, wait: str) -> Candidate:
    return replace(way, settings=replace(way.settings, **WAITS[wait]))


def choose_beside_others(
    trial: Trial,
    quiet: Choice,
    log: Callable[[str], None],
    kept: Kept | None = None,
) -> tuple[str, Candidate, list[dict[str, Any]]]:
    """The way to run, knowing what it takes beside other processes, too.

    What is fastest on a quiet machine stays, unless it takes more than `MOST_BESIDE_OTHERS` times
    as long beside others, beyond doubt. Then ways that are more patient are tried, one after the
    other, until one stays within that limit and gains more there than it costs on a quiet machine,
    beyond doubt, and costs no more than `MOST_WHEN_QUIET`. If none does, the first that gains is
    taken.

    Args:
        trial: How to measure, beside how many rivals, what was measured on a quiet machine; the
            first as it was asked for.
        quiet: What was found there.
        log: Takes a line for people.
        kept: Comparisons that an earlier, killed build finished.

    Returns:
        The way's name, the way, and what each comparison found.
    """
    ways, first = trial.candidates, quiet.name
    way = ways[first]
    chosen, best, found = first, way, []
    for wait in _more_patient(way):
        other = _waiting(way, wait)
        name = next((name for name, one in ways.items() if one == other), f"{first}{wait}")
        busy = choose(replace(trial, candidates={first: way, name: other}), kept=kept)
        slower = busy.medians[first] / quiet.medians[first]
        too_slow = slower * busy.ratios[first].interval[0] > MOST_BESIDE_OTHERS
        cost = _cost_when_quiet(quiet, ways, other)
        affordable = cost.value <= MOST_WHEN_QUIET
        gains = busy.name == name and busy.ratios[name].times(cost).faster and affordable
        keeps = busy.medians[name] <= MOST_BESIDE_OTHERS * quiet.medians[first]
        if too_slow and gains and (keeps or chosen == first):
            chosen, best = name, other
        log(f"beside other processes {slower:.1f} times as long, chosen: {chosen}")
        found.append(
            {
                **busy.to_dict(),
                "chosen": chosen,
                "rivals": trial.rivals,
                "times_the_quiet": round(slower, 4),
                "costs_when_quiet": round(cost.value, 4),
            }
        )
        if not too_slow or (gains and keeps):
            break
    return chosen, best, found


def _more_patient(way: Candidate) -> list[str]:
    """How else its threads could wait, the least patient first."""
    offered = list(_offered())
    own = next(place for place, wait in enumerate(offered) if _waiting(way, wait) == way)
    return offered[own + 1 :]


def _cost_when_quiet(quiet: Choice, ways: Mapping[str, Candidate], other: Candidate) -> Ratio:
    """How many times as long a call takes on a quiet machine whose threads wait as `other`'s.

    Waiting was measured beside the way that was asked for: what else is set does not change it.
    """
    asked = next(iter(ways))

    def like(way: Candidate) -> str:
        settings = replace(
            ways[asked].settings, spinning=way.settings.spinning, spin_us=way.settings.spin_us
        )
        return next(name for name, one in ways.items() if one.settings == settings)

    patient, chosen = like(other), like(ways[quiet.name])
    if chosen == asked:
        return quiet.ratios[patient]
    inverse = quiet.ratios[chosen].inverse
    return inverse if patient == asked else quiet.ratios[patient].times(inverse)
