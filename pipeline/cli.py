"""The command line: parses, calls, prints; nothing else.

Modules are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from gc import set_threshold
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pipeline.core.commandline import Group, argument, option
from pipeline.core.garbage import GARBAGE
from pipeline.core.inputs import expanded, why_no_output, why_no_path
from pipeline.core.words import nearest_or_all, printable, shown
from pipeline.targets.registry import TARGETS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from pipeline.api.files import Stated
    from pipeline.config import Config

    ParamType = click.ParamType[str]
    PathType = click.ParamType[Path]
    NumbersType = click.ParamType[tuple[float, ...]]
else:
    ParamType = PathType = NumbersType = click.ParamType  # generic since click 8.2 only


Command = Callable[..., Any]


class TargetName(ParamType):
    """The name of a target, or one of some further words."""

    name = "target"

    def __init__(self, *further: str) -> None:
        self.further = further

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The known names, for help."""
        return f"[{'|'.join(self._names())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse what is no target."""
        if value not in self._names():
            self.fail(f"{value!r} is no target{nearest_or_all(str(value), self._names())}", param)
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The names that begin so."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in self._names() if name.startswith(incomplete)]

    def _names(self) -> list[str]:
        return [*TARGETS, *self.further]


class Seconds(click.FloatRange):
    """A time; what is no number of seconds is none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Refuse NaN as well, which lies in every range."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds


class UserPath(PathType):
    """A path that can be one, with the home folder for `~`.

    Args:
        why_not: What keeps it from being used, for the rest of a sentence; None if nothing does.
    """

    name = "path"

    def __init__(self, why_not: Callable[[str], str | None]) -> None:
        self.why_not = why_not

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Refuse what the operating system would."""
        path = expanded(str(value))
        if problem := self.why_not(path):
            self.fail(f"{shown(path)} {problem}", param, ctx)
        return Path(path)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Files and folders, which the shell knows."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


class ResultsName(ParamType):
    """The name of results, as a configuration may call them: one folder, not a way out of it."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse what no results are called."""
        from pipeline.config import RESULTS_NAME

        if not re.match(RESULTS_NAME, str(value)) or why_no_path(str(value)):
            self.fail(
                f"{value!r} is no name of results: give the `name` of their configuration", param
            )
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The results that there are."""
        from click.shell_completion import CompletionItem

        from pipeline.core.errors import InputError
        from pipeline.steps.folders import results_folders

        try:
            folders = results_folders(Path(ctx.params.get("output") or "engines"))
        except InputError:
            return []
        names = [folder.name for folder in folders]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


PATH = UserPath(why_no_path)
FOLDER = UserPath(lambda path: why_no_output(Path(path)))
RESULTS = ResultsName()
TARGET = TargetName()
STAGES = ("export", "simplify", "calibrate", "precision", "build", "validate", "bench", "report")

OUTPUT = option(
    "--output",
    type=FOLDER,
    default=Path("engines"),
    show_default=True,
    help="Folder of the results.",
)
CONFIG = option(
    "--config",
    type=PATH,
    default=Path("pipeline.yaml"),
    show_default=True,
    help="The configuration whose results to take.",
)
FIRST_PRECISION = option("--precision", help="Default: the first of the configuration.")
USED_PRECISION = option("--precision", help="Default: the one that the report says to use.")


class Numbers(NumbersType):
    """Numbers with commas between them, such as 0.485,0.456,0.406."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Refuse what is none."""
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} are no numbers: write them as 0.485,0.456,0.406", param, ctx)
        if not all(math.isfinite(number) for number in numbers):
            self.fail(f"{value!r} holds what is not finite", param, ctx)
        return numbers


OF_A_FILE = (
    option("--labels", help="Classes of a model's file: a text file, or imagenet-1k."),
    option("--size", type=click.IntRange(1, 4096), help="Of the images of a model's file."),
    option(
        "--crop",
        type=click.FloatRange(0, 1, min_open=True),
        help="Share of the shorter side that is kept; default: what the file says, or 0.875.",
    ),
    option("--mean", type=Numbers(), help="By channel, for pixels of 0 to 1."),
    option("--std", type=Numbers(), help="By channel, for pixels of 0 to 1."),
)
"""What a model's file may not say of itself."""


def of_a_file(command: Command) -> Command:
    """Add the options of a model's file."""
    for add in reversed(OF_A_FILE):
        command = add(command)
    return command


def of_a_graph(command: Command) -> Command:
    """Add those of them that say how images become a graph's input."""
    for add in reversed(OF_A_FILE[1:]):
        command = add(command)
    return command


