from __future__ import annotations

import pytest

from pipeline.core.errors import DataError
from pipeline.core.splits import choose_split, is_split, require_classes


def test_capitals_change_no_split() -> None:
    assert is_split("Train")
    assert is_split("VAL")
    assert not is_split("trains")
    assert choose_split({"Train", "Val"}, "validation", "d") == "Val"
    assert choose_split({"TRAIN", "VAL"}, "calibration", "d") == "TRAIN"


def test_the_first_name_of_a_split_is_preferred() -> None:
    assert choose_split({"test", "val"}, "validation", "d") == "val"
    assert choose_split({"train", "calib"}, "calibration", "d") == "calib"


def test_one_split_twice_or_none_is_refused() -> None:
    with pytest.raises(DataError, match=r"d has Val/, val/: keep one"):
        choose_split({"Val", "val", "train"}, "validation", "d")
    with pytest.raises(DataError, match=r"d has Test/ but no train/ or training/ for the train"):
        choose_split({"Test"}, "train", "d")


def test_datasets_are_no_classes() -> None:
    require_classes({"cat": [], "dog": ["puppies"]}, "d")
    with pytest.raises(DataError, match=r"d/flowers holds Train/, Val/: it is a dataset"):
        require_classes({"cats": [], "flowers": ["Val", "Train"]}, "d")


def test_folders_called_as_splits_with_equal_folders_are_splits() -> None:
    inner = ["forest", "sea"]
    with pytest.raises(DataError, match=r"d has seg_test/, seg_train/, which hold the same"):
        require_classes({"seg_train": inner, "seg_test": inner[::-1]}, "d")
    require_classes({"seg_train": ["a"], "seg_test": ["b"]}, "d")
    require_classes({"test_tube": [], "train_car": []}, "d")
    require_classes({"2020": inner, "2021": inner}, "d")


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ["train", "training"]),
        ("validation", ["val", "valid", "validation", "test", "testing"]),
        ("calibration", ["calibration", "calib", "train", "training"]),
    ],
)
def test_names_of_splits_in_their_order(split: str, names: list[str]) -> None:
    for place, name in enumerate(names):
        assert is_split(name)
        assert choose_split(names[place:][::-1], split, "d") == name
    others = {"train", "val", "calib"} - set(names)
    with pytest.raises(DataError, match=f"but no {'/ or '.join(names)}/ for the {split} split"):
        choose_split(others, split, "d")


def test_one_folder_or_folders_without_folders_are_no_splits() -> None:
    require_classes({"train_a": ["x"]}, "d")
    require_classes({"train_a": [], "test_a": []}, "d")
    require_classes({"train_a": ["x"], "bus": ["x"]}, "d")
    with pytest.raises(DataError, match="hold the same folders"):
        require_classes({"my-train": ["x"], "my test2": ["x"], "VAL": ["x"]}, "d")
