"""The network and the images that a configuration names: which ones, in which order, how known."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from care import checkpoint
from care.data import hold_out, open_dataset
from pipeline import config
from pipeline.core.errors import CheckpointError, ConfigError, DataError, ModelError
from pipeline.core.files import file_hash
from pipeline.core.hashes import HashCache
from pipeline.core.listing import Files
from pipeline.core.machine import granted
from pipeline.source import Source, Split, _package_folder
from pipeline.steps.keys import versions
from tests.care.hub import COMMIT, lay, offline
from tests.care.hub import CONFIG as HUB_CONFIG

SPLITS = {"train": 3, "val": 2, "calibration": 1}
"""Images of a class."""

CLASSES = ("ant", "bee", "cat")

NAMED: tuple[Split, ...] = ("validation", "calibration")

CONFIG: dict[str, Any] = {
    "name": "trial",
    "model": {"name": "timm/test_resnet", "checkpoint": "random"},
    "data": {"validation": "folder:data", "calibration": "folder:data"},
    "preprocess": {"size": 32, "crop": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3},
    "targets": {"ort": {"precisions": ["fp32"]}},
}

Make = Callable[..., Source]
"""Makes a source of a project: (**sections, each replacing keys of its own)."""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images, each of its own shade; the working directory."""
    shade = 0
    for split, count in SPLITS.items():
        for name in CLASSES:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                shade += 10
                image = Image.new("RGB", (32, 32), (shade, 0, 255 - shade))
                image.save(tmp_path / "data" / split / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(folder: Path, **sections: dict[str, Any] | None) -> Source:
    """A source, with its configuration as a file would have it."""
    import yaml

    plain = dict(CONFIG)
    for name, values in sections.items():
        if values is None:
            del plain[name]
        else:
            plain[name] = {**CONFIG.get(name, {}), **values}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(plain))
    return Source(config.load(folder / "pipeline.yaml"), HashCache(folder / "hashes"))


@pytest.fixture
def make(project: Path) -> Make:
    return lambda **sections: made(project, **sections)


def test_weights_are_random_embedded_or_in_a_file(make: Make, project: Path) -> None:
    assert make().checkpoint() is None
    assert make().checkpoint_hash == "random"
    embedded = make(model={"name": "care_tiny", "checkpoint": "embedded"})
    path = embedded.checkpoint()
    assert path is not None
    assert path.name == "care_tiny.safetensors"
    assert embedded.checkpoint_hash == file_hash(path)
    (project / "own.pt").write_bytes(b"weights")
    assert make(model={"checkpoint": "own.pt"}).checkpoint_hash == file_hash(project / "own.pt")


def test_weights_may_lie_in_the_home_folder(
    make: Make, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(project))
    (project / "own.pt").write_bytes(b"weights")
    assert make(model={"checkpoint": "~/own.pt"}).checkpoint() == project / "own.pt"
    (project / "names.txt").write_text("ant\nbee\ncat\n")
    assert make(data={"labels": "~/names.txt"}).classes[0] == CLASSES


def test_weights_that_are_not_there(make: Make) -> None:
    with pytest.raises(ModelError, match="carries no weights of test_resnet: name a checkpoint"):
        make(model={"checkpoint": "embedded"}).checkpoint()
    for path in ("gone.pt", "data"):
        with pytest.raises(ModelError, match=rf"model\.checkpoint: {path} is no file"):
            make(model={"checkpoint": path}).checkpoint()
    with pytest.raises(ModelError, match="the package no_such_package is not installed"):
        _package_folder("no_such_package")


def test_all_that_decides_what_the_network_computes_is_told(make: Make) -> None:
    source = make(model={"ema": True, "kwargs": {"drop_rate": 0.1}})
    told = source.network_inputs()
    settings = CONFIG["preprocess"]
    assert told == {
        "settings name": "trial",
        "settings model": {"name": "timm/test_resnet", "ema": True, "kwargs": {"drop_rate": 0.1}},
        "settings preprocess": {**settings, "interpolation": "bicubic", "channels": "rgb"},
        "the labels": list(CLASSES),
    }
    assert source.tools() == versions("torch", "timm")
    assert make(preprocess=None).network_inputs()["settings preprocess"] is None