def stated_of(options: dict[str, Any]) -> Stated:
    """Take the options of a model's file out of a command's options."""
    from pipeline.api.files import Stated

    return Stated(**{name: options.pop(name) for name in ("labels", "size", "crop", "mean", "std")})


ALONE = option(
    "--artifact",
    "artifacts",
    type=PATH,
    multiple=True,
    metavar="FOLDER",
    help="The folder of an artifact, wherever it lies, in place of --target.",
)
DATA = option(
    "--data",
    help="With --artifact: images, such as folder:PATH; default: its golden ones.",
)

AS_CPU = option(
    "--as-cpu",
    type=click.Choice(("avx512-vnni", "avx512", "avx2-vnni", "avx2")),
    help="As on a CPU of this class (ort): the real kernels, chosen as a lesser CPU would.",
)

EXIT_CODES = """
\b
Exit codes:
  0    fine
  1    a gate of the configuration does not hold, or an artifact is damaged
  2    something that was given does not make sense
  3    a build failed
  4    this machine lacks the hardware or software
  70   an unforeseen fault of this program
  130  interrupted; 143, 129: ended by SIGTERM, SIGHUP; 141: nobody reads the output
"""


@click.group(cls=Group, epilog=EXIT_CODES, context_settings={"max_content_width": 100})
@click.version_option(package_name="care-deploy", prog_name="pipeline")
def main() -> None:
    """Build, validate and measure TensorRT, ONNX Runtime and Core ML models of one network."""
    set_threshold(*GARBAGE)
    # pydantic would read what every installed package says of itself, for plugins that watch it: a
    # fiftieth of a run with nothing to do, and configurations need none.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


@main.command(epilog=EXIT_CODES)
@argument("config", type=PATH, default=Path("pipeline.yaml"))
@option("--dry-run", is_flag=True, help="Only print what would run, and why.")
@option("--only", type=click.Choice(STAGES), multiple=True, help="Only these stages.")
@option("--from", "start", type=click.Choice(STAGES), help="Run anew from this stage on.")
@option("--target", "targets", type=TARGET, multiple=True, help="Only these targets.")
@option("--force", is_flag=True, help="Run what is selected even if it is up to date.")
@option("--wait", type=float, default=0.0, help="Seconds to wait for another run.")
@option(
    "--jobs",
    type=click.IntRange(1, 64),
    default=1,
    help="Steps, and shards of a long validation, at once; what measures is alone.",
)
@option(
    "--scheduler",
    metavar="ADDRESS",
    help="Steps on the workers of a Dask scheduler, tls://HOST:PORT; needs a store.",
)
@option(
    "--insecure", is_flag=True, help="Take a scheduler on another machine without TLS (tcp://)."
)
@option(
    "--audit",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="SHARE",
    help="Make a share of the steps once more, on another worker or in another process, and fail "
    "where the digests differ.",
)
@option("--quiet", is_flag=True, help="Show failures and the final table only.")
@option("--log-json", is_flag=True, help="Write one JSON object a line instead.")
@option("-v", "--verbose", is_flag=True, help="Also show what goes to the log.")
@option("--junit", type=PATH, help="Also write steps and gates as JUnit XML, for CI.")
@click.pass_context
def run(
    ctx: click.Context,
    config: Path,
    dry_run: bool,
    only: tuple[str, ...],
    start: str | None,
    targets: tuple[str, ...],
    force: bool,
    wait: float,
    jobs: int,
    scheduler: str | None,
    insecure: bool,
    audit: float,
    quiet: bool,
    log_json: bool,
    verbose: bool,
    junit: Path | None,
) -> None:
    """Build, validate and measure all that CONFIG names.

    CONFIG is a file; default: pipeline.yaml. What cannot succeed is told first, all of it, and
    nothing is written then. Only what is out of date runs. A target that fails does not stop
    the others.
    """
    from pipeline import config as configuration
    from pipeline.commands import run
    from pipeline.scheduler.plan import Selection

    written = run.with_fleet(configuration.read(config), scheduler, insecure)
    if jobs > 1 and written.config.fleet is not None:
        raise click.UsageError("--jobs is for processes here, a scheduler for workers: choose one")
    selection = Selection(only, start, targets, force)
    if dry_run:
        show(run.dry_run(written, selection))
        return
    look = "json" if log_json else "quiet" if quiet else "rich"
    code = run.run(
        written,
        config,
        selection,
        look=look,
        wait_s=wait,
        jobs=jobs,
        audit=audit,
        verbose=verbose,
        junit=junit,
    )
    ctx.exit(code)


