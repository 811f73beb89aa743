"""Where a run begins: the network and the images that a configuration names.

This is the only place where the pipeline meets `care`. What planning needs (which files, with which
hashes) is had without importing it; networks and images are loaded when a stage asks for them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from calibration.sample import FEWEST
from pipeline.config import AUTO, OWN_WEIGHTS, Config
from pipeline.core.checkpoints import require_kind
from pipeline.core.described import NOTHING, Described, describe
from pipeline.core.errors import CheckpointError, ConfigError, DataError, ModelError, about
from pipeline.core.files import file_hash
from pipeline.core.hashes import HashCache, Identity, identify
from pipeline.core.labels import imagenet_labels, read_labels, require_distinct
from pipeline.core.listing import Files, Folders, list_split, parse
from pipeline.core.network import LICENCE_REMARK, Network
from pipeline.core.shards import weight_files, weights_hash
from pipeline.core.threads import threads_for
from pipeline.core.words import shown
from pipeline.steps.keys import own_code, versions

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from care.cost import Cost
    from care.data import Dataset
    from care.inference import InferenceForm
    from care.pretrained import HubNetwork, Pretrained
    from pipeline.core.network import Images
    from pipeline.core.preprocess import Pictures, Preprocess
    from pipeline.core.runner import Runner
    from pipeline.steps.facts.accuracy import ModuleRange
    from pipeline.steps.step import Progress

EMBEDDED = "embedded"
PRETRAINED = "pretrained"
RANDOM = "random"
IMAGENET = "imagenet-1k"
TIMM_PREFIX = "timm/"
RANDOM_SEED = 0
MOST_SET_ASIDE = 0.2
"""Share of the validation images that calibration may take where there are no others."""
RANDOM_WEIGHTS = f"random (seed {RANDOM_SEED}), BatchNorm statistics of noise"

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
        """Path of the checkpoint; None for random weights, and for those of the user's module.

        Raises:
            ModelError: The file is missing.
        """
        stated = self.config.model.checkpoint
        if stated in (RANDOM, OWN_WEIGHTS):
            return None
        if stated == EMBEDDED:
            path = _package_folder("care") / "assets" / f"{self.config.model.name}.safetensors"
            if not path.is_file():
                raise ModelError(
                    f"model.checkpoint: the package carries no weights of {path.stem}: "
                    "name a checkpoint file"
                )
            return path
        if self.hub is not None:
            return self.hub.weights.path
        if self.published is not None:
            return self.published.path
        path = Path(stated).expanduser()
        if not path.is_file():
            raise ModelError(
                f"model.checkpoint: {path} is no file: name a checkpoint, or '{EMBEDDED}'"
            )
        return path

    @cached_property
    def published(self) -> Pretrained | None:
        """The weights that timm has of the network, where these are asked for.

        Raises:
            ModelError: There are none, or they cannot be had.
        """
        stated = self.config.model
        if stated.checkpoint != PRETRAINED:
            return None
        from care.pretrained import fetch

        with about("model.checkpoint"):
            return fetch(str(stated.name).removeprefix(TIMM_PREFIX))

    @cached_property
    def hub(self) -> HubNetwork | None:
        """The network of the Hub's, where one is named.

        Raises:
            ModelError: Its repository holds none, or cannot be had.
        """
        if self.config.model.hub is None:
            return None
        from care.pretrained import fetch_hub

        with about("model.hub"):
            return fetch_hub(self.config.model.hub)

    @cached_property
    def checkpoint_hash(self) -> str:
        """SHA-256 of the checkpoint, one for the whole run; without one, "random" or "own".

        Weights decide everything, so they are hashed in every run: a date can be set back. What is
        loaded later has to have this very hash.

        Raises:
            ModelError: The file cannot be read.
        """
        path = self.checkpoint()
        if path is None:
            return self.config.model.checkpoint
        try:
            with about("model.checkpoint"):
                return weights_hash(path)
        except OSError as error:
            raise ModelError(
                f"model.checkpoint: cannot read {path}: {error.strerror or error}"
            ) from error

    @cached_property
    def described(self) -> Described:
        """What the checkpoint says of itself: it stands where the configuration says nothing.

        Raises:
            CheckpointError: It cannot be read, or says what no training writes.
        """
        path = self.checkpoint()
        if path is None:
            return NOTHING
        if self.hub is not None:  # the repository speaks for its file
            return Described(labels=self.hub.labels)
        with about("model.checkpoint"):
            return describe(path)

    def look(self) -> None:
        """Look at the weights as far as no framework is needed.

        Raises:
            ModelError: They are missing, no checkpoint, or say of themselves what makes no sense.
        """
        path = self.checkpoint()
        if path is not None:
            with about("model.checkpoint"):
                require_kind(path)
            _ = self.described

    def weight_files(self) -> Iterator[tuple[str, Path, str]]:
        """Name, path and SHA-256 of each file that holds weights."""
        path = self.checkpoint()
        if path is not None:
            for file in weight_files(path):
                yield file.name, file, file_hash(file)

    def network_inputs(self) -> dict[str, Any]:
        """Everything but the checkpoint that decides what the network computes, for a key."""
        config = self.config
        return {
            **({"the code of model.module": self._module_code} if config.model.module else {}),
            **({"what the hub states": self._hub_identity} if config.model.hub else {}),
            "settings name": config.name,
            "settings model": config.model.model_dump(
                mode="json", exclude={"checkpoint", "onnx"}, exclude_none=True
            ),
            "settings preprocess": self._preprocess_identity,
            "the labels": self._labels_identity,
        }

    @property
    def _hub_identity(self) -> dict[str, Any]:
        """What the repository says of the network, beside its weights."""
        assert self.hub is not None
        hub = self.hub
        told = {"architecture": hub.architecture, "arguments": hub.arguments}
        return {**told, "stated": hub.stated, "license": hub.weights.licence}

    @property
    def _preprocess_identity(self) -> dict[str, Any] | None:
        """What is said of preprocessing, by the configuration or else by the checkpoint."""
        stated = self.config.preprocess
        if stated is not None:
            from pipeline.core.preprocess import LATER

            plain = stated.model_dump(mode="json")
            return {name: value for name, value in plain.items() if LATER.get(name) != value}
        own = self.described.preprocess
        return None if own is None else own.to_dict()

    @cached_property
    def _module_code(self) -> dict[str, str]:
        with about("model.module"):
            return own_code(str(self.config.model.module))

    def tools(self) -> dict[str, str]:
        """Versions of what makes the network."""
        return versions("torch", "timm")

    def data_inputs(self, split: Split) -> dict[str, Any]:
        """What a split of the data is, wherever it lies, for a key."""
        identity = self._identity(split)
        found: dict[str, Any] = {
            f"the images of data.{split}": identity.digest,
            "settings data.identity": identity.kind,
        }
        held_out = self.described.hold_out
        if split == "validation" and held_out is not None:
            found["what training held out"] = held_out.to_dict()
        return found

    def data_facts(self, split: Split) -> dict[str, Any]:
        """What a split of the data is, and how that is known, for the artifact that it makes."""
        identity = self._identity(split)
        return {
            "identity": identity.kind,
            "digest": identity.digest,
            "files": identity.files,
        }

    def uri(self, split: Split) -> str:
        """Where a split of the data lies, as the configuration says it; of "auto", where it is.

        Raises:
            ConfigError: Calibration images are needed, and none are named.
        """
        data = self.config.data
        if split == "validation" or data.calibration == AUTO:
            return data.validation
        if data.calibration is None:
            raise ConfigError(
                f"data.calibration is missing, and {', '.join(self.config.calibrated)} needs "
                "calibration images: name a folder of training images (folder:PATH), or 'auto'"
            )
        return data.calibration

    def _split_of_dataset(self, split: Split) -> str:
        """What the dataset calls the split.

        Only the embedded set has a split of its own for calibration; else it is the training's.
        """
        if split == "calibration" and self.sets_aside:
            return "validation"
        own = self.uri(split).partition(":")[0] == "fashion-mnist" or split == "validation"
        return split if own else "train"

    @cached_property
    def sets_aside(self) -> bool:
        """Whether a part of the validation images is set aside for calibration: "auto" does so.

        Only where something needs them, and the data has no training split of its own.
        """
        wanted = self.config.data.calibration == AUTO and bool(self.config.calibrated)
        return wanted and not _has_training(self.config.data.validation)

    def files(self, split: Split) -> Folders | Files:
        """Which files a split consists of; none is opened.

        Raises:
            DataError: They are not there, or arranged otherwise.
        """
        with about(f"data.{split}"):
            return list_split(
                self.uri(split),
                self._split_of_dataset(split),
                _package_folder("care") / "assets",
                labels_needed=split == "validation" or self.sets_aside,
            )

    def _identity(self, split: Split) -> Identity:
        """Identity of a split, looked up once a run."""
        if split not in self._identities:
            self._identities[split] = self._identify(split, self.files(split))
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
            return self.hashes.hash(self.labels_file(stated))
        if self.described.labels is not None:
            return list(self.described.labels)
        files = self.files("validation")
        if isinstance(files, Folders):
            return list(files.classes)
        stating = Files(files.root, files.labels, files.labels)
        digest = self._identify("validation", stating).digest
        # Without names the head says how many there are.
        numbered = parse(self.uri("validation"))[0] == "wds"
        return [digest, self.checkpoint_hash] if numbered else digest

    @staticmethod
    def labels_file(stated: str) -> Path:
        """The file that `data.labels` names.

        Raises:
            DataError: It is missing.
        """
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
            return self.described.preprocess or Preprocess.from_model(self._loaded)

    @cached_property
    def validation(self) -> Dataset:
        """The images that judge: what training held out, without what is set aside."""
        from care.data import Subset

        if self.judges_held_out or self.sets_aside:
            return Subset(self._whole, self._parts[0])
        return self._whole

    @cached_property
    def calibration(self) -> Dataset:
        """The images for calibration: of the training split, or set aside of the validation's."""
        from care.data import Subset, open_images

        if self.sets_aside:
            return Subset(self._whole, self._parts[1])
        with about("data.calibration"):
            split = self._split_of_dataset("calibration")
            return self._read_as_stated(open_images(self.uri("calibration"), split))

    @cached_property
    def _whole(self) -> Dataset:
        """The validation split, whole."""
        from care.data import open_dataset

        with about("data.validation"):
            return self._read_as_stated(open_dataset(self.uri("validation"), "validation"))

    def _read_as_stated(self, dataset: Dataset) -> Dataset:
        """The dataset, whose orientation tags count only where the configuration says so."""
        stated = self.config.preprocess or self.described.preprocess
        if stated is not None:
            dataset.exif = stated.exif
        return dataset

    @property
    def judges_held_out(self) -> bool:
        """Whether the images are those of training: those that it held out judge, alone."""
        stated = self.described.hold_out
        return stated is not None and self._whole.identity() == stated.identity

    @cached_property
    def _parts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Which validation images judge, and which may calibrate.

        What training held out judges, and what it learned from calibrates. Else a part is set
        aside: seeded, at most a fifth.

        Raises:
            DataError: There are too few of them.
        """
        from care.data import hold_out

        stated = self.described.hold_out
        if stated is not None and self.judges_held_out:
            learned, judging = hold_out(self._whole, stated.share, stated.seed)
            return judging.indices, learned.indices
        settings, total = self.config.calibration, len(self._whole)
        count = min(settings.images, int(total * MOST_SET_ASIDE))
        if count < FEWEST:
            raise DataError(
                f"data.calibration: auto would set aside {count} of {total} validation images, and "
                f"calibration needs at least {FEWEST}: name training images"
            )
        order = np.random.default_rng(settings.seed).permutation(total).astype(np.int64)
        return np.sort(order[count:]), np.sort(order[:count])

    @cached_property
    def classes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Identifiers and readable names of the classes, in the order of the logits."""
        stated = self.config.data.labels
        if stated is None and self.described.labels is not None:
            return self.described.labels, self.described.labels
        if stated is None:
            classes = self._classes_of_images()
            require_distinct(classes, "data.validation")
            return classes, classes
        if stated == IMAGENET:
            return imagenet_labels()
        with about("data.labels"):
            return read_labels(self.labels_file(stated))

    def _classes_of_images(self) -> tuple[str, ...]:
        """The validation set's classes; where these are but numbers, as many as the head has."""
        found = self._whole.classes
        if self._whole.names_known:
            return found
        with about("model.checkpoint"):
            own = self._head_classes(len(found)) or 0
        return tuple(map(str, range(max(len(found), own))))

    def _head_classes(self, count: int) -> int | None:
        """How many classes the checkpoint's head has, if it tells.

        Args:
            count: Of a network that is made to compare names with.
        """
        from care import checkpoint
        from care.factory import create_model
        from care.finetune import head_classes

        path, stated = self.checkpoint(), self.config.model
        if self.hub is not None:
            return self.hub.classes
        if path is None or stated.name is None:
            return None
        state = checkpoint.read(path, ema=stated.ema, sha256=self.checkpoint_hash)
        name = stated.name.removeprefix(TIMM_PREFIX)
        model = create_model(name, **{**stated.kwargs, "num_classes": count})
        return head_classes(state, model)

    def class_indices(self, dataset: Dataset) -> npt.NDArray[np.int64]:
        """For every class of the dataset, its index among the logits.

        Raises:
            DataError: A class of the dataset is unknown to the labels.
        """
        if not dataset.names_known:
            return self._numbered(dataset)
        order = {name: i for i, name in enumerate(self.classes[0])}
        unknown = [name for name in dataset.classes if name not in order]
        if unknown:
            by = "the checkpoint" if self.labels_are_stated else "data.labels"
            raise DataError(
                f"the dataset has the class {shown(unknown[0])!r}, which {by} does not name "
                f"({len(unknown)} such classes): give the labels of the network, in its order, as "
                "data.labels"
            )
        return np.array([order[name] for name in dataset.classes], dtype=np.int64)

    @property
    def labels_are_stated(self) -> bool:
        """Whether the classes are those that the checkpoint names."""
        return self.config.data.labels is None and self.described.labels is not None

    def _numbered(self, dataset: Dataset) -> npt.NDArray[np.int64]:
        """Classes that the dataset knows by number only: the same numbers among the logits."""
        found, known = len(dataset.classes), len(self.classes[0])
        if found > known:
            raise DataError(
                f"the dataset has the class {found - 1}, and the network {known} classes, from 0: "
                "give images of its own classes"
            )
        return np.arange(found, dtype=np.int64)

    def known_labels(
        self, dataset: Dataset, indices: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Indices among the logits of images' classes, -1 for those that the network has not."""
        order = {name: i for i, name in enumerate(self.classes[0])}
        names = dataset.classes
        found = [order.get(names[label]) if label >= 0 else None for label in dataset.labels]
        if not dataset.names_known:
            found = [int(label) for label in dataset.labels]
        return np.array([-1 if found[i] is None else found[i] for i in indices], dtype=np.int64)

    @cached_property
    def module(self) -> nn.Module:
        """The network in evaluation mode, in float32, with its weights.

        Random weights are settled: see `care.settle`.
        """
        module = self._loaded
        if self.config.model.checkpoint == RANDOM:
            from care.settle import settle

            self._check_input(module)
            settle(module, self._input_shape)
        return module

    @property
    def _input_shape(self) -> tuple[int, int, int]:
        preprocess = self.preprocess
        return (preprocess.depth, preprocess.size, preprocess.size)

    def _check_input(self, module: nn.Module) -> None:
        from care.factory import check_input

        with about("model"):
            check_input(module, self._input_shape, len(self.classes[1]))

    @cached_property
    def _loaded(self) -> nn.Module:
        """The network with the weights that its checkpoint, or its constructor, gives it."""
        import torch

        from care.factory import create_hub, create_model

        stated = self.config.model
        if stated.module is not None:
            return self._of_module(stated.module)
        count = len(self.classes[0])
        name = str(stated.name).removeprefix(TIMM_PREFIX)
        torch.manual_seed(RANDOM_SEED)
        named = stated.kwargs.get("num_classes", count)
        if named != count:
            raise ModelError(
                f"model.kwargs: num_classes is {named!r}, and data.labels names {count} classes: "
                "leave it out"
            )
        given = {**stated.kwargs, "num_classes": count}
        if self.hub is not None:
            with about("model.hub"):
                module = create_hub(self.hub, **given).eval()
        else:
            with about("model"):
                module = create_model(name, **given).eval()
        path = self.checkpoint()
        if path is not None:
            with about("model.checkpoint" if self.hub is None else "model.hub"):
                self._load(path, module, count)
        return module

    def _load(self, path: Path, module: nn.Module, count: int) -> None:
        """Give a named network its checkpoint's weights.

        Raises:
            CheckpointError: They do not fit; of another number of classes it says what to do.
        """
        from care import checkpoint

        try:
            checkpoint.load(path, module, ema=self.config.model.ema, sha256=self.checkpoint_hash)
        except CheckpointError as error:
            own = self._head_classes(count)
            if own in (None, count):
                raise
            raise CheckpointError(
                f"{path} has a head of {own} classes, and {self._naming} {count}: give the "
                f"network's classes in its order as data.labels ('{IMAGENET}' for ImageNet's), or "
                "fine-tune it for these with python -m care.train --init"
            ) from error

    @property
    def _naming(self) -> str:
        """What says how many classes there are, for messages."""
        if self.config.data.labels is not None:
            return "data.labels"
        return "its own list of labels" if self.labels_are_stated else "data.validation"

    def _of_module(self, stated: str) -> nn.Module:
        """The network that the user's callable makes, with a checkpoint's weights if one is named.

        Raises:
            ModelError: It makes none, or one that the checkpoint does not fit.
        """
        import torch

        from care import checkpoint, modules

        torch.manual_seed(RANDOM_SEED)
        with about("model.module"):
            module = modules.create(stated, **self.config.model.kwargs).eval()
        path = self.checkpoint()
        if path is not None:
            with about("model.checkpoint"):
                checkpoint.load(
                    path, module, ema=self.config.model.ema, sha256=self.checkpoint_hash
                )
        return module.float()

    @property
    def graph(self) -> onnx.ModelProto | None:
        """The graph that was given in place of a network; None where one is exported."""
        return None

    def cost(self) -> Cost:
        """What the network costs for one image."""
        from care.profile import count

        return count(self.module, self.network.input_shape)

    @property
    def referee(self) -> str:
        """What computes the answers that artifacts are held against, for people."""
        import torch

        return f"PyTorch {torch.__version__}, float32, CPU"

    def reference(self) -> Runner:
        """Gives the answers that artifacts are held against: the network in float32."""
        from pipeline.targets.pytorch import TorchRunner

        return TorchRunner(self.module, threads_for(math.prod(self._input_shape)))

    def baseline(self, threads: int | None) -> Runner:
        """What artifacts are timed against.

        Raises:
            InputError: More threads are asked for than this process may use.
        """
        from pipeline.targets.pytorch import TorchRunner

        return TorchRunner(self.module, threads)

    def range_of(self, images: Images) -> ModuleRange | None:
        """The largest value in the network for some images; None where nothing can look."""
        from pipeline.targets.pytorch import range_of

        return range_of(self.module, images)

    def inference_form(self) -> InferenceForm:
        """A fresh copy of the network in the form that is deployed, and what was done to it."""
        from care.inference import inference_form

        with about("model"):
            return inference_form(self.module, self.network.input_shape)

    def fused(self) -> nn.Module:
        """A fresh copy of the network in the form that is deployed."""
        return self.inference_form().module

    def _check_network(self) -> None:
        """Refuse one that does not take the images, or has other classes."""
        self._check_input(self.module)

    @cached_property
    def network(self) -> Network:
        """Labels, shape and preprocessing, which every artifact carries."""
        self._check_network()
        description = {"model": self.config.model.title}
        if self.config.model.checkpoint == RANDOM:
            description["weights"] = RANDOM_WEIGHTS
        published = self.published if self.hub is None else self.hub.weights
        if published is not None:
            description |= _licence_of(published)
        return Network(
            name=self.config.name,
            labels=self.classes[1],
            input_shape=self._input_shape,
            preprocess=self.preprocess.to_dict(),
            description=description,
        )

    def samples(
        self, dataset: Dataset, indices: npt.NDArray[np.int64]
    ) -> Iterator[npt.NDArray[np.uint8]]:
        """Resized and cropped images, (height, width, channels) each, one by one."""
        for index in indices.tolist():
            with about("data"):
                pixels = self.preprocess.pixels(dataset.image(index))
            yield pixels

    def pictures(self, dataset: Dataset, indices: Iterable[int]) -> Pictures:
        """Some images of a dataset as a batch."""
        from pipeline.core.preprocess import Pictures

        pixels = [self.preprocess.pixels(dataset.image(index)) for index in indices]
        return Pictures(np.stack(pixels), self.preprocess)

    def first_pictures(self, count: int) -> Pictures:
        """The first validation images, at most so many."""
        dataset = self.validation
        return self.pictures(dataset, range(min(count, len(dataset))))


def _licence_of(weights: Pretrained) -> dict[str, str]:
    """What artifacts say of published weights: their name and licence, and what that means."""
    from care.pretrained import remark

    said = {
        "weights": weights.name,
        "license": weights.licence,
        LICENCE_REMARK: remark(weights.licence),
    }
    return {name: text for name, text in said.items() if text}


def _has_training(uri: str) -> bool:
    """Whether a dataset has a training split, apart from that for validation."""
    assets = _package_folder("care") / "assets"
    kind, _ = parse(uri)
    if kind == "fashion-mnist":
        return True
    if kind not in ("folder", "imagenet"):
        return False
    try:
        training, validation = (list_split(uri, split, assets) for split in ("train", "validation"))
    except DataError:
        return False
    return (training.root, _names(training)) != (validation.root, _names(validation))


def _names(files: Folders | Files) -> tuple[str, ...]:
    return files.names if isinstance(files, Files) else ()


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the package {package} is not installed: install this project")
    return Path(spec.submodule_search_locations[0])
