"""Models that go to other programs, and measurements that come back from other machines."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline import check as checks
from pipeline.artifact import MANIFEST, Artifact, make
from pipeline.config import Config
from pipeline.console import QuietConsole
from pipeline.errors import ArtifactError, InputError
from pipeline.measure import Number
from pipeline.quiet import Log
from pipeline.run import LOG_FILE, locked, make_context, plan
from pipeline.stages.bench import BenchStep
from pipeline.targets.base import Network

IMPORTED = "imported.json"


def built(output: Path, name: str, target: str, precision: str | None) -> Artifact:
    """A built artifact, verified: the first of the target, or the one in `precision`.

    Raises:
        InputError: There is none.
        ArtifactError: It is damaged.
    """
    folder = checks.results(output, name)[0]
    there = sorted(path.parent for path in (folder / target).glob(f"*/{MANIFEST}"))
    found = [path for path in there if precision in (None, path.name)]
    if not found:
        known = ", ".join(path.name for path in there) or "none"
        raise InputError(f"{folder} has no {target} artifact in that precision; built are: {known}")
    artifact = Artifact.read(found[0])
    artifact.verify()
    return artifact


def export_triton(
    output: Path, name: str, repository: Path, *, target: str, precision: str | None
) -> str:
    """Write a built artifact into a Triton model repository; returns what was written.

    Raises:
        InputError: There is no such artifact, or Triton cannot run it.
    """
    from pipeline import triton

    artifact = built(output, name, target, precision)
    network = Network.from_facts(Artifact.read(output / name / "onnx"))
    return f"wrote {triton.export(artifact, network, repository)}"


def export_coreml_bench(output: Path, name: str, folder: Path, *, precision: str | None) -> str:
    """Write a Swift package that measures a Core ML artifact; returns what was written.

    Raises:
        InputError: There is no such artifact, or the folder holds something.
    """
    from pipeline.targets.coreml.bench_package import write_bench_package

    return f"wrote {write_bench_package(built(output, name, 'coreml', precision), folder)}"


def import_coreml(config: Config, file: Path) -> str:
    """Take over what was measured on a device, so that reports show it; returns what was taken.

    The measurement belongs to the artifact whose package has the digest that the file names. It is
    kept as the target's measurement until the artifact or the configuration changes.

    Raises:
        DataError: The file is no measurement.
        ArtifactError: It is one of a model that was not built here.
    """
    from pipeline.targets.coreml import results

    measured = results.read(file)
    figures = results.numbers(measured)
    units = "all" if "all" in figures else next(iter(figures))
    with locked(config.folder):
        log = Log(config.folder / LOG_FILE)
        try:
            context = make_context(config, log, QuietConsole(log.stream))
            step = _bench_step(plan(context))
            precision = _precision_of(step, results, measured)
            why = "another precision was measured"
            latency = {
                each.precision: figures[units]["predict"]
                if each.precision == precision
                else Number.not_measured(why, unit="ms")
                for each in step.builds
            }

            def write(folder: Path) -> dict[str, Any]:
                shutil.copyfile(file, folder / IMPORTED)
                return {
                    "target": step.runtime.name,
                    "latency": {name: number.to_dict() for name, number in latency.items()},
                    "imported": {
                        unit: {phase: number.to_dict() for phase, number in phases.items()}
                        for unit, phases in figures.items()
                    },
                    "device": measured.device.model_dump(mode="json"),
                    "date": measured.measured_at.strftime("%Y-%m-%d"),
                }

            make(
                step.folder,
                kind=step.stage,
                name=step.name,
                key=step.key(),
                made_from=step.made_from(),
                tools=step.tools(),
                build=write,
            )
        finally:
            log.close()
    median = figures[units]["predict"].value
    return (
        f"coreml/{precision}: {median:.3f} ms on {measured.device.model} ({units}), from {file}; "
        "python -m pipeline run shows it in the report"
    )


def _bench_step(steps: list[Any]) -> BenchStep:
    found = [s for s in steps if isinstance(s, BenchStep) and s.runtime.name == "coreml"]
    if not found:
        raise InputError("the configuration has no target coreml: add it under targets")
    return found[0]


def _precision_of(step: BenchStep, results: Any, measured: Any) -> str:
    """The precision of the artifact that was measured."""
    problem: ArtifactError | None = None
    for build in step.builds:
        artifact = build.artifact()
        try:
            results.check(measured, artifact, artifact.folder / "model.mlpackage")
        except ArtifactError as error:
            problem = error
        else:
            return build.precision
    raise problem or InputError("no Core ML artifact is built: run python -m pipeline run first")
