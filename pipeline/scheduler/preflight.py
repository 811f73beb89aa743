"""What is wrong before anything is made: all of it at once, with the lines of the configuration.

A run that fails after an hour for a misspelt folder, and then for the next one, takes a day.
So all that can be told cheaply is looked at first, in two passes. The first loads no framework, and
is made before every run. The second lists the images and loads the network, as the export would: it
is made only where the network is exported here, since its export is out of date and in no store,
and a run keeps what it loaded. Nothing is written.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.sample import FEWEST
from pipeline.config import AUTO, Written
from pipeline.core import machine
from pipeline.core.callables import imported, locate
from pipeline.core.errors import ConfigError, DataError, ModelError, PipelineError, about
from pipeline.core.labels import read_labels
from pipeline.core.listing import Files, Folders
from pipeline.core.words import nearest, shown
from pipeline.core.yamlfile import KeyPath
from pipeline.scheduler.plan import Selection, plan
from pipeline.source import IMAGENET, PRETRAINED, TIMM_PREFIX, Source, Split
from pipeline.stages.context import RunContext
from pipeline.stages.export import ExportStep
from pipeline.stages.metrics import metrics_inputs
from pipeline.stages.samples import CalibrationStep, SampleStep
from pipeline.stages.target_step import TargetStep
from pipeline.steps.step import Step

if TYPE_CHECKING:
    from pipeline.store.shared import Shared

_REGISTERED = re.compile(r"^@register_model\b[^\n]*\ndef (\w+)", re.MULTILINE)
"""How timm, and this project, define the networks that they know by name."""

_BYTES = 4  # of a float32
_COPIES = 3
"""Sizes of the checkpoint that an artifact takes, with its graph: generously."""


@dataclass(frozen=True)
class Problem:
    """Something that keeps a run from succeeding.

    Attributes:
        keys: Where the configuration says it.
        what: What is wrong, and how to mend it.
    """

    keys: KeyPath
    what: str


Problems = Iterator[Problem]


def require_sound(
    written: Written,
    context: RunContext,
    selection: Selection,
    store: Shared | None = None,
    *,
    load: bool = True,
) -> str:
    """Look at everything that a run needs, and refuse what cannot succeed.

    Args:
        written: The configuration.
        context: Its context; what its source loads stays there for the run.
        selection: Which steps are asked for.
        store: Where the run asks for artifacts before it makes them.
        load: Whether code of the user's may run: a plan runs none.

    Returns:
        What libraries printed meanwhile, for the log.

    Raises:
        ConfigError: Something is wrong: a line for each thing, with its line in the file.
        StoreError: The store does not answer, and is required.
    """
    steps = selection.select(plan(context))
    if not steps:
        return ""
    look = _Look(context.source, steps)
    found = list(look.cheap())
    said = io.StringIO()
    # What does not even exist would only be found wanting once more.
    if not found and look.exports(selection, store):
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _warnings_told():
            found += look.thorough(load=load)
    _refuse(written, found)
    return said.getvalue()


def require_said(written: Written, context: RunContext, selection: Selection) -> None:
    """Refuse what the configuration says wrongly, as far as that is told without a framework.

    Whether weights can be fetched and memory is enough says more of the machine, and of today.

    Raises:
        ConfigError: Something is wrong: a line for each thing.
    """
    look = _Look(context.source, selection.select(plan(context)))
    _refuse(written, list(look.cheap(fetch=False)))


def _refuse(written: Written, found: Sequence[Problem]) -> None:
    if found:
        lines = (f"{written.document.place(each.keys)}: {each.what}" for each in found)
        raise ConfigError("\n".join(dict.fromkeys(lines)))


@contextlib.contextmanager
def _warnings_told() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


class _Look:
    """The two passes over what some steps need.

    Args:
        source: The network and the images.
        steps: What was selected.
    """

    def __init__(self, source: Source, steps: Sequence[Step]) -> None:
        self.source, self.config, self.steps = source, source.config, steps
        self.calibrated = any(isinstance(step, CalibrationStep) for step in steps)

    def cheap(self, *, fetch: bool = True) -> Problems:
        """What takes no framework, and no look at any image.

        Args:
            fetch: Published weights may be fetched, as they have to be for the run.
        """
        yield from self._network(fetch)
        for split, files in self._splits():
            yield from self._tried(("data", split), files)
        yield from self._tried(("data", "labels"), self._labels)
        if self.calibrated:
            yield from self._calibration()
        yield from self._classes()
        yield from self._threads()

    def exports(self, selection: Selection, store: Shared | None) -> bool:
        """Whether the network is exported here."""
        return any(
            selection.forces(step)
            or (step.stale() is not None and not (store is not None and store.holds(step)))
            for step in self.steps
            if isinstance(step, ExportStep)
        )

    def thorough(self, *, load: bool) -> Problems:
        """The images' files, the network with its weights, memory and disk."""
        counts: dict[Split, int] = {}
        for split, _ in self._splits():
            step = SampleStep if split == "validation" else CalibrationStep
            if any(isinstance(each, step) and not each.folder.exists() for each in self.steps):

                def count(split: Split = split) -> None:
                    counts[split] = self._count(split)

                yield from self._tried(("data", split), count)
        if load or self.config.model.module is None:
            yield from self._tried(("model",), lambda: self.source.network)
        if load and self.config.validation.metrics is not None:
            yield from self._tried(("validation", "metrics"), self._own_metrics)
        yield from self._room(counts)

    def _tried(self, keys: KeyPath, look: Callable[[], object]) -> Problems:
        try:
            look()
        except PipelineError as error:
            yield Problem(_keys_of(str(error)) or keys, str(error))

    def _threads(self) -> Problems:
        """More threads than this process may use; workers of a fleet have CPUs of their own."""
        if self.config.fleet is not None:
            return
        asked: dict[KeyPath, int | None] = {}
        for step in self.steps:
            if not isinstance(step, TargetStep):
                continue
            if step.stage == "bench":
                asked["bench", "threads"] = self.config.bench.threads
            options = self.config.target(step.runtime.name)
            asked["targets", step.runtime.name, "threads"] = getattr(options, "threads", None)
        for keys, threads in asked.items():
            yield from self._tried(keys, partial(machine.resolve_threads, threads))

    def _network(self, fetch: bool) -> Problems:
        stated = self.config.model
        if stated.module is not None:

            def located() -> None:
                with about("model.module"):
                    locate(str(stated.module))

            yield from self._tried(("model", "module"), located)
        elif stated.name is not None:
            yield from _unknown_name(stated.name)
        keys = [key for key in ("onnx", "hub") if getattr(stated, key) is not None]
        where = keys[0] if keys else "checkpoint"
        if fetch or stated.checkpoint != PRETRAINED:
            yield from self._tried(("model", where), self.source.look)
        own = self.config.validation.metrics
        yield from self._tried(("validation", "metrics"), lambda: metrics_inputs(own))

    def _own_metrics(self) -> None:
        with about("validation.metrics"):
            imported(str(self.config.validation.metrics))

    def _splits(self) -> Iterator[tuple[Split, Callable[[], Folders | Files]]]:
        yield "validation", lambda: self.source.files("validation")
        if self.calibrated:
            yield "calibration", lambda: self.source.files("calibration")

    def _labels(self) -> None:
        stated = self.config.data.labels
        if stated not in (None, IMAGENET):
            with about("data.labels"):
                read_labels(self.source.labels_file(str(stated)))

    def _calibration(self) -> Problems:
        """Images for calibration: enough of them, and others than those that judge."""
        count = self.config.calibration.images
        if count < FEWEST:
            yield Problem(
                ("calibration", "images"),
                f"calibration.images: calibration needs at least {FEWEST} images, not {count}",
            )
        if self.config.data.calibration == AUTO:
            return
        try:
            judging, own = self.source.files("validation"), self.source.files("calibration")
        except (DataError, ConfigError):
            return  # told already
        if _same(judging, own):
            needing = ", ".join(self.config.calibrated)
            yield Problem(
                ("data", "calibration"),
                f"data.calibration: {own.root} holds the images of data.validation, and ranges "
                f"({needing}) must not come from what judges them: name training images, or 'auto'",
            )

    def _classes(self) -> Problems:
        """Classes of the images that the network does not have."""
        try:
            files = self.source.files("validation")
            known, where = self._known_classes()
        except (ConfigError, DataError, ModelError):
            return  # told already
        if isinstance(files, Folders) and known:
            unknown = [name for name in files.classes if name not in known]
            if unknown:
                yield Problem(
                    ("data", "labels"),
                    f"data.labels: {where} does not name the class {shown(unknown[0])!r} of "
                    f"{files.root} ({len(unknown)} such classes): give the labels of the network, "
                    "in its order",
                )

    def _known_classes(self) -> tuple[Collection[str], str]:
        """Classes of the network as they are written down, and where; none where they are not."""
        stated = self.config.data.labels
        if stated == IMAGENET:
            return (), stated
        if stated is not None:
            return set(read_labels(self.source.labels_file(stated))[0]), stated
        return set(self.source.described.labels or ()), "the checkpoint"

    def _count(self, split: Split) -> int:
        """Number of images of a split, all of which call themselves images.

        Raises:
            DataError: The folders are arranged otherwise, or there are too few.
        """
        with about(f"data.{split}"):
            files = self.source.files(split)
            if isinstance(files, Files):
                return 0  # how many are in an archive is not told cheaply
            count = sum(len(images) for _, images in files.images())
            if split == "calibration" and not self.source.sets_aside and count < FEWEST:
                raise DataError(
                    f"{files.root} holds {count} images, and calibration needs at least {FEWEST}: "
                    "add images of the training split"
                )
            return count

    def _room(self, counts: dict[Split, int]) -> Problems:
        """Memory for the calibration images, disk for all that is decoded and built."""
        stated = self.config.preprocess
        if stated is None:
            return
        values = stated.size**2 * len(stated.mean)
        asked = self.config.calibration.images if self.calibrated else 0
        calibrating = min(asked, counts.get("calibration", 0))
        needed = calibrating * values * _BYTES
        if needed > machine.memory() / 2:
            yield Problem(
                ("calibration", "images"),
                f"calibration.images: {calibrating} images take {needed / 1e9:.3g} GB, this "
                f"process may use {machine.memory() / 1e9:.3g} GB: take fewer",
            )
        judged = counts.get("validation", 0)
        judged = min(judged, self.config.validation.images or judged)
        yield from self._disk((judged + calibrating) * values)

    def _disk(self, decoded: int) -> Problems:
        place = next(p for p in (f.absolute() for f in _upwards(self.config.folder)) if p.is_dir())
        free = shutil.disk_usage(place).free
        if decoded > free:
            yield Problem(
                ("output",),
                f"output: the decoded images take {decoded / 1e9:.3g} GB, and {place} has "
                f"{free / 1e9:.3g} GB left: free disk space, choose another folder, or judge on "
                "fewer images (validation.images)",
            )


