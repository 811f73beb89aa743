"""Configurations: YAML that is no YAML, that never ends, and numbers and paths that cannot be."""

from __future__ import annotations

import os
import random
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from attacks import ground
from attacks.attempt import Attempt
from care import settings
from pipeline import config

PREPROCESS = "{size: 32, crop: 1.0, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}"
BASE = {
    "name": "trial",
    "model": "{name: care_tiny, checkpoint: random}",
    "data": "{validation: fashion-mnist, calibration: fashion-mnist}",
    "preprocess": PREPROCESS,
    "targets": "{ort: {precisions: [fp32]}}",
}
HUGE = ("1000000000", "1000000000000", "1" + 30 * "0", 400 * "9", 5000 * "9", "0x" + 5000 * "f")
NOT_FINITE = (".nan", ".inf", "-.inf", "1.0e+999")

TAGS = (
    *("!!int", "!!float", "!!bool", "!!null", "!!timestamp", "!!binary", "!!set", "!!omap"),
    *(
        "!!pairs",
        "!!str",
        "!!python/object/apply:os.system",
        "!!python/tuple",
        "!!merge",
        "!!value",
    ),
    *("!own", "!<tag:example.org,2000:x>", "!"),
)
SCALARS = (
    *("abc", "''", "0x", "0b2", "1_", "'.'", "-", "'1:61:x'", "[1]", "{a: 1}", "2025-02-30"),
    *("9999-99-99T99:99:99Z", "'='", "'<<'", "maybe"),
)

# What a variable may hold; none of it is YAML.
VARIABLES = (
    *("a: b", "[", "{", "}", "2025-02-30", "@latest.pth", "%x", "*x", "&x", "!x", "!!int x"),
    *("run #3.pth", "x\ny", " x", "#", "\tx", "'", '"', "|", ">", "- a", "? a", "0x1F", "1e400"),
    *(
        "true",
        "null",
        "5",
        "1.5",
        "5" * 5000,
        "---",
        "...",
        "<<",
        "`",
        ",",
        "a, b",
        "ä",
        "日本",
    ),
)

NUMBERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "export": {
        "{opset: %s}": ("17", "24", "-1", "20.5", "'20'", *HUGE, *NOT_FINITE),
        "{batch: %s}": ("0", "-1", "1.5", "auto", *HUGE),
        "{simplify_timeout_s: %s}": ("0", "-1", *HUGE, *NOT_FINITE),
    },
    "calibration": {
        "{images: %s}": ("0", "-1", *HUGE),
        "{seed: %s}": ("-1", "1.5", *HUGE[1:]),
        "{max_top1_drop: %s}": ("-0.1", "1.1", *NOT_FINITE),
        "{method: %s}": ("best", "1", "[]"),
    },
    "validation": {
        "{images: %s}": ("0", *HUGE),
        "{batch: %s}": ("0", *HUGE),
        "{gates: {max_latency_ms: %s}}": ("0", "-1", *NOT_FINITE),
        "{gates: {min_agreement: %s}}": ("2", *NOT_FINITE),
    },
    "bench": {
        "{batches: [%s]}": ("", "0", *HUGE, *NOT_FINITE),
        "{threads: %s}": ("0", "-1", *HUGE),
        "{samples: %s}": ("0", *HUGE),
        "{warmup: %s}": ("0", *HUGE),
        "{max_seconds: %s}": ("0", *HUGE, *NOT_FINITE),
    },
    "preprocess": {
        PREPROCESS.replace("32", "%s", 1): ("0", "-1", "1.5", "true", "10000", *HUGE, *NOT_FINITE),
        PREPROCESS.replace("1.0", "%s", 1): ("0", "1.0e-9", "1.0e-320", "2", *NOT_FINITE),
        PREPROCESS.replace("[0.5, 0.5, 0.5]", "[0.5, 0.5, %s]", 1): (
            *("123.675", "-0.1", "x", "0.5, 0.5", *HUGE, *NOT_FINITE),
        ),
        PREPROCESS.replace("std: [0.5, 0.5, 0.5]", "std: [0.2, 0.2, %s]"): (
            *("58.395", "0", "-0.1", "1.0e-50", *HUGE, *NOT_FINITE),
        ),
        PREPROCESS.replace("{", "{interpolation: %s, "): ("cubic", "nearest-exact", "3", "''"),
        PREPROCESS.replace("{", "{channels: %s, "): ("bgr", "gray", "1"),
    },
    "targets": {
        "{ort: {precisions: [fp32], threads: %s}}": ("0", *HUGE),
        "{ort: {precisions: [fp32], tune_seconds: %s}}": ("0", *HUGE, *NOT_FINITE),
        "{trt: {precisions: [fp16], batches: [1, 2, %s]}}": ("1", *HUGE),
        "{trt: {precisions: [fp16], workspace_mib: %s}}": ("0", *HUGE),
        "{trt: {precisions: [fp16], compute_capabilities: [%s]}}": ("", "1.0", "x", *NOT_FINITE),
        "{coreml: {precisions: [fp16], max_size_mb: %s}}": ("0", *NOT_FINITE),
        "{coreml: {precisions: [fp16], calibration_images: %s}}": ("0", *HUGE),
        "%s": ("{}", "[]", "ort", "{ort: null}", "{ort: {precisions: []}}"),
    },
    "model": {
        "{name: care_tiny, checkpoint: random, kwargs: {%s}}": (
            *("features_only: true", "pretrained: true", "checkpoint_path: x", "cache_dir: x"),
            *("pretrained_cfg: {url: x}", "out_indices: [1]", "depth: 1000000000", "in_chans: 1"),
            *("depths: [1, 100000]", f"drop_rate: {400 * '9'}", "drop_rate: .nan"),
        ),
        f"{{name: {300 * 'x'}, checkpoint: %s}}": ("random",),
        "{name: care_tiny, checkpoint: %s}": ("5", "[]", 300 * "x", '"a\\0b"', "true"),
    },
    "name": {"%s": ("..", ".", "''", "a/b", "5", "2025", 300 * "x", '"a\\0"', "-x")},
    "output": {
        "%s": (
            *("/dev/null", "/dev/full", "/proc", "/proc/self/x", "/sys/x", "/etc/passwd"),
            *("/etc/passwd/x", 300 * "x", 5000 * "x/", '"a\\0b"', "[]", '"\\ud800"', '"\\e[2J"'),
        )
    },
    "data": {
        "{validation: %s, calibration: fashion-mnist}": (
            *('"folder:a\\0b"', f"folder:{300 * 'x'}", "5", "[]", f"tar:{300 * 'x'}"),
        ),
        "{validation: fashion-mnist, calibration: fashion-mnist, labels: %s}": (
            *(300 * "x", '"a\\0b"', "[]", "5"),
        ),
    },
}


RECURSIVE = {
    "a list in itself": "a: &a [*a]\n",
    "a mapping in itself": "a: &a {b: *a}\n",
    "a document in itself": "&a\nb: *a\n",
    "a merge of itself": "a: &a\n  <<: *a\n",
    "merges of each other": "a: &a {<<: &b {<<: *a}}\n",
    "a key of itself": "? &a [*a]\n: 1\n",
    "two merges": "a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a\n",
}
FORMS = (
    *("%YAML 9.9\n---\na: 1\n", "%TAG ! x\n---\na: !y 1\n", "a: 1\n---\nb: 2\n", "a: *b\n"),
    *("a: &a 1\nb: &a 2\n", "\ta: 1\n", "a: 'x\n", 'a: "\\x"\n', "- 1\n", "5\n", "\n", "? \n"),
    *("[a]: 1\n", "{a: 1}: 1\n", "null: 1\n", "1: 1\n", "true: 1\n", "? - a\n: 1\n"),
)
ODD_TEXT = ('"\\ud800"', '"\\0"', '"\\e[2J"', '"\\UFFFFFFFF"', '"\\u202e"', '"\\x85"')