@main.command()
@argument("scheduler", required=False, metavar="[SCHEDULER]")
@option("--no-bench", is_flag=True, help="Others work on this machine: measure elsewhere.")
def worker(scheduler: str | None, no_bench: bool) -> None:
    """Print the command that makes this machine a worker of a run.

    SCHEDULER is the address that `run --scheduler` is given, tls://HOST:PORT. What the machine
    has is what `doctor` finds; why it lacks the rest is said on the error stream.
    """
    from pipeline.commands import worker

    line, remarks = worker.command(scheduler, bench=not no_bench)
    for remark in remarks:
        click.echo(printable(remark), err=True)
    show(line)


@main.command()
@argument("file", type=PATH, metavar="SWEEP.yaml")
@option(
    "--jobs",
    type=click.IntRange(1, 64),
    default=1,
    help="Steps, and shards of a long validation, at once; what measures is alone.",
)
@option("--quiet", is_flag=True, help="Show failures and the tables only.")
@click.pass_context
def sweep(ctx: click.Context, file: Path, jobs: int, quiet: bool) -> None:
    """Run several configurations, and put all into one table.

    SWEEP.yaml names them: `configurations: [a.yaml, b.yaml]`, relative to itself, and where the
    table goes: `output: FOLDER`. It marks what no other artifact beats, by latency and by size.
    """
    from pipeline.commands import sweep

    text, code = sweep.run_all(file, look="quiet" if quiet else "rich", jobs=jobs)
    show(text)
    ctx.exit(code)


def show(text: str) -> None:
    """Print plain text; names in it are other people's, and no terminal obeys them."""
    click.echo(printable(text))


def in_json(value: Any, *, indent: int | None = None) -> str:
    """A value for programs."""
    import json  # here: help needs none, and it takes a thirtieth of its time

    return json.dumps(value, indent=indent)


def load_config(path: Path) -> Config:
    """Read the configuration; a missing pipeline.yaml is a common first mistake."""
    from pipeline import config

    return config.load(path)


@main.command()
@argument("what", type=PATH, required=False, metavar="[NAME|PATH]")
@OUTPUT
@option("--key", type=PATH, help="Public key, PEM, of who should have signed the bundle.")
@click.pass_context
def check(ctx: click.Context, what: Path | None, output: Path, key: Path | None) -> None:
    """Verify what lies in engines/, or came alone.

    Hashes, the chain to the checkpoint, and every model. NAME is one of the results. PATH is
    what came alone, and needs nothing else here: an artifact's folder; or a bundle, packed or
    unpacked.
    """
    from pipeline.commands import check

    if what is not None and check.is_alone(what):
        ctx.exit(check.check_alone(what, key))
    if key is not None:
        raise click.UsageError("--key is for a bundle: name its archive or folder")
    ctx.exit(check.check(output, None if what is None else RESULTS(str(what))))


@main.command()
@option(
    "--target",
    type=TargetName("torch"),
    help="What to measure; torch is the baseline alone.",
)
@ALONE
@DATA
@CONFIG
@option("--batch", type=click.IntRange(1), multiple=True, help="Batch sizes.")
@option("--threads", type=click.IntRange(1), help="CPU threads.")
@option("--precision", multiple=True, help="Only these precisions.")
@option("--samples", type=click.IntRange(1), help="Timed calls.")
@option("--warmup", type=click.IntRange(1), help="Calls before the first timed one.")
@option("--max-seconds", type=Seconds(0, min_open=True), help="Time limit.")
@option("--profile", is_flag=True, help="Also show the time by operator (ort).")
@option("--contended", is_flag=True, help="Beside one busy process for every two granted CPUs.")
@option(
    "--sustained",
    type=Seconds(0, 24 * 3600, min_open=True),
    metavar="SECONDS",
    help="Also call each artifact so long without a rest: does it slow down?",
)
@AS_CPU
@option(
    "--import",
    "imported",
    type=PATH,
    help="Take over what was measured on a device (coreml, coreai): our JSON, or Xcode's .mlperf "
    "(coreml).",
)
@option(
    "--device",
    metavar="KIND",
    help="Measure on a device connected to this machine (coreml, coreai: mac, iphone or ipad); "
    "with --import: refuse results of other kinds.",
)
@option("--json", "json_only", is_flag=True, help="Print the JSON object only.")
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    target: str | None,
    artifacts: tuple[Path, ...],
    data: str | None,
    json_only: bool,
    imported: Path | None,
    device: str | None,
    **options: Any,
) -> None:
    """Measure latency: a table, and one JSON object as the last line.

    The target's artifacts must have been built by `run`; with --artifact, their folders are enough.
    Off the right hardware it says what is missing and exits with code 4; with code 1 where timed
    calls answer something else than was judged.
    """
    from pipeline.commands import bench

    target = _one_of(target, artifacts, data)
    if target is None:
        from pipeline.commands import alone

        chosen = [name for name in _OF_RUNS if options.pop(name)]
        if chosen or imported is not None or device is not None:
            raise click.UsageError(
                "--precision, --profile, --contended, --as-cpu, --device and --import are for "
                "--target"
            )
        del options["config"]
        report = alone.bench_alone(artifacts, data=data, **options)
        _print_report(report.text, report.plain, json_only)
        return
    config = load_config(options.pop("config"))
    if imported is not None or device is not None:
        from pipeline.commands import devices

        chosen = options["precision"]
        if options["sustained"] is not None:
            raise click.UsageError("--sustained measures on this machine: leave out --device")
        if target not in TARGETS:
            raise click.UsageError(f"--import and --device measure a target, not {target}")
        if imported is not None:
            text = devices.import_measurements(
                config, target, imported, precisions=chosen, device=device
            )
        else:
            assert device is not None
            samples = options["samples"]
            text = devices.measure_on(config, target, device, precisions=chosen, samples=samples)
        show(text)
        return
    report = bench.bench(config, target, **options)
    _print_report(report.text, report.plain, json_only)
    ctx.exit(report.exit_code)