def test_the_code_of_a_network_of_ones_own_decides_what_it_computes(
    make: Make, project: Path
) -> None:
    model = {"name": None, "module": "own_network:make", "checkpoint": "own"}
    (project / "own_network.py").write_text("def make(): return 1")
    before = make(model=model).network_inputs()
    assert make(model=model).network_inputs() == before
    (project / "own_network.py").write_text("def make(): return 2")
    after = make(model=model).network_inputs()
    assert [name for name in before if before[name] != after[name]] == ["the code of model.module"]


def labels_of(source: Source) -> Any:
    return source.network_inputs()["the labels"]


def test_labels_are_known_by_name_content_or_folders(make: Make, project: Path) -> None:
    assert labels_of(make(data={"labels": "imagenet-1k"})) == "imagenet-1k"
    (project / "names.txt").write_text("bee\nant\ncat\n")
    named = make(data={"labels": "names.txt"})
    assert labels_of(named) == file_hash(project / "names.txt")
    (project / "data/val/ant").rename(project / "data/val/dog")
    assert labels_of(make()) == ["bee", "cat", "dog"]


def test_labels_of_shards_are_known_by_what_states_them(make: Make, project: Path) -> None:
    for name in ("s-0.tar", "s-1.tar"):
        (project / name).write_text(name)
    (project / "classes.txt").write_text("ant\nbee\n")
    data = {"validation": "wds:s-{0..1}.tar", "calibration": "folder:data"}
    first = labels_of(make(data=data))
    (project / "s-0.tar").write_text("other images")
    assert labels_of(make(data=data)) == first
    (project / "classes.txt").write_text("bee\nant\n")
    assert labels_of(make(data=data)) != first
    # Without that file the labels are in the images' records.
    (project / "classes.txt").unlink()
    bare = labels_of(make(data=data))
    (project / "s-1.tar").write_text("yet others")
    assert labels_of(make(data=data)) != bare


def test_labels_that_the_images_name_do_not_depend_on_the_weights(
    make: Make, project: Path
) -> None:
    (project / "photos.tar").write_bytes(b"")
    data = {"validation": "tar:photos.tar"}
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), project / "own.pth")
    own, random = (
        labels_of(make(model={"checkpoint": weights}, data=data))
        for weights in ("own.pth", "random")
    )
    assert own == random


def test_a_file_of_labels_that_is_not_there(make: Make) -> None:
    source = make(data={"labels": "gone.txt"})
    for ask in (source.network_inputs, lambda: source.classes):
        with pytest.raises(DataError, match=r"data\.labels: gone\.txt is no file"):
            ask()


def test_the_splits_are_those_that_the_configuration_names(make: Make) -> None:
    source = make(data={"calibration": "folder:data/train"})
    found = {split: source.data_facts(split) for split in NAMED}
    assert [source.uri(split) for split in NAMED] == ["folder:data", "folder:data/train"]
    assert [facts["files"] for facts in found.values()] == [6, 9]
    assert [facts["identity"] for facts in found.values()] == ["content", "content"]
    assert found["validation"]["digest"] != found["calibration"]["digest"]
    for split, facts in found.items():
        assert source.data_inputs(split) == {
            f"the images of data.{split}": facts["digest"],
            "settings data.identity": "content",
        }
    assert (len(source.validation), len(source.calibration)) == (6, 9)


def test_calibration_images_are_the_trainings(make: Make) -> None:
    """Also where a folder is called so: it may hold anything; what is hashed is what is read."""
    source = make()
    assert source.data_facts("calibration")["files"] == 9
    assert len(source.calibration) == 9
    embedded = make(data={"validation": "fashion-mnist", "calibration": "fashion-mnist"})
    assert len(embedded.calibration) < len(embedded.validation) == 10_000
    digests = {embedded.data_facts(split)["digest"] for split in NAMED}
    assert len(digests) == 2


def test_a_split_is_identified_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make()
    first = source.data_facts("validation")
    monkeypatch.setattr("pipeline.source.identify", None)
    assert source.data_facts("validation") == first


