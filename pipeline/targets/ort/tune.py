"""Which way of running a model is the fastest here: measured, interleaved, written down.

A comparison, in which all candidates take turns, is what is kept for the case of a kill: whole, so
that its figures stay paired, or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calibration.kept import Kept
from pipeline.core import machine
from pipeline.core.contention import contended
from pipeline.core.errors import ArtifactError
from pipeline.core.figures import Latency, Ratio, ratio
from pipeline.core.files import file_hash
from pipeline.core.huge_pages import HugePages
from pipeline.core.machine import cpu_class
from pipeline.core.network import Images
from pipeline.core.plain import Plain
from pipeline.core.settling import Settling
from pipeline.core.timing import CALLS, settle
from pipeline.targets.ort.session import Settings, runtime, start

WARMUP = 5
MIN_ROUNDS = 4

MOST_CALLS = 90
"""Timed calls of each way after which a comparison ends before its time is over. Intervals say what
so few can tell. Three ways to run a network of half a millisecond get as many in 1.5 seconds, and
five parts of one in 3; fewer ways, or a faster network, would only be called more often.
"""

SETTLED = 0.03
"""Share of itself to which every median is known when a comparison ends earlier, see
`pipeline.core.settling`."""


MEAN_OF = 3 * CALLS
"""Calls of which the mean is one sample beside other processes. There most calls take as long as on
a quiet machine and some ten times as long, when a thread had to wait: a median would not see them.
"""

FEWEST = 6
"""Samples with which an interval can hold a median with 95 %: all of five lie on one side of it in
one case of 16, all of six in one of 32. What fewer tell is in doubt, however narrow it looks.
"""


@dataclass(frozen=True)
class Candidate:
    """One way to run a model.

    Attributes:
        model: The file's name.
        settings: How to open it.
    """

    model: str
    settings: Settings


@dataclass(frozen=True)
class Trial:
    """What is compared, and how.

    Attributes:
        folder: Where the models lie.
        candidates: By name; the first is the one to beat.
        threads: How many threads.
        images: What to run them on.
        seconds: How long to measure at most, all together.
        rivals: Busy processes beside it, see `pipeline.core.contention`.
    """

    folder: Path
    candidates: Mapping[str, Candidate]
    threads: int
    images: Images
    seconds: float
    rivals: int = 0

    def key(self) -> str:
        """Hash of all that decides it: graphs, ways to run them, input, machine, runtime."""
        ways = [
            (name, file_hash(self.folder / way.model), way.settings.to_dict())
            for name, way in self.candidates.items()
        ]
        decides = {
            "comparison of": ways,
            "threads": self.threads,
            "seconds": self.seconds,
            "calls": [MOST_CALLS, SETTLED],
            "rivals": self.rivals,
            "images": [self.images.shape, hashlib.sha256(self.images.tobytes()).hexdigest()],
            "machine": cpu_class(),
            "onnxruntime": runtime().__version__,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def measure(self) -> Comparison:
        """Let all candidates take turns; beside rivals, a sample is the mean of some calls.

        Their memory is moved to huge pages first, as for use. In small pages a session is some per
        cent slower than another of the same graph that was opened after it.
        """
        pages = HugePages()
        sessions = {
            name: start(self.folder / way.model, way.settings, self.threads)
            for name, way in self.candidates.items()
        }
        if all(way.settings.huge_pages for way in self.candidates.values()):
            for session in sessions.values():
                session.run(None, {session.get_inputs()[0].name: self.images})
            pages.note()
            pages.relocate()
        watch = machine.Watch()
        with contended(self.rivals):
            times = interleave(sessions, self.images, self.seconds)
        others = watch.others()  # rivals have ended, and are none of them
        if self.rivals:
            times = {name: means(calls) for name, calls in times.items()}
        first = next(iter(times))
        return Comparison(
            {name: Latency(tuple(t)).p50 for name, t in times.items()},
            {name: ratio(t, times[first]) for name, t in times.items()},
            len(times[first]),
            round(others, 2),
        )


@dataclass(frozen=True)
class Comparison(Plain):
    """What one measurement found, in which all candidates took turns.

    Attributes:
        medians: Milliseconds of every candidate, by name.
        ratios: Every candidate against the first, by name, with its interval.
        samples: Of each: timed calls, or means of `MEAN_OF`.
        others: CPUs that other processes kept busy meanwhile.
    """

    medians: Mapping[str, float]
    ratios: Mapping[str, Ratio]
    samples: int
    others: float = 0.0


@dataclass(frozen=True)
class Choice:
    """What a measurement chose.

    Attributes:
        name: The chosen candidate.
        medians: Milliseconds of every candidate, by name.
        ratios: Every candidate against the first, by name.
        samples: Of each: timed calls, or means of `MEAN_OF`.
        fastest: The candidate with the smallest median, beyond doubt or not.
        doubt: Why the measurement decides nothing; "" if it may.
    """

    name: str
    medians: Mapping[str, float]
    ratios: Mapping[str, Ratio]
    samples: int
    fastest: str
    doubt: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "chosen": self.name,
            "samples": self.samples,
            **({"invalid": self.doubt} if self.doubt else {}),
            "candidates": {
                name: {
                    "p50_ms": round(median, 4),
                    "ratio": round(self.ratios[name].value, 4),
                    "interval": [round(end, 4) for end in self.ratios[name].interval],
                }
                for name, median in self.medians.items()
            },
        }


def interleave(
    sessions: Mapping[str, Any], images: Images, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of every session's calls, taken in turns as in `timing.interleaved`.

    It ends after `seconds`, or earlier with `MOST_CALLS` of each, or once all are `SETTLED`.
    """
    feeds = {name: {s.get_inputs()[0].name: images} for name, s in sessions.items()}
    for name, session in sessions.items():
        for _ in range(WARMUP):
            session.run(None, feeds[name])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    settling = Settling(SETTLED, MOST_CALLS)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < MIN_ROUNDS or (rounds * CALLS < MOST_CALLS and time.perf_counter() < end):
        rounds += 1
        for name, session in sessions.items():
            settle(partial(session.run, None, feeds[name]))
            for _ in range(CALLS):
                begin = time.perf_counter()
                session.run(None, feeds[name])
                times[name].append(1e3 * (time.perf_counter() - begin))
        if settling.ends(rounds * CALLS, times.values()):
            break
    return times