_OF_RUNS = ("precision", "profile", "contended", "as_cpu")
"""Options of `bench` that need the configuration of a run."""


def _one_of(target: str | None, artifacts: tuple[Path, ...], data: str | None) -> str | None:
    """The target that is asked for; None for artifacts that lie alone.

    Raises:
        UsageError: Neither or both are named, or images without an artifact.
    """
    if (target is None) == (not artifacts):
        raise click.UsageError(
            "name --target, for what a run of the configuration built, or --artifact FOLDER"
        )
    if data is not None and not artifacts:
        raise click.UsageError("--data is for --artifact; a configuration names its own images")
    return target


def _print_report(text: str, plain: dict[str, Any], json_only: bool) -> None:
    if not json_only:
        click.echo(text)
    click.echo(in_json(plain))


@main.command()
@option("--target", type=TARGET, help="Whose artifacts to judge.")
@ALONE
@DATA
@CONFIG
@option("--precision", multiple=True, help="Only these precisions.")
@AS_CPU
@option("--json", "json_only", is_flag=True, help="Print the JSON object only.")
def validate(
    target: str | None,
    artifacts: tuple[Path, ...],
    data: str | None,
    config: Path,
    precision: tuple[str, ...],
    as_cpu: str | None,
    json_only: bool,
) -> None:
    """Judge accuracy: a table, and one JSON object as the last line.

    On the images that `run` decoded, against PyTorch's answers; nothing is kept. With --artifact a
    folder is enough: on its golden images it has to give what it gave where it was built (else exit
    code 1), and --data names others, with their classes. With --as-cpu, says what is missing and
    exits with code 4 where this machine cannot play that class.
    """
    from pipeline.commands import validate

    target = _one_of(target, artifacts, data)
    if target is None:
        from pipeline.commands import alone

        if precision or as_cpu:
            raise click.UsageError("--precision and --as-cpu are for --target")
        judged = alone.validate_alone(artifacts, data=data)
    else:
        judged = validate.validate(load_config(config), target, precision=precision, as_cpu=as_cpu)
    _print_report(judged.text, judged.plain, json_only)


@main.command()
@option(
    "--model",
    help="care_s0, timm/NAME, package.module:callable, graph.onnx or hub:ORG/REPOSITORY; default: "
    "what the checkpoint says.",
)
@option(
    "--checkpoint",
    help="A file; or embedded, pretrained (timm's), random, or own (what the callable gives its "
    "network). Graphs and repositories hold their weights.",
)
@option(
    "--data",
    required=True,
    help="Images with their classes: folder:PATH, tar:PATH, wds:PATTERN or fashion-mnist.",
)
@option("--calibration", help="Training images; default: those of --data, if it has any.")
@option("--labels", help="The network's classes, a line each, or imagenet-1k.")
@option("--name", type=RESULTS, help="Name of the results; default: the network's.")
@option(
    "--target",
    "targets",
    multiple=True,
    metavar="TARGET[/PRECISION]",
    help="Such as ort, or ort/fp32; default: trt, ort and coreml in their usual precisions.",
)
@option(
    "--file",
    type=PATH,
    default=Path("pipeline.yaml"),
    show_default=True,
    help="Where to write the configuration; a new file.",
)
@of_a_graph
def init(file: Path, **wanted: Any) -> None:
    """Write a first configuration for a checkpoint and images."""
    from pipeline import config as configuration
    from pipeline.api.files import Stated
    from pipeline.commands import init, run
    from pipeline.scheduler.plan import Selection

    images = Stated(**{name: wanted.pop(name) for name in ("size", "crop", "mean", "std")})
    first = init.first(init.Wanted(**wanted, images=images), file)
    run.refuse_wrong(first.written)
    show(init.write(first, file))
    show(run.dry_run(configuration.read(file), Selection()))
    show(f"build it with: python -m pipeline run {file}")