def _upwards(folder: Path) -> Iterator[Path]:
    absolute = folder.absolute()
    yield from (absolute, *absolute.parents)


def _same(one: Folders | Files, other: Folders | Files) -> bool:
    """Whether two splits are the same files, as far as where they lie tells."""
    if type(one) is not type(other) or one.root.resolve() != other.root.resolve():
        return False
    names = (one.names if isinstance(one, Files) else None, getattr(other, "names", None))
    return names[0] == names[1]


def _keys_of(message: str) -> KeyPath:
    """Keys of the configuration with which a message begins, such as "model.checkpoint: …"."""
    match = re.match(r"(model|data|preprocess|calibration)((?:\.\w+)*)(:| is )", message)
    return (match[1], *match[2].split(".")[1:]) if match else ()


def _unknown_name(stated: str) -> Problems:
    """Why no network is called so; nothing where one is, or where that is not told cheaply."""
    architecture = stated.removeprefix(TIMM_PREFIX).partition(".")[0]
    if any(architecture in names for names in _names_by_source()):
        return
    if known := known_names():
        hint = nearest(architecture, sorted(known)) or "; timm.list_models() lists the known names"
        yield Problem(("model", "name"), f"model.name: unknown model {shown(stated)!r}{hint}")


def known_names() -> set[str]:
    """Names of networks, out of the sources of timm and of this project: nothing is imported."""
    return set().union(*_names_by_source())


def _names_by_source() -> Iterator[set[str]]:
    """Names of networks, by one source after the other, our own few first.

    A program that calls us may have registered more with timm.
    """
    for file in _sources("care"):
        yield _names_in(file)
    loaded = sys.modules.get("timm")
    if loaded is not None:
        yield set(loaded.list_models())
    for file in _sources("timm", "models"):
        yield _names_in(file)


def _names_in(file: Path) -> set[str]:
    return set(_REGISTERED.findall(file.read_text("utf-8", "replace")))


def _sources(package: str, *below: str) -> Iterator[Path]:
    spec = find_spec(package)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(place, *below).glob("*.py"))
