"""An ONNX graph as a torch module that torch.export takes.

Converters take PyTorch, and somebody else's network may be there as an ONNX graph alone. The
operators of the executor are functions on tensors already. They look at shapes and at constants
while they run, so that tracing them would find data-dependent code. Here they run once, on an
image, and what they call of torch is written down: shapes and constants are plain numbers by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from pipeline.core.errors import UnsupportedOperatorError
from pipeline.emulate.onnx.executor import OnnxExecutor, apply
from pipeline.emulate.onnx.graph import Node
from pipeline.emulate.onnx.operators import OPERATORS, Call

_LOOKING = frozenset({"item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"})
"""Methods of a tensor through which values decide what is computed."""


_PRODUCTS = frozenset({"conv2d", "linear", "matmul"})
"""Functions of torch that are layers where they multiply by weights."""


@dataclass(frozen=True, slots=True)
class _Value:
    """A tensor that depends on the image, by its number."""

    number: int


@dataclass(frozen=True, slots=True)
class _Constant:
    """A tensor that does not, by the name under which the module holds it."""

    name: str


@dataclass(frozen=True, slots=True)
class _Line:
    """A call of torch.

    Attributes:
        function: What is called.
        args: With `_Value` and `_Constant` in the places of tensors.
        kwargs: The same.
        results: Numbers of the tensors that it returns, in order.
        node: Name of the graph's node that called it.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[int, ...]
    node: str

    @property
    def is_product(self) -> bool:
        """Whether it multiplies what depends on the image by weights."""
        if getattr(self.function, "__name__", "") not in _PRODUCTS or len(self.args) < 2:
            return False
        return isinstance(self.args[0], _Value) and isinstance(self.args[1], _Constant)


class Product(nn.Module):
    """A convolution or matrix product by weights: a layer, for whoever looks for layers.

    Args:
        function: Of torch: takes what enters the layer, its weights and settings.

    Attributes:
        is_product: Says what it is to those who do not know this class.
    """

    is_product = True

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(x, *args, **kwargs)