@main.command()
@argument("folders", nargs=-1, required=True, type=PATH, metavar="[OLD] NEW")
@option(
    "--baseline",
    type=PATH,
    help="In place of OLD, how it was: a results' folder, an entry of a `history`, or 'previous'.",
)
@option(
    "--with",
    "requirements",
    multiple=True,
    metavar="PACKAGE==VERSION",
    help="In place of --baseline: what would this version change? It is installed aside.",
)
@option(
    "--python",
    type=PATH,
    help="In place of --with: the interpreter of an environment that is there.",
)
@option("--markdown", type=PATH, help="Also write it for a pull request.")
@option("--html", type=PATH, help="Also write a page with the images that changed.")
@option("--junit", type=PATH, help="Also write it as JUnit XML, for CI.")
@option("--json", "json_file", type=PATH, help="Also write all of it as JSON.")
@click.pass_context
def compare(
    ctx: click.Context,
    /,
    folders: tuple[Path, ...],
    baseline: Path | None,
    requirements: tuple[str, ...],
    python: Path | None,
    **files: Any,
) -> None:
    """Compare two results: accuracy by image, size, versions.

    NEW and OLD are folders of results. A results' folder keeps the last 20 results in its
    folder `history`; 'previous' is the newest that is not what lies there now. Exit code 1
    where the new run is proven to be worse: where the 95 % interval of the paired difference of
    top-1 excludes zero, or an artifact is gone.

    With --with or --python NEW is how it is, and what another environment makes of the same
    configuration is held against it: what its versions concern is built and judged once more,
    in a temporary folder. Neither this environment nor NEW is changed.
    """
    from pipeline.commands import compare

    *before, new = folders
    if len(before) > 1:
        raise click.UsageError("give two folders at most: how it was, and how it is")
    given = [bool(before), baseline is not None, bool(requirements), python is not None]
    if sum(given) != 1:
        raise click.UsageError("give one of OLD, --baseline, --with and --python")
    baseline = before[0] if before else baseline
    if baseline is not None:
        ctx.exit(compare.compare(baseline, new, **files))
    ctx.exit(compare.compare_rebuilt(new, requirements, python, **files))


@main.command()
@argument("images", nargs=-1, required=True, metavar="IMAGE...")
@option(
    "--artifact",
    default="ort",
    show_default=True,
    help="A target, such as ort or trt/fp16, the folder of any built artifact, or a model's file.",
)
@of_a_file
@OUTPUT
@option("--name", type=RESULTS, help="Which results, if there are several.")
@option("--top", type=click.IntRange(1), default=5, show_default=True, help="How many.")
@option("--threads", type=click.IntRange(1), help="CPU threads.")
@option("--json", "as_json", is_flag=True, help="Print a JSON object an image.")
def predict(images: tuple[str, ...], artifact: str, **options: Any) -> None:
    """Say which classes images show.

    IMAGE... are files, folders of images, or - for a list of files. A built model answers,
    prepared by its own preprocessing. Where its runtime is missing, the executor answers that
    stands for it, and the output says so. An ONNX graph or a Core ML package of whomever, as
    the artifact or as the first IMAGE, answers by what the options say of it; an engine of
    TensorRT, by what its artifact's folder says.
    """
    from pipeline.commands import predict

    stated = stated_of(options)
    predict.predict(images, artifact, stated=stated, **options)


@main.command()
@argument("model", type=PATH)
@of_a_file
@option("--images", type=PATH, help="A folder of images; default: seeded noise.")
@option("--limit", type=click.IntRange(1, 4096), default=32, show_default=True, help="Most images.")
@option("--top", type=click.IntRange(1), default=10, show_default=True, help="Tensors shown.")
@option("--json", "json_only", is_flag=True, help="Print the JSON object only.")
def inspect(model: Path, json_only: bool, **options: Any) -> None:
    """Say what is in MODEL, and whether float16 holds it.

    MODEL is an ONNX graph or a Core ML package. Operations, inputs, outputs, and the largest
    values in float32: how often they fit into float16. Of an engine of TensorRT, in its
    artifact's folder, what was written down when it was built.
    """
    from pipeline.commands import inspect

    stated = stated_of(options)
    found = inspect.inspect(model, stated, **options)
    show(in_json(found.plain) if json_only else found.text)