def test_what_is_wrong_with_data_says_where_it_is_named(make: Make, project: Path) -> None:
    (project / "data/val/ant/notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"^data\.validation: .*notes\.txt is not an image"):
        make().data_facts("validation")
    source = make(data={"calibration": "folder:gone"})
    for ask in (lambda: source.data_facts("calibration"), lambda: source.calibration):
        with pytest.raises(DataError, match=r"^data\.calibration: no folder at gone"):
            ask()


def test_hashing_tells_of_which_split_it_is(project: Path) -> None:
    told: list[str] = []
    plain = made(project)
    source = Source(plain.config, plain.hashes, lambda done, total=None, what="": told.append(what))
    source.data_facts("validation")
    assert set(told) == {"hashing the images of data.validation"}


def test_preprocessing_is_stated_or_the_networks_own(make: Make) -> None:
    assert make().preprocess.size == 32
    assert make(preprocess=None).preprocess.size == 160


def test_classes_are_the_datasets_or_as_the_labels_say(make: Make, project: Path) -> None:
    assert make().classes == (CLASSES, CLASSES)
    (project / "names.txt").write_text("cat\tcats\nant\tants\nbee\tbees\n")
    source = make(data={"labels": "names.txt"})
    assert source.classes == (("cat", "ant", "bee"), ("cats", "ants", "bees"))
    assert source.class_indices(source.validation).tolist() == [1, 2, 0]
    assert source.class_indices(source.calibration).dtype == np.int64
    assert source.network.labels == ("cats", "ants", "bees")
    assert len(make(data={"labels": "imagenet-1k"}).classes[0]) == 1000


def test_a_class_that_the_labels_do_not_know(make: Make, project: Path) -> None:
    (project / "names.txt").write_text("cat\ndog\nemu\n")
    source = make(data={"labels": "names.txt"})
    with pytest.raises(DataError, match=r"the class 'ant', .* does not name \(2 such classes\)"):
        source.class_indices(source.validation)
    (project / "names.txt").write_text("cat\x1b\n")
    with pytest.raises(DataError, match=r"^data\.labels: .*control character"):
        _ = make(data={"labels": "names.txt"}).classes


def test_classes_without_names_are_the_logits_in_order(make: Make) -> None:
    source = make()
    dataset = source.validation
    dataset.classes, dataset.names_known = ("0", "1"), False
    assert source.class_indices(dataset).tolist() == [0, 1]


def state_of(source: Source) -> dict[str, torch.Tensor]:
    return source.module.state_dict()


def test_the_network_has_a_logit_a_class_and_always_the_same_weights(make: Make) -> None:
    first, second = make(), make()
    assert not first.module.training
    with torch.inference_mode():
        assert first.module(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(*map(_weights, (first, second)), strict=True))


def test_random_weights_are_settled_and_those_of_a_file_stay(make: Make, project: Path) -> None:
    """The variances of BatchNorms begin at 1, which none keeps that has seen an image."""

    def untouched(source: Source) -> list[bool]:
        norms = [part for part in source.module.modules() if isinstance(part, nn.BatchNorm2d)]
        found = [norm.running_var for norm in norms]
        assert found
        return [value is not None and bool(torch.all(value == 1)) for value in found]

    assert not any(untouched(make()))
    fresh = timm.create_model("test_resnet", num_classes=3)
    torch.save(fresh.state_dict(), project / "fresh.pth")
    assert all(untouched(make(model={"checkpoint": "fresh.pth"})))


def test_the_reference_takes_one_thread_for_small_images(make: Make) -> None:
    with make().reference() as runner:
        assert torch.get_num_threads() == 1
        assert ", 1 thread, " in runner.device
    with make(preprocess={"size": 128}).reference():
        assert torch.get_num_threads() == granted()
    with make().baseline(None):
        assert torch.get_num_threads() == granted()  # what is timed has what it is asked to have


def _weights(source: Source) -> list[torch.Tensor]:
    return list(state_of(source).values())


def test_weights_are_those_of_the_checkpoint(make: Make, project: Path) -> None:
    plain = {name: value + 1 for name, value in state_of(make()).items()}
    ema = {name: value + 2 for name, value in plain.items()}
    torch.save({"state_dict": plain, "state_dict_ema": ema}, project / "own.pt")
    for averaged, expected in ((False, plain), (True, ema)):
        source = make(model={"checkpoint": "own.pt", "ema": averaged})
        found = state_of(source)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    (project / "own.pt").write_bytes(b"no weights")
    with pytest.raises(Exception, match=r"^model\.checkpoint: "):
        _ = make(model={"checkpoint": "own.pt"}).module


def test_files_of_weights_are_named_one_by_one(make: Make, project: Path) -> None:
    """Each travels to a worker under its own hash, the shards of an index too."""
    (project / "a.safetensors").write_bytes(b"a shard")
    index = project / "own.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    found = list(make(model={"checkpoint": index.name}).weight_files())
    assert found == [
        (path.name, path.relative_to(project), file_hash(path))
        for path in (index, project / "a.safetensors")
    ]
    assert list(make().weight_files()) == []


def test_arguments_reach_the_network(make: Make) -> None:
    source = make(model={"kwargs": {"drop_rate": 0.25}})
    assert source.module.drop_rate == 0.25
    with pytest.raises(ModelError, match=r"^model: .*no_such"):
        _ = make(model={"name": "timm/no_such_network"}).module


def test_a_count_of_classes_that_differs(make: Make) -> None:
    assert make(model={"kwargs": {"num_classes": 3}}).module is not None
    with pytest.raises(ModelError, match=r"num_classes is 7, and data\.labels names 3 classes"):
        _ = make(model={"kwargs": {"num_classes": 7}}).module


def test_what_every_artifact_carries(make: Make) -> None:
    network = make().network
    assert network.name == "trial"
    assert network.input_shape == (3, 32, 32)
    assert network.labels == CLASSES
    assert network.preprocess["size"] == 32
    assert network.description["model"] == "timm/test_resnet"
    assert "noise" in network.description["weights"]


def test_a_network_that_does_not_take_such_images(make: Make) -> None:
    gray = {"channels": "gray", "mean": [0.5], "std": [0.5]}
    with pytest.raises(ModelError, match=r"^model: "):
        _ = make(preprocess=gray).network


def test_what_is_deployed_is_a_fresh_copy(make: Make) -> None:
    source = make()
    fused = source.fused()
    assert isinstance(fused, nn.Module)
    assert fused is not source.module
    assert source.inference_form().module is not fused


def test_samples_are_the_images_asked_for(make: Make, project: Path) -> None:
    source = make()
    found = list(source.samples(source.validation, np.array([4, 0])))
    assert [image.shape for image in found] == [(32, 32, 3)] * 2
    for image, path in zip(found, ("val/cat/0.png", "val/ant/0.png"), strict=True):
        assert np.array_equal(image, np.asarray(Image.open(project / "data" / path)))
    (project / "data/val/ant/0.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"^data: .*0\.png"):
        list(source.samples(source.validation, np.array([0])))


def test_the_first_images_are_the_networks_input(make: Make) -> None:
    source = make()
    first = source.first_pictures(2).images
    assert first.shape == (2, 3, 32, 32)
    assert np.array_equal(first[1], source.preprocess(source.validation.image(1)))
    assert len(source.first_pictures(99)) == 6


INT8 = {"ort": {"precisions": ["fp32", "int8"]}}


def loose(project: Path) -> None:
    """Photographs in one folder, of no class."""
    (project / "loose").mkdir()
    for i in range(9):
        Image.new("RGB", (32, 32), (i, 7, 9)).save(project / "loose" / f"{i}.png")


def test_calibration_images_need_no_class_folders(make: Make, project: Path) -> None:
    loose(project)
    source = make(data={"validation": "folder:data", "calibration": "folder:loose"}, targets=INT8)
    dataset = source.calibration
    assert len(dataset) == 9
    assert list(source.known_labels(dataset, np.arange(9))) == [-1] * 9
    before = source.data_inputs("calibration")
    Image.new("RGB", (32, 32), (200, 7, 9)).save(project / "loose" / "0.png")
    assert (
        make(data=source.config.data.model_dump(exclude_none=True)).data_inputs("calibration")
        != before
    )


def test_classes_of_calibration_images_may_be_any(make: Make, project: Path) -> None:
    (project / "data/train/ant").rename(project / "data/train/something")
    source = make(targets=INT8)
    labels = source.known_labels(source.calibration, np.arange(9))
    assert sorted(labels.tolist()) == [-1] * 3 + [1] * 3 + [2] * 3


def test_auto_takes_the_training_split_where_there_is_one(make: Make) -> None:
    source = make(data={"validation": "folder:data", "calibration": "auto"}, targets=INT8)
    assert not source.sets_aside
    assert (len(source.calibration), len(source.validation)) == (9, 6)


def test_auto_sets_validation_images_aside_where_there_are_no_others(
    make: Make, project: Path
) -> None:
    for i in range(30):
        Image.new("RGB", (32, 32), (i, 3, 9)).save(project / f"data/val/ant/{i + 10}.png")
    data = {"validation": "folder:data/val", "calibration": "auto"}
    source = make(data=data, targets=INT8, calibration={"images": 8})
    with pytest.raises(DataError, match="auto would set aside 7 of 36"):
        len(source.validation)
    for i in range(30):
        Image.new("RGB", (32, 32), (i, 4, 9)).save(project / f"data/val/bee/{i + 10}.png")
    source = make(data=data, targets=INT8, calibration={"images": 8})
    aside, judging = source.calibration, source.validation
    assert (len(aside), len(judging)) == (8, 58)
    hashes = [{each.hash(i) for i in range(len(each))} for each in (aside, judging)]
    assert not hashes[0] & hashes[1]
    again = make(data=data, targets=INT8, calibration={"images": 8})
    assert [again.calibration.name(i) for i in range(8)] == [aside.name(i) for i in range(8)]
    # Nothing is set aside for what needs no calibration.
    assert len(make(data=data).validation) == 66


def test_auto_takes_the_training_archive_of_imagenet_where_it_lies_there(
    make: Make, project: Path
) -> None:
    validation, truths = "ILSVRC2012_img_val.tar", "ILSVRC2012_validation_synset_labels.txt"
    for name in (validation, truths):
        (project / name).write_bytes(b"")
    data = {"validation": "imagenet:.", "calibration": "auto"}
    alone = make(data=data, targets=INT8)
    assert alone.sets_aside
    assert alone.files("calibration") == alone.files("validation")
    (project / "ILSVRC2012_img_train.tar").write_bytes(b"")
    both = make(data=data, targets=INT8)
    assert not both.sets_aside
    found = both.files("calibration")
    assert isinstance(found, Files)
    assert found.names == ("ILSVRC2012_img_train.tar",)


def test_images_that_judge_need_class_folders(make: Make, project: Path) -> None:
    loose(project)
    source = make(data={"validation": "folder:loose"})
    with pytest.raises(DataError, match=r"^data\.validation: .* 9 images but no class folders"):
        source.data_facts("validation")


def test_missing_calibration_images_are_named(make: Make) -> None:
    source = make(data={"validation": "folder:data", "calibration": None}, targets=INT8)
    with pytest.raises(ConfigError, match=r"missing, and ort/int8 needs .* or 'auto'"):
        source.files("calibration")


def test_orientation_tags_count_where_the_configuration_says_so(make: Make, project: Path) -> None:
    for exif in ("apply", "ignore"):
        source = make(preprocess={"exif": exif})
        assert source.validation.exif == source.calibration.exif == exif
        assert source.preprocess.exif == exif
        stated = source.network_inputs()["settings preprocess"]
        assert stated.get("exif", "apply") == exif


def trained(folder: Path, classes: tuple[str, ...] = CLASSES, **more: Any) -> str:
    """A checkpoint as training writes it, and its name."""
    torch.manual_seed(1)
    network = timm.create_model("test_resnet", num_classes=len(classes))
    stated = {"labels": list(classes), "num_classes": len(classes), **more}
    checkpoint.save(folder / "best.safetensors", network.state_dict(), stated)
    return "best.safetensors"


OWN_PREPROCESS = {
    "size": 64,
    "crop": 0.9,
    "interpolation": "bilinear",
    "channels": "rgb",
    "exif": "ignore",
    "mean": [0.4, 0.4, 0.4],
    "std": [0.2, 0.2, 0.2],
}


def test_a_checkpoint_says_its_classes(make: Make, project: Path) -> None:
    """They may be more than the images show, and in any order."""
    model = {"checkpoint": trained(project, ("dog", "cat", "bee", "ant"))}
    source = make(model=model)
    assert source.classes == (("dog", "cat", "bee", "ant"),) * 2
    assert source.class_indices(source.validation).tolist() == [3, 2, 1]
    assert source.network.labels == ("dog", "cat", "bee", "ant")
    assert labels_of(source) == ["dog", "cat", "bee", "ant"]
    (project / "names.txt").write_text("d\nc\nb\na\n")
    assert make(model=model, data={"labels": "names.txt"}).classes[0] == ("d", "c", "b", "a")


def test_a_class_that_the_checkpoint_does_not_name_is_refused(make: Make, project: Path) -> None:
    source = make(model={"checkpoint": trained(project, ("ant", "bee", "dog"))})
    with pytest.raises(DataError, match="class 'cat', which the checkpoint does not name"):
        source.class_indices(source.validation)


def test_a_checkpoint_says_how_images_are_prepared(make: Make, project: Path) -> None:
    model = {"checkpoint": trained(project, preprocess=OWN_PREPROCESS)}
    source = make(model=model, preprocess=None)
    assert source.preprocess.to_dict() == OWN_PREPROCESS
    assert source.validation.exif == source.calibration.exif == "ignore"
    assert source.network_inputs()["settings preprocess"] == OWN_PREPROCESS
    assert make(model=model).preprocess.size == 32  # what is stated here counts


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"labels": "ant"}, "labels is 'ant', no list of names"),
        ({"labels": ["ant", "ant", "b"]}, "the class 'ant' is named twice"),
        ({"labels": ["ant", "b\u001b", "c"]}, "control character"),
        ({"preprocess": {"size": 32}}, "preprocessing lacks crop"),
        ({"preprocess": [1]}, "preprocessing is a mapping"),
        ({"hold_out": 0.5}, "hold_out is 0.5, no mapping"),
        ({"hold_out": {"share": 1.5, "seed": 0, "identity": "x"}}, "no share and no seed"),
        ({"hold_out": {"share": 0.5, "seed": -1, "identity": "x"}}, "no share and no seed"),
        ({"hold_out": {"share": 0.5, "seed": 0}}, "identity: Field required"),
    ],
)
def test_what_no_training_states_is_refused(
    make: Make, project: Path, stated: dict[str, Any], words: str
) -> None:
    source = make(model={"checkpoint": trained(project, **stated)})
    with pytest.raises(ModelError, match=words) as caught:
        _ = source.described
    assert str(caught.value).startswith("model.checkpoint: best.safetensors was refused")


