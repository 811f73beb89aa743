"""Where a run begins: the network and the images that a configuration names.

This is the only place where the pipeline meets `care`. What planning needs (which files, with which
hashes) is had without importing it; networks and images are loaded when a stage asks for them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.config import Config
from pipeline.core.errors import DataError, ModelError, about
from pipeline.core.hashes import HashCache, Identity, identify
from pipeline.core.labels import imagenet_labels, read_labels, require_distinct
from pipeline.core.listing import Files, Folders, list_split
from pipeline.core.network import Network
from pipeline.steps.keys import versions

if TYPE_CHECKING:
    from torch import nn

    from care.data import Dataset
    from care.inference import InferenceForm
    from pipeline.core.preprocess import Preprocess
    from pipeline.steps.step import Progress

EMBEDDED = "embedded"
RANDOM = "random"
IMAGENET = "imagenet-1k"
TIMM_PREFIX = "timm/"
RANDOM_SEED = 0

Split = Literal["validation", "calibration"]
"""The data that a configuration names."""


class Source:
    """The network and the images of a configuration.

    Args:
        config: The configuration.
        hashes: Remembers hashes of input files.
        progress: Is told how far the hashing of a dataset is.
    """

    def __init__(self, config: Config, hashes: HashCache, progress: Progress | None = None) -> None:
        self.config = config
        self.hashes = hashes
        self.progress = progress
        self._identities: dict[Split, Identity] = {}

    # What planning needs: no framework is imported for it.

    def checkpoint(self) -> Path | None:
        """Path of the checkpoint, or None for random weights.

        Raises:
            ModelError: The file is missing.
        """
        stated = self.config.model.checkpoint
        if stated == RANDOM:
            return None
        if stated == EMBEDDED:
            path = _package_folder("care") / "assets" / f"{self.config.model.name}.safetensors"
            if not path.is_file():
                raise ModelError(
                    f"model.checkpoint: the package carries no weights of {path.stem}: "
                    "name a checkpoint file"
                )
            return path
        path = Path(stated).expanduser()
        if not path.is_file():
            raise ModelError(
                f"model.checkpoint: {path} is no file: name a checkpoint, or '{EMBEDDED}'"
            )
        return path

    @cached_property
    def checkpoint_hash(self) -> str:
        """SHA-256 of the checkpoint, one for the whole run; "random" for random weights."""
        path = self.checkpoint()
        return RANDOM if path is None else self.hashes.hash(path)

    def network_inputs(self) -> dict[str, Any]:
        """Everything but the checkpoint that decides what the network computes, for a key."""
        config = self.config
        return {
            "settings name": config.name,
            "settings model": config.model.model_dump(mode="json", exclude={"checkpoint"}),
            "settings preprocess": config.preprocess and config.preprocess.model_dump(mode="json"),
            "the labels": self._labels_identity,
        }

    def tools(self) -> dict[str, str]:
        """Versions of what makes the network."""
        return versions("torch", "timm")

    def data_inputs(self, split: Split) -> dict[str, Any]:
        """What a split of the data is, wherever it lies, for a key."""
        identity = self._identity(split)
        return {
            f"the images of data.{split}": identity.digest,
            "settings data.identity": identity.kind,
        }

    def data_facts(self, split: Split) -> dict[str, Any]:
        """What a split of the data is, and how that is known, for the artifact that it makes."""
        identity = self._identity(split)
        return {
            "identity": identity.kind,
            "digest": identity.digest,
            "files": identity.files,
        }

    def uri(self, split: Split) -> str:
        """Where a split of the data lies, as the configuration says it."""
        data = self.config.data
        return data.validation if split == "validation" else data.calibration

    def _split_of_dataset(self, split: Split) -> str:
        """What the dataset calls the split.

        Only the embedded set has a split of its own for calibration; else it is the training's.
        """
        own = self.uri(split).partition(":")[0] == "fashion-mnist" or split == "validation"
        return split if own else "train"

    def _files(self, split: Split) -> Folders | Files:
        with about(f"data.{split}"):
            return list_split(
                self.uri(split), self._split_of_dataset(split), _package_folder("care") / "assets"
            )

    def _identity(self, split: Split) -> Identity:
        """Identity of a split, looked up once a run."""
        if split not in self._identities:
            self._identities[split] = self._identify(split, self._files(split))
        return self._identities[split]

    def _identify(self, split: Split, files: Folders | Files) -> Identity:
        def tell(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(done, total, f"hashing the images of data.{split}")

        with about(f"data.{split}"):
            return identify(files, self.hashes, self.config.data.identity, tell)

    @cached_property
    def _labels_identity(self) -> Any:
        """What decides names and order of the classes."""
        stated = self.config.data.labels
        if stated == IMAGENET:
            return stated
        if stated is not None:
            return self.hashes.hash(self._labels_file(stated))
        files = self._files("validation")
        if isinstance(files, Folders):
            return list(files.classes)
        stating = Files(files.root, files.labels, files.labels)
        return self._identify("validation", stating).digest

    @staticmethod
    def _labels_file(stated: str) -> Path:
        path = Path(stated).expanduser()
        if not path.is_file():
            raise DataError(
                f"data.labels: {path} is no file: name a text file with a class a line, or "
                f"'{IMAGENET}'"
            )
        return path

    # What stages need: these import torch, timm and care.

    @cached_property
    def preprocess(self) -> Preprocess:
        """How an image becomes the network's input."""
        from pipeline.core.preprocess import Preprocess

        stated = self.config.preprocess
        with about("preprocess"):
            if stated is not None:
                return Preprocess.from_dict(stated.model_dump())
            return Preprocess.from_model(self.module)

    @cached_property
    def validation(self) -> Dataset:
        """The validation split."""
        return self._open("validation")

    @cached_property
    def calibration(self) -> Dataset:
        """The split of training images for calibration."""
        return self._open("calibration")

    def _open(self, split: Split) -> Dataset:
        from care.data import open_dataset

        with about(f"data.{split}"):
            return open_dataset(self.uri(split), self._split_of_dataset(split))

    @cached_property
    def classes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Identifiers and readable names of the classes, in the order of the logits."""
        stated = self.config.data.labels
        if stated is None:
            classes = self.validation.classes
            require_distinct(classes, "data.validation")
            return classes, classes
        if stated == IMAGENET:
            return imagenet_labels()
        with about("data.labels"):
            return read_labels(self._labels_file(stated))

    def class_indices(self, dataset: Dataset) -> npt.NDArray[np.int64]:
        """For every class of the dataset, its index among the logits.

        Raises:
            DataError: A class of the dataset is unknown to the labels.
        """
        if not dataset.names_known:
            return np.arange(len(dataset.classes), dtype=np.int64)
        order = {name: i for i, name in enumerate(self.classes[0])}
        unknown = [name for name in dataset.classes if name not in order]
        if unknown:
            raise DataError(
                f"the dataset has the class {unknown[0]!r}, which data.labels does not name "
                f"({len(unknown)} such classes): give the labels of the network, in its order"
            )
        return np.array([order[name] for name in dataset.classes], dtype=np.int64)

    @cached_property
    def module(self) -> nn.Module:
        """The network in evaluation mode, in float32, with its weights."""
        import torch

        from care import checkpoint
        from care.factory import create_model

        stated, count = self.config.model, len(self.classes[0])
        name = stated.name.removeprefix(TIMM_PREFIX)
        torch.manual_seed(RANDOM_SEED)
        named = stated.kwargs.get("num_classes", count)
        if named != count:
            raise ModelError(
                f"model.kwargs: num_classes is {named!r}, and data.labels names {count} classes: "
                "leave it out"
            )
        with about("model"):
            module = create_model(name, **{**stated.kwargs, "num_classes": count}).eval()
        path = self.checkpoint()
        if path is not None:
            with about("model.checkpoint"):
                checkpoint.load(path, module, ema=stated.ema)
        return module

    def inference_form(self) -> InferenceForm:
        """A fresh copy of the network in the form that is deployed, and what was done to it."""
        from care.inference import inference_form

        with about("model"):
            return inference_form(self.module, self.network.input_shape)

    def fused(self) -> nn.Module:
        """A fresh copy of the network in the form that is deployed."""
        return self.inference_form().module

    @cached_property
    def network(self) -> Network:
        """Labels, shape and preprocessing, which every artifact carries."""
        from care.factory import check_input

        preprocess, names = self.preprocess, self.classes[1]
        shape = (preprocess.depth, preprocess.size, preprocess.size)
        with about("model"):
            check_input(self.module, shape, len(names))
        return Network(
            name=self.config.name,
            labels=names,
            input_shape=shape,
            preprocess=preprocess.to_dict(),
            description={"model": self.config.model.name},
        )

    def samples(
        self, dataset: Dataset, indices: npt.NDArray[np.int64]
    ) -> Iterator[npt.NDArray[np.uint8]]:
        """Resized and cropped images, (height, width, channels) each, one by one."""
        for index in indices.tolist():
            with about("data"):
                pixels = self.preprocess.pixels(dataset.image(index))
            yield pixels

    def first_images(self, count: int) -> npt.NDArray[np.float32]:
        """The first validation images, at most so many, (images, channels, height, width)."""
        dataset = self.validation
        return np.stack(
            [self.preprocess(dataset.image(i)) for i in range(min(count, len(dataset)))]
        )


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the package {package} is not installed: install this project")
    return Path(spec.submodule_search_locations[0])