@main.command()
@CONFIG
@option(
    "--method",
    type=click.Choice(("min-max", "percentile", "entropy", "mse")),
    help="How ranges are chosen; default: as the configuration says.",
)
@option(
    "--stored",
    type=click.Choice(("int8", "uint8")),
    default="int8",
    show_default=True,
    help="Symmetric int8 (TensorRT, Core ML) or asymmetric uint8 (ONNX Runtime).",
)
@option("--limit", type=click.IntRange(1), help="Show only those that are clipped most.")
def calibrate(config: Path, method: str | None, stored: str, limit: int | None) -> None:
    """Show ranges and histograms over the calibration images.

    Of every tensor.
    """
    from pipeline.commands import calibrate

    loaded = load_config(config)
    show(calibrate.calibrate(loaded, method=method, stored=stored, limit=limit))


@main.group()
def export() -> None:
    """Write what was built in the form that another program takes."""


@export.command()
@argument("name", type=RESULTS)
@OUTPUT
@option(
    "--repository",
    type=PATH,
    default=Path("triton"),
    show_default=True,
    help="Triton's model repository; other models in it stay.",
)
@option(
    "--target",
    type=TARGET,
    default="ort",
    show_default=True,
    help="Which artifact; an engine only if full TensorRT built it.",
)
@USED_PRECISION
def triton(name: str, output: Path, repository: Path, target: str, precision: str | None) -> None:
    """Write NAME as a model of NVIDIA Triton Inference Server."""
    from pipeline.commands import export

    show(export.export_triton(output, name, repository, target=target, precision=precision))


@export.command()
@argument("name", type=RESULTS)
@OUTPUT
@option(
    "--folder",
    type=PATH,
    default=Path("golden"),
    show_default=True,
    help="Where the kit shall lie; a new folder.",
)
@option(
    "--target",
    type=TARGET,
    default="ort",
    show_default=True,
    help="Whose artifact.",
)
@USED_PRECISION
def golden(name: str, output: Path, folder: Path, target: str, precision: str | None) -> None:
    """Write what a device checks an artifact of NAME with.

    Images, logits and programs.
    """
    from pipeline.commands import export

    show(export.export_golden(output, name, folder, target=target, precision=precision))


@export.command()
@argument("name", type=RESULTS)
@OUTPUT
@option(
    "--folder",
    type=PATH,
    default=Path("coreml-bench"),
    show_default=True,
    help="Where the Swift package shall lie; a new folder.",
)
@option(
    "--target",
    type=TARGET,
    default="coreml",
    show_default=True,
    help="Whose model.",
)
@USED_PRECISION
def coreml_bench(name: str, output: Path, folder: Path, target: str, precision: str | None) -> None:
    """Write a Swift package that measures a model on a device.

    The Core ML or Core AI model of the results NAME.
    """
    from pipeline.commands import export

    written = export.export_coreml_bench(output, name, folder, target=target, precision=precision)
    show(written)


@main.command()
@argument("model", type=PATH, required=False)
@option("--reference", type=PATH, help="What is right, of a model's file: another one.")
@of_a_file
@option("--photos", type=PATH, help="Images for a model's file; default: seeded noise.")
@option("--target", type=TARGET, help="Default: the first configured one that can tell.")
@CONFIG
@FIRST_PRECISION
@option(
    "--images", type=click.IntRange(1, 64), default=4, show_default=True, help="How many images."
)
@option("--json", "json_only", is_flag=True, help="Print the JSON object only.")
def diff(
    model: Path | None,
    reference: Path | None,
    photos: Path | None,
    images: int,
    json_only: bool,
    **options: Any,
) -> None:
    """Compare a built model with PyTorch layer by layer.

    It says where the error jumps. With MODEL, an ONNX graph or a Core ML package of whomever,
    or an engine of TensorRT in its artifact's folder, its answers are compared with those of
    --reference, and the layers of two ONNX graphs, too.
    """
    from pipeline.commands import diff

    stated = stated_of(options)
    if (model is None) != (reference is None):
        raise click.UsageError("give a model's file and, with --reference, what is right")
    if model is not None and reference is not None:
        found = diff.diff_files(model, reference, stated, images=photos, limit=images)
    else:
        config = load_config(options["config"])
        found = diff.diff(config, options["target"], precision=options["precision"], images=images)
    show(in_json(found.plain) if json_only else found.text)


