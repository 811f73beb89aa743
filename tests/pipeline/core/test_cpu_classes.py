"""Classes of x86 CPUs: which CPU belongs to which, and what each must not see."""

from __future__ import annotations

import pytest

from pipeline.core import cpu_classes
from pipeline.core.cpu_classes import CLASSES, FEATURES, Purpose, class_of, named
from pipeline.core.errors import InputError

SERVER = {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni"}


@pytest.mark.parametrize(
    ("missing", "name"),
    [
        (set(), "avx512-vnni"),
        ({"avx512_vnni"}, "avx512"),
        ({"avx512f"}, "avx2-vnni"),
        ({"avx512bw"}, "avx2-vnni"),
        ({"avx512f", "avx_vnni"}, "avx2"),
    ],
)
def test_a_cpu_belongs_to_the_most_able_class(missing: set[str], name: str) -> None:
    found = class_of(SERVER - missing)
    assert found is not None
    assert found.name == name


def test_a_cpu_without_avx2_belongs_to_none() -> None:
    assert class_of({"avx", "fma"}) is None
    assert class_of({"asimddp"}) is None


def test_what_a_cpu_lacks_for_a_class_is_named() -> None:
    assert CLASSES["avx2-vnni"].why_not(SERVER) is None
    reason = CLASSES["avx2-vnni"].why_not(SERVER - {"avx_vnni"})
    assert reason == "this CPU has no avx_vnni, which AVX2 + VNNI needs"


@pytest.mark.parametrize("purpose", [Purpose.ANSWERS, Purpose.TIMES])
def test_for_answers_or_times_alone_others_stand_in_for_vnni_of_avx2(purpose: Purpose) -> None:
    cls = CLASSES["avx2-vnni"]
    assert cls.emulated(SERVER) == frozenset()
    assert cls.emulated(SERVER - {"avx_vnni"}) == {"avx_vnni"}
    assert cls.why_not(SERVER - {"avx_vnni"}, purpose) is None
    assert cls.why_not(SERVER - {"avx_vnni"}, Purpose.BOTH) is not None
    reason = cls.why_not(SERVER - {"avx_vnni", "fma"}, purpose)
    assert reason == "this CPU has no fma, which AVX2 + VNNI needs"
    other = CLASSES["avx512-vnni"]
    assert other.emulated(set()) == frozenset()
    assert other.why_not(SERVER - {"avx512_vnni"}, purpose) is not None


def test_a_class_hides_all_that_is_beyond_it() -> None:
    assert CLASSES["avx2"].hidden == set(FEATURES)
    assert set(FEATURES) - CLASSES["avx2-vnni"].hidden == {"avx_vnni"}
    hidden = CLASSES["avx512"].hidden
    assert {"avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16"} <= hidden
    assert not {"avx512f", "avx512bw", "avx512vl", "avx512dq"} & hidden


def test_a_server_of_today_keeps_what_its_class_may_have() -> None:
    keeps = {"dq", "cd", "ifma", "vbmi", "_vbmi2", "_bitalg", "_vpopcntdq"}
    assert CLASSES["avx512-vnni"].keeps == {f"avx512{end}" for end in keeps}
    assert CLASSES["avx512"].keeps == {"avx512dq", "avx512cd"}


def test_extensions_beyond_avx2_are_told_in_leaf_7() -> None:
    places = [(leaf, subleaf, register) for leaf, subleaf, register, _ in FEATURES.values()]
    assert set(places) == {(7, 0, "b"), (7, 0, "c"), (7, 0, "d"), (7, 1, "a"), (7, 1, "d")}
    assert len(set(FEATURES.values())) == len(FEATURES)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=list(CLASSES))
def test_what_a_class_shows_is_a_cpu_of_that_class(cls: cpu_classes.CpuClass) -> None:
    shown = (SERVER | set(FEATURES)) - cls.hidden
    found = class_of(shown)
    assert found is cls


def test_which_classes_sum_pairs_without_saturation() -> None:
    assert [cls.name for cls in CLASSES.values() if cls.vnni] == ["avx512-vnni", "avx2-vnni"]


def test_an_i9_since_the_twelfth_generation_alone_has_cores_of_two_kinds() -> None:
    assert [cls.name for cls in CLASSES.values() if cls.hybrid] == ["avx2-vnni"]


def test_an_unknown_class_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean avx2-vnni"):
        named("avx2-vni")
