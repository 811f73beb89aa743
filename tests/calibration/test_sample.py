"""The calibration sample: balanced, seeded, hashed, and free of validation images."""

from collections import Counter
from typing import Any

import pytest

from calibration.sample import draw, hashes_of
from pipeline.core.errors import ConfigError, DataError

LABELS = [0] * 100 + [1] * 60 + [2] * 5


def test_classes_are_balanced_and_small_ones_give_all_they_have(make_dataset: Any) -> None:
    chosen = draw(make_dataset(LABELS), 45)
    assert Counter(chosen.labels) == {0: 20, 1: 20, 2: 5}
    assert [LABELS[index] for index in chosen.indices] == list(chosen.labels)
    assert len(set(chosen.indices)) == 45


def test_every_first_part_is_balanced(make_dataset: Any) -> None:
    chosen = draw(make_dataset(LABELS), 15)
    for count in (3, 6, 9, 15):
        assert set(Counter(chosen.labels[:count]).values()) == {count // 3}


def test_equal_seeds_choose_equally_and_others_do_not(make_dataset: Any) -> None:
    dataset = make_dataset(LABELS)
    assert draw(dataset, 30, seed=1) == draw(dataset, 30, seed=1)
    assert draw(dataset, 30, seed=1).digest != draw(dataset, 30, seed=2).digest


def test_fewer_images_than_classes(make_dataset: Any) -> None:
    chosen = draw(make_dataset(list(range(50)), classes=[str(i) for i in range(50)]), 10)
    assert len(set(chosen.labels)) == 10
    assert not [w for w in chosen.warnings if "classes" in w]


def test_duplicates_are_taken_once(make_dataset: Any) -> None:
    dataset = make_dataset([0] * 20, contents=[i // 2 for i in range(20)])
    chosen = draw(dataset, 20)
    assert len(chosen.indices) == len(set(chosen.hashes)) == 10


def test_validation_images_are_refused(make_dataset: Any) -> None:
    train = make_dataset([0] * 40)
    validation = make_dataset([0] * 20, offset=30)
    with pytest.raises(DataError, match=r"10 of 40 calibration images are also in the validation"):
        draw(train, 40, validation=hashes_of(validation))
    draw(train, 40, validation=hashes_of(make_dataset([0] * 20, offset=40)))


def test_the_overlap_may_be_given_as_a_list(make_dataset: Any) -> None:
    train = make_dataset([0] * 10)
    with pytest.raises(DataError, match="validation split"):
        draw(train, 10, validation=[train.hash(3)])


def test_an_empty_validation_split_proves_nothing(make_dataset: Any) -> None:
    with pytest.raises(DataError, match="no images"):
        hashes_of(make_dataset([]))


def test_too_few_images(make_dataset: Any) -> None:
    with pytest.raises(DataError, match="5 distinct images"):
        draw(make_dataset([0] * 5), 100)
    with pytest.raises(DataError, match="0 distinct images"):
        draw(make_dataset([]), 100)
    with pytest.raises(ConfigError, match="at least 8"):
        draw(make_dataset(LABELS), 7)


def test_warnings_say_what_is_thin(make_dataset: Any) -> None:
    few = draw(make_dataset([0, 1] * 10), 64).warnings
    assert "64 calibration images were asked for, the split has 20" in few
    assert any("are few" in warning for warning in few)
    assert "1 of 3 classes have no calibration image" in few
    assert draw(make_dataset([0, 1, 2] * 50), 128).warnings == ()


def test_the_seed_is_nought_where_none_is_given(make_dataset: Any) -> None:
    dataset = make_dataset(LABELS)
    chosen = draw(dataset, 30)
    assert chosen == draw(dataset, 30, seed=0)
    assert chosen.seed == 0
    assert draw(dataset, 30, seed=3).seed == 3


def test_the_fewest_images_are_taken_with_a_warning(make_dataset: Any) -> None:
    chosen = draw(make_dataset([0] * 8, classes=("a",)), 8)
    assert len(chosen.indices) == 8
    assert chosen.warnings == ("8 calibration images are few: ranges are safer with 128",)
    assert draw(make_dataset([0] * 200, classes=("a",)), 127).warnings != ()
    assert draw(make_dataset([0] * 200, classes=("a",)), 128).warnings == ()


def test_classes_without_an_image_are_told_where_there_could_be_one(make_dataset: Any) -> None:
    names = [str(i) for i in range(8)]
    missed = "1 of 8 classes have no calibration image"
    labels = [0, 0, 1, 2, 3, 4, 5, 6]
    assert missed in draw(make_dataset(labels, classes=names), 8).warnings
    more = [str(i) for i in range(9)]
    assert not [w for w in draw(make_dataset(labels, classes=more), 8).warnings if "class" in w]


def test_the_overlap_names_how_many_and_the_first(make_dataset: Any) -> None:
    train = make_dataset([0] * 10)
    shared = {train.hash(3), train.hash(7), "of none"}
    order = draw(train, 10).indices
    first = next(index for index in order if index in (3, 7))
    for given in (shared, frozenset(shared), sorted(shared)):
        with pytest.raises(DataError, match=rf"^2 of 10 .* \(the first is image {first}\)"):
            draw(train, 10, validation=given)


def test_classes_take_turns_in_another_order_each_time(make_dataset: Any) -> None:
    labels = draw(make_dataset([0, 1, 2] * 40), 60).labels
    turns = {labels[i : i + 3] for i in range(0, 60, 3)}
    assert all(sorted(turn) == [0, 1, 2] for turn in turns)
    assert len(turns) == 6