class GraphModule(nn.Module):
    """A classifier's float32 graph in plain torch, in evaluation mode.

    It computes one image after the other, as the shapes of one image are in it.

    Args:
        model: An ONNX file, or a model in memory, with one input.
        shape: (channels, height, width) of an image.

    Raises:
        ArtifactError: The graph cannot be read, or does not take such images.
        UnsupportedOperatorError: A node is not known to the executor, or values of the image decide
            what it does.
    """

    def __init__(self, model: Path | onnx.ModelProto, shape: tuple[int, int, int]) -> None:
        super().__init__()
        executor = OnnxExecutor(model)
        recorder = _Recorder(torch.zeros(1, *shape))
        self._result = recorder.run(executor)
        self._lines = recorder.lines
        for name, value in recorder.constants.items():
            self._hold(name, value)
        self._layers: dict[int, str] = {}
        for number, line in enumerate(self._lines):
            if line.is_product:
                self._layers[number] = self._add(line)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (batch, classes), of preprocessed images, (batch, channels, height, width)."""
        if images.shape[0] == 1:
            return self._one(images)
        return torch.cat([self._one(image) for image in images.split(1)])

    def _add(self, line: _Line) -> str:
        """Make a product a layer, called as its node; returns its name."""
        own = "".join(c if c.isalnum() else "_" for c in line.node) or "product"
        name = own if own.isascii() and not hasattr(self, own) else f"product_{len(self._layers)}"
        self.add_module(name, Product(line.function))
        return name

    def _hold(self, name: str, value: Tensor) -> None:
        if value.is_floating_point():
            self.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
        else:
            self.register_buffer(name, value.clone())

    def _one(self, image: Tensor) -> Tensor:
        values = {0: image}

        def read(stated: Any) -> Any:
            if isinstance(stated, _Value):
                return values[stated.number]
            return getattr(self, stated.name) if isinstance(stated, _Constant) else stated

        for number, line in enumerate(self._lines):
            args, kwargs = tree_map(read, (line.args, line.kwargs))
            function = getattr(self, self._layers.get(number, ""), line.function)
            returned = _tensors(function(*args, **kwargs))
            values.update(zip(line.results, returned, strict=True))
        return values[self._result]


class _Recorder(TorchFunctionMode):
    """Writes down every call of torch that reads what depends on an image.

    Args:
        image: (1, channels, height, width).
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.lines: list[_Line] = []
        self.constants: dict[str, Tensor] = {}
        self._kept: list[Tensor] = [image]  # a tensor is known by its place in memory
        self._numbers = {id(image): 0}
        self._names: dict[int, str] = {}
        self._node: Node

    def run(self, executor: OnnxExecutor) -> int:
        """Run a graph's nodes on the image; returns the number of the result."""
        values: dict[str, Tensor] = dict(executor.held())
        values[executor.input.name] = self._kept[0]
        with torch.no_grad():
            for step in executor.steps():
                inputs = [values[name] if name else None for name in step.node.inputs]
                self._node = step.node
                with self:
                    outputs = apply(step, inputs, PLAIN.get(step.node.op_type))
                values.update(zip(step.node.outputs, outputs, strict=False))
        return self._numbers[id(values[executor.outputs[0].name])]

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, and write it down if it reads what depends on the image."""
        kwargs = kwargs or {}
        if not any(id(each) in self._numbers for each in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in _LOOKING:
            raise UnsupportedOperatorError(
                f"node {self._node.name!r} ({self._node.op_type}): what it does depends on the "
                "values of its images"
            )
        stated_args, stated_kwargs = tree_map(self._stated, (args, kwargs))
        result = func(*args, **kwargs)
        numbers = tuple(self._number(each) for each in _tensors(result))
        if numbers:
            name = self._node.name
            self.lines.append(_Line(func, stated_args, stated_kwargs, numbers, name))
        return result

    def _stated(self, given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        if id(given) in self._numbers:
            return _Value(self._numbers[id(given)])
        if id(given) not in self._names:
            name = f"constant_{len(self.constants)}"
            self._names[id(given)], self.constants[name] = name, given
        return _Constant(self._names[id(given)])

    def _number(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return self._numbers.setdefault(id(tensor), len(self._kept) - 1)


def _tensors(result: Any) -> list[Tensor]:
    return [each for each in tree_leaves(result) if isinstance(each, Tensor)]


def _relu(call: Call, x: Tensor) -> Tensor:
    return F.relu(x)


def _gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.attribute("approximate", "none"))


def _div(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return a / b if call.dtype.is_floating_point else torch.div(a, b, rounding_mode="trunc")


def _resize(call: Call, x: Tensor, *stated: Tensor | None) -> Tensor:
    """As torch has it, where it has it; in the words of the executor else."""
    resize: Any = OPERATORS["Resize"].function
    size = resize(call, torch.zeros(x.shape), *stated).shape[2:]
    mode = _INTERPOLATIONS.get(tuple(call.attribute(*each) for each in _RESIZING))
    if mode is None or x.ndim != 4:
        resized: Tensor = resize(call, x, *stated)
        return resized
    name, corners = mode
    return F.interpolate(x, size=tuple(size), mode=name, align_corners=corners)


_RESIZING = (
    ("mode", "nearest"),
    ("coordinate_transformation_mode", "half_pixel"),
    ("antialias", 0),
)
_INTERPOLATIONS: dict[tuple[object, ...], tuple[str, bool | None]] = {
    ("nearest", "asymmetric", 0): ("nearest", None),
    ("linear", "half_pixel", 0): ("bilinear", False),
    ("linear", "pytorch_half_pixel", 0): ("bilinear", False),
    ("linear", "align_corners", 0): ("bilinear", True),
    ("cubic", "half_pixel", 0): ("bicubic", False),
    ("cubic", "pytorch_half_pixel", 0): ("bicubic", False),
    ("cubic", "align_corners", 0): ("bicubic", True),
}
"""What ONNX calls a way to resize, and torch."""

PLAIN: dict[str, Callable[..., Any]] = {
    "Relu": _relu,
    "Gelu": _gelu,
    "Div": _div,
    "Resize": _resize,
}
"""Operators as converters know them. The executor's functions also keep values right that are not
finite, and resize in float64, which would become operations of their own."""