def means(times: list[float]) -> list[float]:
    """Means of `MEAN_OF` calls each, of at least one such group; calls left over are dropped."""
    whole = max(1, len(times) // MEAN_OF)
    return [float(group.mean()) for group in np.array_split(times[: whole * MEAN_OF], whole)]


def choose(trial: Trial, margin: float = 0.0, kept: Kept | None = None) -> Choice:
    """Measure candidates and choose one.

    The first one stays unless another is faster beyond doubt: the whole interval of its ratio to
    the first, which comes from `FEWEST` samples at least, lies below 1 - margin. While other
    processes keep the CPUs busy, nothing takes its place: what waits best is fastest then.

    Args:
        trial: What is compared.
        margin: By how much another one must be faster; a choice that changes the built files needs
            one, or two builds would differ by chance.
        kept: Comparisons that an earlier, killed build finished; None to measure in any case.
    """
    kept = kept or Kept()
    key = trial.key()
    found = _known(kept, key, trial.candidates)
    if found is None:
        found = trial.measure()
        kept.put(key, found.to_dict())
    medians, ratios = found.medians, found.ratios
    first = next(iter(trial.candidates))
    doubt = machine.busy_with_others(found.others, machine.granted())
    enough = found.samples >= FEWEST and not doubt
    others = [name for name in trial.candidates if name != first and enough]
    faster = [name for name in others if ratios[name].interval[1] < 1 - margin]
    best = min(faster, key=lambda name: medians[name], default=first)
    fastest = min(trial.candidates, key=lambda name: medians[name])
    return Choice(best, medians, ratios, found.samples, fastest, doubt)


def _known(kept: Kept, key: str, candidates: Mapping[str, Candidate]) -> Comparison | None:
    """What an earlier build measured; None where that is not there, or is no such comparison."""
    values = kept.get(key)
    if values is None:
        return None
    with contextlib.suppress(ArtifactError):
        found = Comparison.from_dict(values, "a kept comparison")
        if list(found.medians) == list(found.ratios) == list(candidates):
            return found
    return None