def held_out_of(folder: Path, uri: str) -> dict[str, Any]:
    return {"hold_out": {"share": 0.4, "seed": 3, "identity": open_dataset(uri).identity()}}


def test_what_training_held_out_judges_and_the_rest_calibrates(make: Make, project: Path) -> None:
    uri = "folder:data/train"
    for number in range(3, 15):
        for place, name in enumerate(CLASSES):
            shade = (number * 10, place, 9)
            Image.new("RGB", (32, 32), shade).save(project / f"data/train/{name}/{number}.png")
    more = held_out_of(project, uri)
    model = {"checkpoint": trained(project, **more)}
    data = {"validation": uri, "calibration": "auto"}
    source = make(model=model, data=data, targets=INT8)
    learned, held_out = hold_out(open_dataset(uri), 0.4, 3)
    names = [held_out.name(i) for i in range(len(held_out))]
    assert [source.validation.name(i) for i in range(len(source.validation))] == names
    assert source.judges_held_out
    assert len(source.calibration) == len(learned) == 27
    assert not {source.calibration.name(i) for i in range(27)} & set(names)
    assert source.data_inputs("validation")["what training held out"] == more["hold_out"]
    assert "what training held out" not in source.data_inputs("calibration")
    # Without calibration nothing else judges either.
    plain = make(model=model, data={"validation": uri, "calibration": None})
    assert len(plain.validation) == len(held_out)