@main.command()
@argument("model", type=PATH, metavar="MODEL.onnx")
@option("--target", type=TARGET, default="trt", show_default=True, help="Whose builder.")
@option("--precision", default="fp16", show_default=True, help="One of the target's.")
@option(
    "--output",
    type=PATH,
    default=Path("reduced.onnx"),
    show_default=True,
    help="Where the part goes, a new file; its inputs go beside it as .npz.",
)
@option(
    "--reference", type=PATH, help="The float32 graph, if MODEL.onnx is in a precision already."
)
@option(
    "--images",
    type=PATH,
    help="A folder of images, or a .npy file of what the network takes; default: seeded noise.",
)
@option("--batch", type=click.IntRange(1, 64), default=1, show_default=True, help="Images.")
@option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="After how long no further part is tried.",
)
def reduce(model: Path, minutes: float, **options: Any) -> None:
    """Find the smallest part of MODEL.onnx that shows a fault.

    A builder dies with it, or a layer jumps. For a bug report: a small ONNX graph with the
    values of its inputs. MODEL.onnx is converted to the precision first, if it is in float32.
    Whatever the builder dies of, the search goes on.
    """
    from pipeline.commands import reduce

    job = reduce.Job(model, seconds=60 * minutes, **options)
    show(reduce.reduce(job, lambda line: click.echo(printable(line), err=True)))


@main.command()
@argument("model", type=PATH)
@option("--output", type=PATH, required=True, help="Where the repaired graph goes; a new file.")
@option(
    "--precision",
    type=click.Choice(("fp16", "bf16", "int8", "fp8")),
    default="fp16",
    show_default=True,
    help="What all computes in but for what is raised.",
)
@option(
    "--target",
    type=TARGET,
    default="trt",
    show_default=True,
    help="Whose 8 bits; ort has int8 alone, with blocks in float32.",
)
@option(
    "--images",
    type=PATH,
    help="A folder of images, or preprocessed ones as a .npy file: one half chooses, the other "
    "verifies.",
)
@option("--noise", type=click.IntRange(1, 256), help="So many images of seeded noise.")
@option(
    "--limit",
    type=click.IntRange(1, 4096),
    default=64,
    show_default=True,
    help="Most images of a folder.",
)
@option("--size", type=click.IntRange(1, 4096), help="Of images, if the graph leaves it open.")
@option("--reference", type=PATH, help="A float32 graph that must give the same answers.")
@option("--headroom", type=float, help="How often each value fits into its type; default: 4.")
@option("--max-error", type=float, help="Relative error of the logits; default: 0.05 for fp16.")
@option("--max-top1-drop", type=float, help="Share of answers lost; default: 0.003.")
@option("--max-share", type=float, help="Share of the products that may be raised; default: 0.5.")
@option("--no-bfloat16", is_flag=True, help="Raise to float32 alone, as for RTX 20.")
@option(
    "--reduce",
    "reduces",
    is_flag=True,
    help="Mend nothing: write the smallest part that fails, as the command reduce does.",
)
@option("--json", "json_only", is_flag=True, help="Print the JSON object only.")
def repair(json_only: bool, no_bfloat16: bool, reduces: bool, **options: Any) -> None:
    """Mend MODEL where half precision or 8 bits break it.

    MODEL is a float32 ONNX graph. The fewest parts compute in bfloat16 or float32 with which
    all values and the answers hold, by the strict executor. A table, and one JSON object as the
    last line. Exit code 1 where nothing holds the limits: the message says how near it came.
    """
    from pipeline.commands import repair

    if reduces:
        _reduce_instead(click.get_current_context(), options)
        return
    names = ("headroom", "max_error", "max_top1_drop", "max_share")
    stated = {name: options.pop(name) for name in names}
    limits = {name: value for name, value in stated.items() if value is not None}
    report = repair.repair(repair.Wanted(**options, bfloat16=not no_bfloat16, limits=limits))
    if not json_only:
        show(report.text)
    click.echo(in_json(report.plain))


def _reduce_instead(context: click.Context, options: Mapping[str, Any]) -> None:
    """Do as `reduce` does, with what `repair` was given.

    Raises:
        click.UsageError: An option is given that only mends.
    """
    taken = ("model", "output", "precision", "target", "images", "reference")
    for parameter in context.command.params:
        name = str(parameter.name)
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in (*taken, "reduces"):
            raise click.UsageError(
                f"--reduce mends nothing, and takes no {parameter.opts[0]}; the command reduce has "
                "more options"
            )
    context.invoke(reduce, **{name: options[name] for name in taken})


