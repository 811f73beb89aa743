"""Where a run begins: the network and the images that a configuration names.

This is the only place where the pipeline meets `care`. What planning needs (which files, with which
hashes) is had without importing it; networks and images are loaded when a stage asks for them.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config import Config
from pipeline.core.errors import DataError, ModelError, about
from pipeline.core.files import digest_of
from pipeline.core.hashes import HashCache
from pipeline.core.network import Network
from pipeline.steps.keys import code_hash, versions

if TYPE_CHECKING:
    from torch import nn

    from care.data import Dataset
    from pipeline.core.preprocess import Preprocess

EMBEDDED = "embedded"
RANDOM = "random"
IMAGENET = "imagenet-1k"
TIMM_PREFIX = "timm/"
RANDOM_SEED = 0


class Source:
    """The network and the images of a configuration.

    Args:
        config: The configuration.
        hashes: Remembers hashes of input files.
    """

    def __init__(self, config: Config, hashes: HashCache) -> None:
        self.config = config
        self.hashes = hashes

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
        path = Path(stated)
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
        """Everything but the checkpoint that decides what the network computes."""
        config = self.config
        return {
            "model": config.model.model_dump(mode="json", exclude={"checkpoint"}),
            "preprocess": config.preprocess and config.preprocess.model_dump(mode="json"),
            "labels": self._labels_identity(),
            "code": code_hash("care.model", "care.mlla", "care.fuse", "pipeline.core.preprocess"),
            "tools": versions("torch", "timm"),
        }

    def data_inputs(self, uri: str) -> dict[str, Any]:
        """Identity of a dataset by the content of its files."""
        scheme, _, rest = uri.partition(":")
        files = _dataset_files(scheme, rest)
        listing = [(str(file), self.hashes.hash(file)) for file in files]
        return {"uri": uri, "files": len(listing), "content": digest_of(listing)}

    def _labels_identity(self) -> Any:
        stated = self.config.data.labels
        if stated is None:
            return self.data_inputs(self.config.data.validation)["uri"]
        return stated if stated == IMAGENET else self.hashes.hash(self._labels_file(stated))

    @staticmethod
    def _labels_file(stated: str) -> Path:
        path = Path(stated)
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
        return self._open("validation", self.config.data.validation)

    @cached_property
    def calibration(self) -> Dataset:
        """The split of training images for calibration."""
        return self._open("calibration", self.config.data.calibration)

    def _open(self, split: str, uri: str) -> Dataset:
        from care.data import open_dataset

        # Only the embedded set has a split of its own for calibration; else it is the training's.
        own = uri.partition(":")[0] == "fashion-mnist" or split == "validation"
        with about(f"data.{split}"):
            return open_dataset(uri, split if own else "train")

    @cached_property
    def classes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Identifiers and readable names of the classes, in the order of the logits."""
        stated = self.config.data.labels
        if stated is None:
            return self.validation.classes, self.validation.classes
        from care.data.labels import imagenet_labels, read_labels

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

    def fused(self) -> nn.Module:
        """A fresh copy of the exact inference form; for networks not ours, of the network."""
        import copy

        from care.fuse import fuse
        from care.mlla import Mlla, inference_form
        from care.model import Care

        module = self.module
        if isinstance(module, Care):
            with about("model"):
                return fuse(module)
        if isinstance(module, Mlla):
            return inference_form(module)
        return copy.deepcopy(module)

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


def _dataset_files(scheme: str, rest: str) -> list[Path]:
    """The files whose content decides what a dataset is; all there are, rather too many."""
    if scheme == "fashion-mnist":
        folders = [_package_folder("care") / "assets", *([Path(rest)] if rest else [])]
        files = [file for folder in folders for file in sorted(folder.glob("*.gz"))]
    elif scheme == "folder":
        files = sorted(file for file in Path(rest).rglob("*") if file.is_file())
    elif scheme == "tar":
        files = [file for file in [Path(rest)] if file.is_file()]
    else:
        # Braces become a wildcard: shards beside those named count too, which costs only time.
        pattern = Path(re.sub(r"\{[^}]*\}", "*", rest))
        files = sorted(pattern.parent.glob(pattern.name))
    if not files:
        raise DataError(f"dataset {scheme}:{rest} has no files: check the path")
    return files