def test_other_images_than_those_of_training_judge_whole(make: Make, project: Path) -> None:
    model = {"checkpoint": trained(project, **held_out_of(project, "folder:data/train"))}
    source = make(model=model)
    assert not source.judges_held_out
    assert len(source.validation) == 6
    (project / "data/train/ant/0.png").rename(project / "data/train/ant/new.png")
    assert not make(model=model, data={"validation": "folder:data/train"}).judges_held_out


def numbered(folder: Path, classes: int) -> str:
    """WebDataset shards, whose classes are numbers."""
    with tarfile.open(folder / "s-0.tar", "w") as tar:
        for label in range(classes):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (label, 0, 0)).save(buffer, "png")
            for name, data in (
                (f"{label}.png", buffer.getvalue()),
                (f"{label}.cls", b"%d" % label),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return "wds:s-{0..0}.tar"


def test_the_head_says_how_many_classes_there_are(make: Make, project: Path) -> None:
    """Images that state numbers alone may not show the last ones."""
    data = {"validation": numbered(project, 4)}
    network = timm.create_model("test_resnet", num_classes=7)
    torch.save({"state_dict": network.state_dict()}, project / "own.pth")
    source = make(model={"checkpoint": "own.pth"}, data=data)
    assert source.classes[0] == tuple("0123456")
    assert source.class_indices(source.validation).tolist() == [0, 1, 2, 3]
    assert source.network.labels == tuple("0123456")
    before = labels_of(source)
    torch.save(timm.create_model("test_resnet", num_classes=8).state_dict(), project / "own.pth")
    assert labels_of(make(model={"checkpoint": "own.pth"}, data=data)) != before
    assert make(data=data).classes[0] == tuple("0123")


def test_more_numbers_than_the_head_has_classes_are_refused(make: Make, project: Path) -> None:
    data = {"validation": numbered(project, 4)}
    source = make(model={"checkpoint": trained(project)}, data=data)
    with pytest.raises(DataError, match="the class 3, and the network 3 classes, from 0"):
        source.class_indices(source.validation)


def test_a_head_of_another_size_says_what_to_do(make: Make, project: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=9)
    torch.save({"state_dict": network.state_dict()}, project / "own.pth")
    with pytest.raises(
        ModelError, match=r"own\.pth has a head of 9 classes, and data\.validation 3: .* --init"
    ):
        _ = make(model={"checkpoint": "own.pth"}).module
    (project / "names.txt").write_text("ant\nbee\ncat\nd\n")
    with pytest.raises(ModelError, match=r"9 classes, and data\.labels 4"):
        _ = make(model={"checkpoint": "own.pth"}, data={"labels": "names.txt"}).module
    stated = {"labels": list(CLASSES)}
    checkpoint.save(project / "own.safetensors", network.state_dict(), stated)
    with pytest.raises(ModelError, match="9 classes, and its own list of labels 3"):
        _ = make(model={"checkpoint": "own.safetensors"}).module


def test_weights_may_lie_in_several_files(make: Make, project: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    names = list(state)
    holder = {name: f"m-{names.index(name) % 2}.safetensors" for name in names}
    for file in set(holder.values()):
        checkpoint.save(project / file, {n: state[n] for n in names if holder[n] == file})
    (project / "m.index.json").write_text(json.dumps({"weight_map": holder}))
    source = make(model={"checkpoint": "m.index.json"})
    known = source.checkpoint_hash
    found = source.module.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in names)
    part = {n: state[n] + 1 for n in names if holder[n] == "m-1.safetensors"}
    checkpoint.save(project / "m-1.safetensors", part)
    assert make(model={"checkpoint": "m.index.json"}).checkpoint_hash != known
    (project / "m-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.checkpoint: .* m-1\.safetensors is missing"):
        _ = make(model={"checkpoint": "m.index.json"}).checkpoint_hash


# ------------------------------------------------------------------ published weights


@pytest.fixture
def published(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights of a network, as if they came from the Hub, and names of its 1000 classes."""
    import huggingface_hub

    model = timm.create_model("test_resnet", num_classes=1000)
    torch.save(model.state_dict(), project / "hub.pt")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repository, file, **more: str(project / "hub.pt")
    )
    names = [*CLASSES, *(f"class {number}" for number in range(997))]
    (project / "labels.txt").write_text("\n".join(names))
    return project / "hub.pt"


PUBLISHED = {
    "model": {"name": "timm/test_resnet", "checkpoint": "pretrained"},
    "data": {"validation": "folder:data", "labels": "labels.txt"},
}


def test_published_weights_are_a_checkpoint_with_a_licence(make: Make, published: Path) -> None:
    source = make(**PUBLISHED)
    assert source.checkpoint() == published
    assert source.checkpoint_hash == file_hash(published)
    said = source.network.description
    assert (said["license"], said["weights"]) == ("apache-2.0", "timm's test_resnet.r160_in1k")
    assert "license_remark" not in said
    state = torch.load(published, weights_only=True)
    first = next(iter(state))
    assert torch.equal(source.module.state_dict()[first], state[first])


def test_a_licence_that_forbids_commerce_is_remarked(
    make: Make, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from care import pretrained

    monkeypatch.setattr(pretrained, "_known", lambda stated: "cc-by-nc-4.0")
    said = make(**PUBLISHED).network.description
    assert said["license_remark"] == (
        "the licence of the weights, cc-by-nc-4.0, forbids commercial use"
    )


def test_published_weights_are_for_named_networks() -> None:
    stated = {**CONFIG, "model": {"module": "a.b:c", "checkpoint": "pretrained"}}
    with pytest.raises(ConfigError, match="checkpoint 'pretrained' is for named networks"):
        config.from_mapping(stated)


# ------------------------------------------------------------------ networks of the Hub's

HUB = {"model": {"hub": "mine/little"}}


@pytest.fixture
def hub(project: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A repository in a cache, and no network; returns what it holds."""
    offline(monkeypatch, project / "hub")
    return lay(project / "hub")


def of_hub(project: Path, **sections: Any) -> Source:
    values = {key: value for key, value in CONFIG.items() if key not in ("model", "preprocess")}
    values |= {**HUB, **sections}
    config_ = config.from_mapping(values).config
    return Source(config_, HashCache(project / ".hashes.sqlite"))


def test_a_repository_gives_network_weights_labels_and_preprocessing(
    project: Path, hub: nn.Module
) -> None:
    source = of_hub(project)
    assert source.config.model.checkpoint == "hub"
    assert source.classes == (CLASSES, CLASSES)
    state = source.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in hub.state_dict().items())
    spec = source.preprocess
    assert (spec.size, spec.crop, spec.interpolation) == (32, 0.8, "bilinear")
    assert spec.mean == (0.4, 0.5, 0.6)
    said = source.network.description
    assert said == {
        "model": "mine/little",
        "weights": f"mine/little of the Hub, commit {COMMIT[:12]}",
        "license": "cc-by-nc-4.0",
        "license_remark": "the licence of the weights, cc-by-nc-4.0, forbids commercial use",
    }
    assert source.network.licence == {key: said[key] for key in list(said)[1:]}
    source.look()


def test_what_a_repository_says_is_in_the_key(project: Path, hub: nn.Module) -> None:
    before = of_hub(project).network_inputs()["what the hub states"]
    assert before["architecture"] == "test_resnet"
    (config_file,) = (project / "hub").glob("*/snapshots/*/config.json")
    config_file.write_text(config_file.read_text().replace("0.8", "0.9"))
    assert of_hub(project).network_inputs()["what the hub states"] != before


def test_stated_preprocessing_and_labels_come_first(project: Path, hub: nn.Module) -> None:
    (project / "labels.txt").write_text("cat\nbee\nant\n")
    stated = {"data": {**CONFIG["data"], "labels": "labels.txt"}}
    source = of_hub(project, preprocess=CONFIG["preprocess"], **stated)
    assert source.preprocess.crop == 1.0
    assert source.classes[0] == ("cat", "bee", "ant")


def test_a_repository_of_other_classes_says_what_to_do(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, project / "hub")
    lay(project / "hub", config={**HUB_CONFIG, "label_names": None, "num_classes": 3})
    (project / "labels.txt").write_text("ant\nbee\ncat\ndog\n")
    source = of_hub(project, data={**CONFIG["data"], "labels": "labels.txt"})
    with pytest.raises(CheckpointError, match=r"model\.hub: .* has a head of 3 classes, and data"):
        _ = source.module


def test_a_repository_that_cannot_be_had_is_told(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, project / "hub")
    with pytest.raises(ModelError, match=r"model\.hub: mine/little of the Hub: config\.json is"):
        of_hub(project).look()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hub": "mine/little", "checkpoint": "x.pth"}, "leave out checkpoint and ema"),
        ({"hub": "mine/little", "ema": True}, "leave out checkpoint and ema"),
        ({"hub": "mine/little", "name": "care_tiny"}, "one of them"),
        ({"hub": "little"}, "string should match pattern"),
        ({"name": "care_tiny", "checkpoint": "hub"}, "for other weights give name and checkpoint"),
        ({"hub": "mine/little", "kwargs": {"pretrained": True}}, "pretrained"),
    ],
)
def test_a_repository_stands_alone(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.from_mapping({**CONFIG, "model": model})
