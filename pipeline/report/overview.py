"""The run as a whole: how it ended, what to know first, which figures are missing and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.core.figures import State
from pipeline.report import facts, text, view
from pipeline.report.results import Results

EXIT_CODES = {
    0: "fine",
    1: "a gate of the configuration does not hold",
    2: "something that was given does not make sense",
    3: "a build failed",
    4: "this machine lacks the hardware or software",
}


@dataclass(frozen=True)
class Verdict:
    """How the run ended, in one line.

    Attributes:
        good: Whether nothing failed.
        line: The words.
        lines: Failures and gates that do not hold, one each.
    """

    good: bool
    line: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Missing:
    """Figures that were not measured, or were emulated, for one reason.

    Attributes:
        what: Such as "accuracy of trt/fp16, trt/int8".
        why: The reason.
    """

    what: tuple[str, ...]
    why: str


def verdict(results: Results) -> Verdict:
    """How the run ended; failures come before gates."""
    lines: dict[str, None] = {}
    for step in results["steps"]:
        if step["state"] == "failed":
            lines[f"{step['name']} failed: {step['why']}"] = None
        elif step["state"] == "skipped":
            lines[f"{step['name']} was skipped: {step['why']}"] = None
    known = {step["name"] for step in results["steps"] if step["state"] == "failed"}
    for artifact in results["artifacts"]:
        name = view.full_name(artifact)
        if artifact["failure"] and name not in known:
            lines[f"{name} failed: {artifact['failure']}"] = None
    failures = sum(" failed: " in line for line in lines)
    for gate in results["gates"]:
        lines[f"gate does not hold: {gate}"] = None
    code = results["exit_code"]
    counts = [(failures, "failure"), (len(results["gates"]), "gate that does not hold")]
    told = " and ".join(
        f"{count} {what if count == 1 else _plural(what)}" for count, what in counts if count
    )
    meaning = EXIT_CODES.get(code, "see the log")
    line = told or ("Everything was built, and no gate failed" if code == 0 else meaning)
    return Verdict(code == 0 and not told, f"{line} (exit code {code}: {meaning})", tuple(lines))


def _plural(what: str) -> str:
    return {"failure": "failures", "gate that does not hold": "gates that do not hold"}[what]


def alerts(results: Results, cards: Sequence[view.Card]) -> Iterator[str]:
    """What a reader should know before any figure, though nothing failed."""
    for one in cards:
        notes = next(a for a in results["artifacts"] if view.full_name(a) == one.name).get("notes")
        if count := facts.overflow(notes or {}):
            yield f"{one.name}: {count:,} values left the range of their type while it ran"
        for link in one.chain:
            if link.problem:
                yield f"{one.name} is outdated: {link.name} was {link.problem}; run again"
    calibration = (results.get("calibration") or {}).get("facts", {})
    yield from (f"calibration: {warning}" for warning in calibration.get("warnings", []))
    onnx = (results.get("onnx") or {}).get("facts", {})
    if onnx.get("why_not"):
        yield f"the graph was not simplified: {onnx['why_not']}"
    for target in results["bench"]:
        measured = view.bench_facts(results, target)
        load = measured.get("load_before", 0)
        granted = measured.get("machine", {}).get("cpus_granted", 1)
        if load > 0.5 * granted:
            yield (
                f"{target}: other processes kept {load:.1f} of {granted} CPUs busy before latency "
                "was measured; medians may be too high and intervals too wide"
            )


def choices(results: Results) -> Iterator[str]:
    """Which artifact of each target with several to use, and why not the others."""
    for target, choice in results.get("choice", {}).items():
        if not choice["why"]:
            continue
        use = f"{target}: use {choice['precision']}" if choice["precision"] else f"{target}: none"
        yield f"{use}; {'; '.join(f'{name}: {why}' for name, why in choice['why'].items())}"


def missing(results: Results, state: State) -> list[Missing]:
    """Accuracies and latencies in a state, by reason or executor."""
    found: dict[str, dict[str, list[str]]] = {}
    for artifact in results["artifacts"]:
        if artifact["failure"]:
            continue
        top1 = text.number(artifact["numbers"].get("top1"))
        for what, number in (("accuracy", top1), ("latency", text.number(artifact["latency"]))):
            if number.state is state:
                names = found.setdefault(view.origin(number), {}).setdefault(what, [])
                names.append(view.full_name(artifact))
    return [
        Missing(tuple(f"{what} of {', '.join(names)}" for what, names in kinds.items()), why)
        for why, kinds in found.items()
    ]