@main.command()
@argument(
    "what", type=PATH, default=Path("pipeline.yaml"), metavar="[CONFIG|FOLDER]", required=False
)
@option("--artifact", metavar="TARGET/PRECISION", help="Judge this one; default: PyTorch.")
@option("--data", help="With FOLDER: images with their classes, such as folder:PATH.")
@option(
    "--images",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Most images, evenly over those that judge.",
)
@option("--json", "json_only", is_flag=True, help="Print the JSON object only.")
def resizes(
    what: Path, artifact: str | None, data: str | None, images: int, json_only: bool
) -> None:
    """Measure what it costs to prepare images as applications do.

    A table, then a JSON object. Other filters (Pillow's, OpenCV's, torchvision's with and
    without antialias), other roundings and crops, reduced JPEGs, swapped colours, a wrong mean:
    each against the network's own preprocessing on the same images, with the paired interval of
    what top-1 loses. CONFIG's network answers, or an artifact that runs on this machine; FOLDER
    is an artifact's, wherever it lies.
    """
    from pipeline.commands import resizes

    if what.is_dir():
        if artifact is not None:
            raise click.UsageError("--artifact is for a configuration: FOLDER is an artifact's")
        if data is None:
            raise click.UsageError("an artifact's folder needs images: give --data folder:PATH")
        found = resizes.resizes_alone(what, data, images)
    else:
        if data is not None:
            raise click.UsageError("--data is for FOLDER; a configuration names its own images")
        found = resizes.resizes(load_config(what), artifact, images)
    _print_report(found.text, found.plain, json_only)


@main.command()
@option("--target", type=TARGET, help="Default: the first that can tell.")
@CONFIG
@FIRST_PRECISION
@option(
    "--images", type=click.IntRange(1, 256), default=16, show_default=True, help="How many images."
)
def fitness(target: str | None, config: Path, precision: str | None, images: int) -> None:
    """Check whether a built model suits the Neural Engine."""
    from pipeline.commands import fitness

    loaded = load_config(config)
    show(fitness.fitness(loaded, target, precision=precision, images=images))


@main.group()
def store() -> None:
    """Look after the store, where machines share what they built.

    A configuration names it.
    """


@store.command()
@CONFIG
def status(config: Path) -> None:
    """Count what the store holds."""
    from pipeline.commands import store

    show(store.status(load_config(config)))


@store.command()
@CONFIG
def push(config: Path) -> None:
    """Give the store what is up to date here and not in it."""
    from pipeline.commands import store

    show(store.push(load_config(config)))


@store.command()
@CONFIG
def pull(config: Path) -> None:
    """Take what the store holds of this configuration.

    Nothing is built.
    """
    from pipeline.commands import store

    show(store.pull(load_config(config)))


@store.command()
@CONFIG
@option("--days", type=click.FloatRange(1), help="Also artifacts given so many days ago.")
def gc(config: Path, days: float | None) -> None:
    """Remove what no artifact names, and damaged entries.

    Only what is older than a day.
    """
    from pipeline.commands import store

    show(store.collect(load_config(config), days))


@store.command("verify")
@CONFIG
@click.pass_context
def verify_store(ctx: click.Context, config: Path) -> None:
    """Read and hash all that the store holds.

    Exit code 1 if something is damaged.
    """
    from pipeline.commands import store

    text, code = store.verify(load_config(config))
    show(text)
    ctx.exit(code)


@main.command()
@argument("name", type=RESULTS)
@OUTPUT
@option("--file", type=PATH, help="The archive, a new file; default: NAME.tar.gz.")
@option("--target", "targets", type=TARGET, multiple=True, help="Only these targets.")
@option("--sign", "key", type=PATH, help="Private ed25519 key, PEM, that signs the checksums.")
def bundle(
    name: str, output: Path, file: Path | None, targets: tuple[str, ...], key: Path | None
) -> None:
    """Pack what the last run of NAME said to use into one archive.

    It travels alone: with checksums, golden images, labels, preprocessing and a README. `check`
    verifies it, its signature, too.
    """
    from pipeline.commands import export

    show(export.export_bundle(output, name, file, targets=targets, key=key))


@main.command()
@argument("name", type=RESULTS, required=False)
@OUTPUT
@option("--set-aside", is_flag=True, help="Also folders that runs set aside: look first.")
@option("--history", is_flag=True, help="Also what earlier runs came to.")
@option("--dry-run", is_flag=True, help="Only say what would go.")
def clean(name: str | None, output: Path, **options: bool) -> None:
    """Remove decoded images and caches, which runs make again.

    Those of the results NAME; default: of all. Artifacts, results and reports stay. `check`
    misses the images until the next run.
    """
    from pipeline.commands import clean

    show(clean.clean(output, name, **options))


@main.command()
@option("--target", type=TARGET, help="Only this target.")
def doctor(target: str | None) -> None:
    """Tell what targets need, and how to get what is missing."""
    from pipeline.commands import doctor

    click.echo(doctor.doctor(target))


@main.command()
def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from pipeline import config

    click.echo(in_json(config.schema(), indent=2))
