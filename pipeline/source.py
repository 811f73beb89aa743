"""Where a run begins: the network and the images that a configuration names.

This is the only place where the pipeline meets `care`. What planning needs (which files, with which
hashes) is had without importing it; networks and images are loaded when a stage asks for them.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.artifact import digest_of, file_hash, write_atomically
from pipeline.config import Config
from pipeline.errors import DataError, ModelError, PipelineError
from pipeline.stages.base import code_hash, versions
from pipeline.targets.base import Network

if TYPE_CHECKING:
    from torch import nn

    from care.data import Dataset
    from care.preprocess import Preprocess

T = TypeVar("T")

EMBEDDED = "embedded"
RANDOM = "random"
IMAGENET = "imagenet-1k"
TIMM_PREFIX = "timm/"
RANDOM_SEED = 0


class HashCache:
    """SHA-256 of input files, remembered as long as size, date and inode stay the same.

    A touched file is hashed again; its hash stays what it was, so nothing is built again.

    Args:
        path: Where the hashes are kept; a missing file only costs time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, list[Any]] = {}
        try:
            loaded = json.loads(path.read_text())
        except (OSError, ValueError):
            loaded = {}
        if isinstance(loaded, dict):
            self.known = loaded
        self.changed = False

    @staticmethod
    def is_cache(path: Path) -> bool:
        """Whether a file is such a cache."""
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(loaded, dict) and all(
            isinstance(entry, list) and len(entry) == 4 for entry in loaded.values()
        )

    def hash(self, file: Path) -> str:
        """SHA-256 of a file, in hexadecimal."""
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        entry = self.known.get(str(file))
        if not (isinstance(entry, list) and len(entry) == 4 and entry[:3] == stamp):
            entry = self.known[str(file)] = [*stamp, file_hash(file)]
            self.changed = True
        return str(entry[3])

    def save(self) -> None:
        """Write down what was learned.

        Raises:
            ArtifactError: The file is somebody else's, or cannot be written.
        """
        if self.changed:
            write_atomically(self.path, json.dumps(self.known), self.is_cache)
            self.changed = False


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
            "code": code_hash("care.model", "care.mlla", "care.fuse", "care.preprocess"),
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
        from care.preprocess import Preprocess

        stated = self.config.preprocess
        if stated is not None:
            return translated("preprocess", lambda: Preprocess.from_dict(stated.model_dump()))
        return translated("preprocess", lambda: Preprocess.from_model(self.module))

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
        return translated(f"data.{split}", lambda: open_dataset(uri, split if own else "train"))

    @cached_property
    def classes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Identifiers and readable names of the classes, in the order of the logits."""
        stated = self.config.data.labels
        if stated is None:
            return self.validation.classes, self.validation.classes
        if stated == IMAGENET:
            from timm.data import ImageNetInfo

            info = ImageNetInfo("imagenet-1k")
            descriptions = (text.split(",")[0] for text in info.label_descriptions())
            return tuple(info.label_names()), tuple(descriptions)
        lines = [
            line for line in self._labels_file(stated).read_text().splitlines() if line.strip()
        ]
        pairs = [(line.split("\t")[0].strip(), line.split("\t")[-1].strip()) for line in lines]
        return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)

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
        module = translated(
            "model", lambda: create_model(name, num_classes=count, **stated.kwargs)
        ).eval()
        path = self.checkpoint()
        if path is not None:
            translated("model.checkpoint", lambda: checkpoint.load(path, module, ema=stated.ema))
        return module

    def fused(self) -> nn.Module:
        """A fresh copy of the exact inference form; for networks not ours, of the network."""
        import copy

        from care.fuse import fuse
        from care.mlla import Mlla, inference_form
        from care.model import Care

        module = self.module
        if isinstance(module, Care):
            return translated("model", lambda: fuse(module))
        if isinstance(module, Mlla):
            return inference_form(module)
        return copy.deepcopy(module)

    @cached_property
    def network(self) -> Network:
        """Labels, shape and preprocessing, which every artifact carries."""
        preprocess, names = self.preprocess, self.classes[1]
        return Network(
            name=self.config.name,
            labels=names,
            input_shape=(preprocess.depth, preprocess.size, preprocess.size),
            preprocess=preprocess.to_dict(),
            description={"model": self.config.model.name},
        )

    def samples(
        self, dataset: Dataset, indices: npt.NDArray[np.int64]
    ) -> Iterator[npt.NDArray[np.uint8]]:
        """Resized and cropped images, (height, width, channels) each, one by one."""
        for index in indices.tolist():
            yield translated("data", partial(self._pixels, dataset, index))

    def first_images(self, count: int) -> npt.NDArray[np.float32]:
        """The first validation images, at most so many, (images, channels, height, width)."""
        dataset = self.validation
        return np.stack(
            [self.preprocess(dataset.image(i)) for i in range(min(count, len(dataset)))]
        )

    def _pixels(self, dataset: Dataset, index: int) -> npt.NDArray[np.uint8]:
        return self.preprocess.pixels(dataset.image(index))


def translated(where: str, call: Callable[[], T]) -> T:
    """Call into `care`, turning its errors into those of the pipeline.

    Args:
        where: Key of the configuration that the call is about.
        call: The call.

    Raises:
        PipelineError: What `care` raised, as the pipeline's own kind.
    """
    from care import errors

    kinds: dict[type[errors.CareError], type[PipelineError]] = {
        errors.DataError: DataError,
        errors.CareError: ModelError,
    }
    try:
        return call()
    except errors.CareError as error:
        kind = next(ours for theirs, ours in kinds.items() if isinstance(error, theirs))
        raise kind(f"{where}: {error}") from error


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
