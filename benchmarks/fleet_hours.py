"""Hours of a large validation on a fleet, on paper: from measured rates, by the formulae below.

    python benchmarks/fleet_hours.py [--docs docs/scale.md]

50,000 images, four networks, six artifacts each and PyTorch as the reference, on 1, 8, 64 and 1,000
workers. Nothing here runs a network: the rates are those of docs/benchmarks.md and of the lines
below, measured on the CPU that is named there. The table in docs/scale.md is what this prints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from documents import fill

IMAGES, SHARD, SIDE, CLASSES = 50_000, 1000, 224, 1000
"""ImageNet's validation set, `validation.shard`, and what a network takes and gives."""

CPU = "one core of an AMD EPYC (2 cores, AVX512), PyTorch 2.15"

EAGER_MS = {
    "care_s0": 195.34 / 8,
    "care_s1": 410.50 / 8,
    "care_s2": 514.93 / 8,
    "mlla_t": 1001.05 / 8,
}
"""PyTorch in eager mode, published form: ms an image, batch 8, 1 thread (docs/benchmarks.md)."""

ORT_MS = {
    "ort/fp32": {
        "care_s0": 70.96 / 8,
        "care_s1": 111.91 / 8,
        "care_s2": 178.62 / 8,
        "mlla_t": 463.41 / 8,
    },
    "ort/int8": {
        "care_s0": 51.21 / 8,
        "care_s1": 84.69 / 8,
        "care_s2": 109.82 / 8,
        "mlla_t": 426.44 / 8,
    },
}
"""Our artifacts in ONNX Runtime: ms an image, batch 8, 1 thread (docs/benchmarks.md)."""

EMULATED = {
    "trt/fp16": 58.4,
    "trt/int8": 58.4 * 1.79 / 1.31,
    "coreml/fp16": 47.2,
    "coreml/int8": 47.2,
}
"""Executors, ranges recorded for `trt`: CPU ms an image of CARE-S0 at 224, batches of 8, 1 thread,
26 November 2026, the least of two rounds on a busy machine (PyTorch beside them: 34.6). int8 is to
fp16 as for care_tiny (docs/benchmarks.md)."""

DECODE_MS = 3.6
"""Decoding, resizing and cropping a JPEG of 500 x 375: CPU ms."""

STEP_S = 5.0
"""A process for a step: Python, PyTorch and opening what runs."""

EFFICIENCY = 195.34 / 122.14 / 2
"""Of two cores beside one: PyTorch, CARE-S0, batch 8 (docs/benchmarks.md)."""

ORDER_BYTES, ORDER_CPU_S = 11_500, 0.0015
"""An order for a shard, as JSON, and what making it takes the run: measured on care_tiny."""

REQUESTS, REQUEST_S = 5, 0.03
"""What the run asks the store for each answer, one after the other, and how long that takes:
assumed, of an object store in the same region."""

NARROW_IMAGES, NARROW_FACTOR = 256, 3.0
"""Images that whoever joins a validation emulates once more, and how much longer each takes."""


@dataclass(frozen=True)
class Site:
    """What a fleet has.

    Attributes:
        workers: How many.
        cores: Of each.
        link: Bits a second of a worker's network.
        store: Bits a second that the store gives in all.
    """

    workers: int
    cores: int = 2
    link: float = 1e9
    store: float = 10e9

    @property
    def speed(self) -> float:
        """CPU seconds that a worker gets through in a second."""
        return self.cores * EFFICIENCY


SITES = (Site(1), Site(8), Site(64), Site(1000), Site(1000, store=400e9))


@dataclass(frozen=True)
class Cost:
    """Hours of a site, by what they go to, and what moves.

    Attributes:
        computing: Shards, in waves over the workers.
        alone: What one worker does for each network while others wait: decoding, joining.
        moving: Bringing images to the workers, and logits back.
        terabytes: Out of the store, in all.
        orders: Messages of the scheduler.
    """

    computing: float
    alone: float
    moving: float
    terabytes: float
    orders: int

    @property
    def hours(self) -> float:
        """In all: moving, computing and what is alone come one after the other."""
        return self.computing + self.alone + self.moving


