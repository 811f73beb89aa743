from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import InputError, PipelineError
from pipeline.core.figures import Number, State, wilson
from pipeline.stages.metrics import ROUNDS, by_class, own_metrics, with_measures
from pipeline.steps.facts.accuracy import Accuracy, ValidationFacts

NAMES = ("ant", "bee", "cat")
LABELS = np.array([0, 0, 0, 1, 1, 1, 1, 0], dtype=np.int64)
ANSWERS = [0, 0, 1, 1, 1, 1, 0, 0]
LOGITS = np.eye(3, dtype=np.float32)[ANSWERS]
LIKE = Number(0.75, State.EMULATED, by="x", why="no GPU", samples=8, interval=(0.4, 0.9))

OWN = """\
import numpy as np
from my_parts import shares

calls = []

def right(logits, labels):
    calls.append(len(labels))
    return {"right": (logits.argmax(1) == labels).mean(), "images": len(labels)}

def spoils(logits, labels):
    logits[:] = 0
    labels[:] = 0
    return {"x": 1.0}

def classes(logits, labels):
    if len(set(labels.tolist())) < 2:
        raise ValueError("only one class")
    return {"x": float(len(labels))}

def other_names(logits, labels):
    calls.append(0)
    return {f"x{len(calls) % 2}": 1.0}

def infinite(logits, labels):
    return {"x": np.inf}

def scalar(logits, labels):
    return {"x": np.float32(0.5), "y": np.array(2), "z": np.int64(3)}

def fails(logits, labels):
    raise RuntimeError("no such thing")

def number(logits, labels): return 0.5
def empty(logits, labels): return {}
def text(logits, labels): return {"x": "high"}
def truth(logits, labels): return {"x": True}
def array(logits, labels): return {"x": np.ones(2)}
def unnamed(logits, labels): return {1: 0.5}
def odd(logits, labels): return {"a\\nb": 0.5}
def many(logits, labels): return {str(i): 0.0 for i in range(99)}
"""


@pytest.fixture
def own(own_modules: Path) -> Path:
    (own_modules / "my_metrics.py").write_text(OWN)
    (own_modules / "my_parts.py").write_text("shares = 1\n")
    return own_modules


def test_the_class_with_the_lowest_top1_is_found() -> None:
    found = by_class(LOGITS, LABELS, NAMES, LIKE)
    assert found is not None
    assert found.classes == {"ant": 0.75, "bee": 0.75}
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 0], dtype=np.int64)
    found = by_class(LOGITS, labels, NAMES, LIKE)
    assert found is not None
    assert found.classes == {"ant": 0.75, "bee": 1.0, "cat": 0.0}
    assert found.worst == "cat"
    assert (found.top1.value, found.top1.samples) == (0.0, 1)
    assert found.top1.interval == wilson(0, 1)
    assert (found.top1.state, found.top1.by, found.top1.why) == (State.EMULATED, "x", "no GPU")


def test_of_equally_bad_classes_the_one_with_most_images_stands_for_them() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2], dtype=np.int64)
    found = by_class(np.zeros((6, 3), np.float32) - labels[:, None], labels, NAMES, LIKE)
    assert found is not None
    assert (found.worst, found.top1.samples) == ("cat", 3)


def test_what_is_no_number_is_wrong() -> None:
    logits = LOGITS.copy()
    logits[:3] = np.nan  # argmax of these is 0, their class
    found = by_class(logits, LABELS, NAMES, LIKE)
    assert found is not None
    assert found.classes == {"ant": 0.25, "bee": 0.75}
    assert by_class(LOGITS[:0], LABELS[:0], NAMES, LIKE) is None


def test_numbers_of_a_function_have_intervals(own: Path) -> None:
    found = own_metrics(LOGITS, LABELS, "my_metrics:right", LIKE)
    assert list(found) == ["right", "images"]
    right = found["right"]
    assert (right.value, right.state, right.samples) == (0.75, State.EMULATED, 8)
    assert right.interval is not None
    assert 0.3 < right.interval[0] < 0.75 < right.interval[1] <= 1.0
    assert found["images"].interval == (8.0, 8.0)
    assert own_metrics(LOGITS, LABELS, "my_metrics:right", LIKE) == found  # seeded
    import my_metrics  # type: ignore[import-not-found]

    assert my_metrics.calls == [8] * 2 * (ROUNDS + 1)


@pytest.mark.parametrize("name", ["classes", "other_names", "infinite"])
def test_a_function_that_samples_break_has_no_intervals(own: Path, name: str) -> None:
    labels = np.array([0, 0, 0, 0, 0, 0, 0, 1], dtype=np.int64)
    (found,) = own_metrics(LOGITS, labels, f"my_metrics:{name}", LIKE).values()
    assert found.value is not None
    assert found.interval is None


def test_numbers_may_be_numpys(own: Path) -> None:
    found = own_metrics(LOGITS, LABELS, "my_metrics:scalar", LIKE)
    assert [type(each.value) for each in found.values()] == [float] * 3
    assert [each.value for each in found.values()] == [0.5, 2.0, 3.0]


def test_a_function_changes_nothing_of_ours(own: Path) -> None:
    logits, labels = LOGITS.copy(), LABELS.copy()
    own_metrics(logits, labels, "my_metrics:spoils", LIKE)
    assert (logits == LOGITS).all()
    assert (labels == LABELS).all()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", "my_metrics:fails failed: RuntimeError: no such thing"),
        ("number", "my_metrics:number gave 0.5: return numbers by name"),
        ("empty", "return numbers by name"),
        ("text", "gave 'high' as x: return a number"),
        ("truth", "gave True as x"),
        ("array", r"gave array\(\[1., 1.\]\) as x"),
        ("unnamed", "gave the name 1: a name is a short text"),
        ("odd", "a name is a short text"),
        ("many", "gave 99 numbers: return at most 50"),
        ("rigth", "my_metrics has no rigth; did you mean right"),
    ],
)
def test_what_gives_no_numbers_is_refused(own: Path, name: str, words: str) -> None:
    with pytest.raises(PipelineError, match=words) as caught:
        own_metrics(LOGITS, LABELS, f"my_metrics:{name}", LIKE)
    assert str(caught.value).startswith("validation.metrics: ")
    assert isinstance(caught.value, InputError)


def test_all_of_it_is_written_down_and_read_again(own: Path) -> None:
    numbers = with_measures(Accuracy(LIKE, LIKE), LOGITS, LABELS, NAMES, "my_metrics:right")
    facts = ValidationFacts("ort", "fp32", numbers)
    assert ValidationFacts.from_facts(facts.to_facts(), "x") == facts
    plain: Any = with_measures(Accuracy(LIKE, LIKE), LOGITS, LABELS, NAMES, None)
    assert plain.by_class == numbers.by_class
    assert plain.metrics == {}
