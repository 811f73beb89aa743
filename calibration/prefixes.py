"""Evaluating graphs that begin alike: what their beginnings have in common is computed once.

A search quantizes one block after the other, so that most of what it evaluates differs from what
was evaluated before in a late block only. Values of a tensor through which everything passes, at
the end of a block, are kept with a hash of all that computed them; the next graph that begins by
the very same operations on the very same constants goes on from there. The operations that are
left are given the same values in the same order in memory, so that logits are the same to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from pipeline.core.memory import freed_memory_kept
from pipeline.core.network import Images, Logits
from pipeline.core.threads import threads_that_help
from pipeline.emulate.onnx.executor import OnnxExecutor, check_images
from pipeline.emulate.onnx.graph import Constant
from pipeline.emulate.onnx.plan import ROUNDED, Step
from pipeline.emulate.rounding import round_to

MOST_BYTES = 2**28
"""Memory that kept values may take."""

_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast"})
"""Operations that belong to whoever reads their result, whatever their names say."""


@dataclass(frozen=True)
class Place:
    """A tensor through which everything passes that depends on the images.

    Attributes:
        step: Number of the step after which it is the only one that is still read.
        tensor: Its name.
        key: Hash of all that computed it.
        ends_block: The next operation is of another block of the network.
    """

    step: int
    tensor: str
    key: str
    ends_block: bool


class SharedBeginnings:
    """Logits by the strict executor, of one graph after the other over the same images.

    Args:
        most_bytes: Memory that kept values may take.

    Attributes:
        steps_run: Steps that were executed, of all graphs and batches.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most = most_bytes
        self._images: Images | None = None
        # The one that was used last comes last.
        self._kept: dict[str, list[Tensor]] = {}
        self.steps_run = 0

    def __call__(self, model: Path | onnx.ModelProto, images: Images) -> Logits:
        """Logits, (images, classes), with every result rounded to its type.

        Args:
            model: The graph.
            images: Preprocessed images; values that are kept are of the array that came before.
        """
        if images is not self._images:
            self._images = images
            self._kept.clear()
        with freed_memory_kept(), threads_that_help(images[0].size):
            executor = _GoingOn(model, self._kept, self._most // len(images))
            logits = executor.run_all(images)
        self.steps_run += executor.steps_run
        self._keep(executor)
        return logits

    def _keep(self, executor: _GoingOn) -> None:
        """Keep what was seen, and give up what was not used for the longest time."""
        self._kept |= executor.seen
        sizes = {key: sum(value.nbytes for value in kept) for key, kept in self._kept.items()}
        held = sum(sizes.values())
        for key, size in sizes.items():
            if held <= self._most:
                break
            del self._kept[key]
            held -= size


class _GoingOn(OnnxExecutor):
    """Runs a graph from the last place on of which the values are known.

    Args:
        model: The graph.
        kept: Values of every batch, by key of a place; what is used is moved to the end.
        room: Bytes that values of one image may take at all places that are kept of this graph.

    Attributes:
        begun: Key of the place; "" for the beginning.
        seen: Values of every batch at places after it, by key.
        steps_run: Steps that were executed.
    """

    def __init__(
        self, model: Path | onnx.ModelProto, kept: dict[str, list[Tensor]], room: int
    ) -> None:
        super().__init__(model)
        self._batch, self._room = 0, room
        found = list(places(self))
        known = [place for place in found if place.key in kept]
        self._from = known[-1] if known else None
        self.begun, self.steps_run = "", 0
        first = 0
        if self._from is not None:
            self.begun, first = self._from.key, self._from.step + 1
            self._values = kept[self.begun] = kept.pop(self.begun)
        self._left = self.steps()[first:]
        later = [place for place in found if place.ends_block and place.step >= first]
        self._places = {place.step - first: place for place in later}
        self.seen: dict[str, list[Tensor]] = {place.key: [] for place in later}

    def run(self, images: np.ndarray) -> np.ndarray:
        """See `OnnxExecutor.run`; batches come in the order in which they came before."""
        check_images(images, self.input)
        values = self.held()
        with torch.inference_mode():
            if self._from is None:
                values[self.input.name] = round_to(
                    torch.from_numpy(images.copy()), self.input.dtype
                )
            else:
                name = self._from.tensor
                values[name] = self._unpacked(name, self._values[self._batch])
            for number, step in enumerate(self._left):
                self._execute(step, values)
                for name in step.dead:
                    values.pop(name, None)
                if number in self._places:
                    place = self._places[number]
                    self.seen[place.key].append(self._packed(place.tensor, values[place.tensor]))
        if self._batch == 0:
            self._forget_what_is_too_large(len(images))
        self._batch += 1
        self.steps_run += len(self._left)
        return values[self.outputs[0].name].numpy().astype(np.float32, copy=False)

    def _forget_what_is_too_large(self, images: int) -> None:
        """Keep the first places alone, as many as there is room for."""
        taken = 0.0
        for number, place in list(self._places.items()):
            taken += self.seen[place.key][0].nbytes / images
            if taken > self._room:
                del self.seen[place.key], self._places[number]

    def _packed(self, name: str, value: Tensor) -> Tensor:
        """Values in the type that they are rounded to, in the same order in memory."""
        dtype = self.dtype(name)
        return value.to(dtype) if dtype in ROUNDED else value

    def _unpacked(self, name: str, value: Tensor) -> Tensor:
        return value.to(torch.float32) if self.dtype(name) in ROUNDED else value


def places(executor: OnnxExecutor) -> Iterator[Place]:
    """The places of a graph, in the order in which it runs, without that of its input.

    Args:
        executor: Of the graph.
    """
    steps, constants = executor.steps(), executor.held()
    content = {name: _hash_of(value) for name, value in constants.items()}
    chain = hashlib.sha256(repr((executor.input.name, executor.input.dtype)).encode())
    alive = {executor.input.name}
    for number, step in enumerate(steps):
        chain.update(_described(step, content))
        alive |= {name for name in step.node.outputs if name}
        alive -= set(step.dead)
        if len(alive) == 1 and number + 1 < len(steps):
            (tensor,) = alive
            ends = _ends_block(step, steps[number + 1 :])
            yield Place(number, tensor, chain.copy().hexdigest(), ends)


def _ends_block(step: Step, later: list[Step]) -> bool:
    """Whether a step is the last of its block: what computes next is of another one."""
    computing = (other for other in later if other.node.op_type not in _CONVERSIONS)
    following = next(computing, None)
    if following is None or step.node.op_type in _CONVERSIONS:
        return False
    return following.node.block != step.node.block


def _described(step: Step, content: dict[str, str]) -> bytes:
    """All that decides what a step makes of the tensors that depend on the images."""
    node = step.node
    attributes = [(name, _plain(value)) for name, value in sorted(node.attributes.items())]
    constants = [content.get(name, "") for name in node.inputs]
    parts = (node.op_type, node.inputs, node.outputs, attributes, constants, step.dtypes)
    return repr(parts).encode()


def _plain(value: object) -> object:
    if isinstance(value, Constant):
        return (_hash_of(value.value), value.dtype)
    return value


def _hash_of(value: Tensor) -> str:
    """Hash of a constant: its type, shape, order in memory, and values."""
    about = repr((value.dtype, tuple(value.shape), value.stride())).encode()
    plain = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(about + plain).hexdigest()