def rates() -> dict[str, dict[str, float]]:
    """CPU seconds of an image on one core, by network and by what is judged.

    Executors were measured on CARE-S0; other networks take as much longer as they do in PyTorch.
    """
    found = {}
    for network, eager in EAGER_MS.items():
        grows = eager / EAGER_MS["care_s0"]
        each = {"pytorch": eager} | {name: ms * grows for name, ms in EMULATED.items()}
        each |= {name: by[network] for name, by in ORT_MS.items()}
        found[network] = {name: ms / 1e3 for name, ms in each.items()}
    return found


def cost(site: Site) -> Cost:
    """What the whole takes at a site, network after network."""
    shards = math.ceil(IMAGES / SHARD)
    computing = alone = 0.0
    orders = 0
    for each in rates().values():
        reference = each.pop("pytorch")
        computing += _waves([reference], shards, site) + _waves(list(each.values()), shards, site)
        narrow = max(each.values()) * NARROW_FACTOR * NARROW_IMAGES / site.speed
        alone += IMAGES * DECODE_MS / 1e3 + narrow + 2 * STEP_S
        orders += (shards + 1) * (len(each) + 1)
    pixels = IMAGES * SIDE * SIDE * 3 * len(EAGER_MS)
    logits = IMAGES * CLASSES * 4 * (len(EMULATED) + len(ORT_MS) + 1) * len(EAGER_MS)
    busy = min(site.workers, shards * (len(EMULATED) + len(ORT_MS)))
    out = pixels * busy + 3 * logits  # to the run, and to who joins; and once in
    moving = max(8 * pixels / site.link, 8 * out / site.store) / 3600
    return Cost(computing / 3600, alone / 3600, moving, out / 1e12, orders)


def _waves(seconds: Sequence[float], shards: int, site: Site) -> float:
    """Seconds of the shards of several artifacts, at least those of the longest one.

    With many workers the run may be what limits: it hands out one order after the other.
    """
    each = [SHARD * one / site.speed + STEP_S for one in seconds]
    handing_out = shards * len(each) * _order_s()
    return max(shards * sum(each) / site.workers, max(each), handing_out)


def _order_s() -> float:
    """Seconds of the run for an order and its answer."""
    return ORDER_CPU_S + REQUESTS * REQUEST_S


def table(sites: Sequence[Site] = SITES) -> str:
    """The page's table and the figures around it."""
    core_hours = sum(sum(each.values()) for each in rates().values()) * IMAGES / 3600
    lines = [
        f"{core_hours:.0f} hours of judging on {CPU}; workers have 2 cores, both together "
        f"{2 * EFFICIENCY:.2f} times one, and 1 Gbit/s.",
        "",
        "| workers | store gives | hours | computing | one alone | moving | what limits | moved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for site in sites:
        found = cost(site)
        parts = {"computing": found.computing, "one alone": found.alone, "moving": found.moving}
        limit = max(parts, key=lambda name: parts[name])
        lines.append(
            f"| {site.workers:,} | {site.store / 1e9:g} Gbit/s | {found.hours:.1f} "
            f"| {found.computing:.2f} | {found.alone:.2f} | {found.moving:.2f} | {limit} "
            f"| {found.terabytes:.2f} TB |"
        )
    lines += ["", _memory(), "", _messages()]
    return "\n".join(lines)


def _memory() -> str:
    pixels, logits = IMAGES * SIDE * SIDE * 3 / 1e9, IMAGES * CLASSES * 4 / 1e6
    return (
        f"Memory: the decoded images of a network are {pixels:.1f} GB on the disk of every worker, "
        f"mapped; the logits of a validation are {logits:.0f} MB, in memory where they are joined, "
        "and twice while it compares them with PyTorch's."
    )


def _messages() -> str:
    orders, each = cost(SITES[0]).orders, _order_s()
    return (
        f"Scheduler: {orders:,} orders of {ORDER_BYTES / 1e3:.1f} kB, "
        f"{orders * ORDER_BYTES / 1e6:.0f} MB in all. One costs the run {1e3 * ORDER_CPU_S:.1f} "
        f"ms, its answer {REQUESTS} requests to the store of {1e3 * REQUEST_S:.0f} ms (assumed): "
        f"at most {1 / each:.0f} a second, {orders * each / 60:.1f} minutes of the whole."
    )


@click.command()
@click.option("--docs", type=click.Path(dir_okay=False, path_type=Path))
def main(docs: Path | None) -> None:
    """Print the table; or put it into a document."""
    if docs is None:
        click.echo(table())
    else:
        fill(docs, "fleet hours", table())


if __name__ == "__main__":
    main()