def attempts(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """Configurations of the pipeline and of training; `count` random ones beside the listed."""
    for name, text in {**dict(structures()), **dict(tagged())}.items():
        yield from written(folder, name, text)
    for name, content in {**dict(encodings()), **dict(mutations(seed, count))}.items():
        yield from written(folder, name, content)
    yield from numbers(folder)
    yield from variables(folder)
    yield from extensions(folder)
    yield from places(folder)


def commands(folder: Path, seed: int, count: int) -> Iterator[Attempt]:
    """As many of them, listed and random, through the real command."""
    ground.lay_out(folder)
    listed: dict[str, str | bytes] = {**dict(structures()), **dict(tagged()), **dict(encodings())}
    rng = random.Random(seed)
    chosen = rng.sample(list(listed.items()), min(len(listed), count // 2))
    chosen += mutations(seed, count - len(chosen))
    for name, content in chosen:
        yield Attempt(name, partial(ground.look_at, folder, content))


def configuration(**changes: str) -> str:
    """The basic configuration with other values for some keys."""
    return "".join(f"{key}: {value}\n" for key, value in {**BASE, **changes}.items())


def written(folder: Path, name: str, text: str | bytes) -> Iterator[Attempt]:
    """Read a text as both kinds of configurations."""
    path = folder / "odd.yaml"
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")

    def run(read: object) -> None:
        path.write_bytes(data)
        assert callable(read)
        read(path)

    yield Attempt(f"pipeline: {name}", partial(run, config.load))
    yield Attempt(f"training: {name}", partial(run, partial(settings.read, flags={})))


def tagged() -> Iterator[tuple[str, str]]:
    """Every tag before every scalar."""
    for tag in TAGS:
        for scalar in SCALARS:
            yield f"{tag} {scalar}", configuration(name=f"{tag} {scalar}")


def structures() -> Iterator[tuple[str, str]]:
    """Aliases, merges and nesting, and other forms that few configurations have."""
    yield from RECURSIVE.items()
    for levels in (2, 6, 10, 40):
        for form in ("list", "mapping", "merge"):
            yield f"10^{levels} values by a {form}", bomb(levels, form)
    chain = "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000))
    yield "a chain of aliases", f"a0: &a0 [1]\n{chain}"
    for value in ("5", "text", "[1]", "[[{a: 1}]]", "null", "*none", "[{a: 1}, 2]", "!!int x"):
        yield f"a merge of {value}", f"a:\n  <<: {value}\n"
    for depth in (60, 1000, 5000, 100_000):
        yield from nested(depth)
    for text in FORMS:
        yield repr(text), text
    for text in ODD_TEXT:
        yield f"text {text}", configuration(name=text)
        yield f"key {text}", f"{text}: 1\n{configuration()}"


def bomb(levels: int, form: str) -> str:
    """Ten aliases a level, of ten aliases each: 10^levels values."""
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels + 1):
        aliases = ", ".join(f"*a{level - 1}" for _ in range(10))
        value = f"[{aliases}]"
        if form == "mapping":
            value = "{" + ", ".join(f"k{n}: *a{level - 1}" for n in range(10)) + "}"
        elif form == "merge":
            value = f"{{<<: [{aliases}]}}"
        lines.append(f"a{level}: &a{level} {value}")
    return "\n".join(lines) + "\n"


def nested(depth: int) -> Iterator[tuple[str, str]]:
    """Values in values."""
    steps = min(depth, 1000)
    yield f"{depth} lists", f"a: {depth * '['}{depth * ']'}\n"
    yield f"{depth} mappings", f"a: {depth * '{a: '}{depth * '}'}\n"
    yield f"{depth} open lists", f"a: {depth * '['}\n"
    yield f"{steps} steps", "".join(f"{n * ' '}a:\n" for n in range(steps))
    yield f"{depth} dashes", f"a:\n  {depth * '- '}x\n"
    yield f"{depth} question marks", f"{depth * '? '}x\n"


def encodings() -> Iterator[tuple[str, bytes]]:
    """Bytes that are no UTF-8, and files that are too large."""
    text = configuration()
    for code in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp037"):
        yield code, text.encode(code)
    yield "Latin-1", text.replace("trial", "Höhe").encode("latin-1")
    yield "a null", text.encode() + b"\0"
    yield "nulls", bytes(1000)
    yield "control characters", text.encode() + b"\x1b[2J"
    yield "an old Mac's lines", text.replace("\n", "\r").encode()
    yield "a large comment", b"#" + bytes([32]) * 3_000_000
    yield "many keys", b"".join(b"k%d: 1\n" % n for n in range(50_000))
    yield "one long text", b"a: " + b"x" * 900_000
    yield "one long number", b"a: " + b"9" * 900_000
    yield "one long key", b"x" * 900_000 + b": 1\n"
    yield "many numbers", b"a: [" + b"1, " * 200_000 + b"]\n"


def mutations(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """The basic configuration with a few characters replaced, doubled or left out."""
    rng = random.Random(seed)
    signs = "[]{}:,&*!|>'\"%@`#-?<=~\n\t \\${}" + string.digits + "aé\0"
    for number in range(count):
        text = list(configuration())
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(text))
            text[place] = rng.choice((rng.choice(signs), "", text[place] * rng.randint(2, 50)))
        yield f"mutation {number}", "".join(text).encode()


def numbers(folder: Path) -> Iterator[Attempt]:
    """Values that cannot be, each at its key: all have to be refused when the file is read."""
    path = folder / "numbers.yaml"

    def run(text: str) -> None:
        path.write_text(text)
        config.load(path)

    for key, forms in NUMBERS.items():
        for form, values in forms.items():
            for value in values:
                text = configuration(**{key: form.replace("%s", value)})
                yield Attempt(f"{key}: {form[:60]} {value[:40]}", partial(run, text), hostile=True)


def variables(folder: Path) -> Iterator[Attempt]:
    """What a variable holds is text, whatever it looks like."""
    path = folder / "variables.yaml"
    path.write_text(configuration(model="{name: care_tiny, checkpoint: '${ODD}'}"))

    def run(value: str) -> None:
        with variable(value):
            loaded = config.load(path).model.checkpoint
        assert loaded == value, f"{value!r} became {loaded!r}"

    for value in VARIABLES:
        yield Attempt(f"variable {value[:20]!r}", partial(run, value))


@contextmanager
def variable(value: str) -> Iterator[None]:
    """The environment with the variable ODD."""
    os.environ["ODD"] = value
    try:
        yield
    finally:
        del os.environ["ODD"]


def extensions(folder: Path) -> Iterator[Attempt]:
    """Files to extend that are none, or without end."""
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    for number in range(1200):
        (folder / f"chain{number}.yaml").write_text(f"extends: chain{number + 1}.yaml\n")
    (folder / "one.yaml").write_text("extends: two.yaml\n")
    (folder / "two.yaml").write_text("extends: one.yaml\n")
    (folder / "empty.yaml").write_text("")
    values = (
        *("/dev/zero", "/dev/null", "/dev/tty", "/proc/self/mem", "/", ".", "pipe", "loop", "''"),
        *('"a\\0b"', 300 * "x", 3000 * "x/", "chain0.yaml", "one.yaml", "empty.yaml", "[a]", "5"),
        *("null", "none.yaml", "~nobody-at-all/x", "${NOT_SET_AT_ALL}", "!!int x", "/etc/shadow/x"),
    )
    for value in values:
        for attempt in written(folder, f"extends {value[:30]}", f"extends: {value}\n"):
            yield Attempt(attempt.name, attempt.run, hostile=value != "null")


def places(folder: Path) -> Iterator[Attempt]:
    """Paths of configurations, and outputs among the images."""
    images = folder / "images"
    images.mkdir()
    (folder / "file").write_text("x")
    for path in (
        "/dev/zero",
        "/dev/full",
        folder / "pipe",
        folder / "loop",
        folder,
        "a\0b",
        300 * "x",
    ):
        yield Attempt(f"read {path!r:.40}", partial(config.load, Path(path)), hostile=True)
        training = partial(settings.read, Path(path), {})
        yield Attempt(f"train {path!r:.40}", training, hostile=True)
    data = f"{{validation: 'folder:{images}', calibration: 'folder:{images}'}}"
    outputs = (
        images,
        images / "x",
        folder / "file",
        folder / "file" / "x",
        images / ".." / "images",
    )
    for output in outputs:
        text = configuration(output=str(output), data=data)
        first = next(written(folder, f"output {output.name}", text))
        yield Attempt(first.name, first.run, hostile=True)
