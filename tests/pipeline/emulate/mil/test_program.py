"""Reading packages: interface, images, classifiers, records; every way in which they are bad."""

from __future__ import annotations

import json
import logging
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import ArtifactError, DataError, InputError, UnsupportedOperatorError
from pipeline.emulate.mil.executor import MilExecutor
from pipeline.emulate.mil.program import read_program
from pipeline.emulate.mil.record import TensorRange, magnitudes, module_owners, torch_name

pytestmark = [
    # coremltools leaves its models' temporary folders to the garbage collector.
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
]

LABELS = ["shirt", "bag", "boot"]
SPECIFICATION = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
KERNEL = np.random.default_rng(0).standard_normal((3, 3, 4, 4)).astype(np.float32)

Rewrite = Callable[[Any], None]


@pytest.fixture(scope="module")
def ct() -> Any:
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    return pytest.importorskip("coremltools")


def _save(
    ct: Any, path: Path, *, inputs: list[Any] | None, softmax: bool = True, **extra: Any
) -> Path:
    mb = ct.converters.mil.Builder

    @mb.program(input_specs=[mb.TensorSpec((1, 3, 4, 4))], opset_version=ct.target.iOS16)  # type: ignore[untyped-decorator]
    def program(image: Any) -> Any:
        scores = mb.reshape(x=mb.conv(x=image, weight=KERNEL), shape=[1, 3], name="scores")
        return mb.softmax(x=scores, name="probabilities") if softmax else scores

    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS16,
        inputs=inputs,
        skip_model_load=True,
        **extra,
    )
    model.author, model.license, model.version = "the author", "Apache-2.0", "1.2"
    model.user_defined_metadata["preprocessing"] = "{}"
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def classifier(ct: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = ct.ImageType(
        name="image",
        shape=(1, 3, 4, 4),
        scale=1 / 255,
        bias=[-0.5, -0.25, -0.125],
        color_layout=ct.colorlayout.RGB,
    )
    path = tmp_path_factory.mktemp("classifier") / "model.mlpackage"
    return _save(ct, path, inputs=[image], classifier_config=ct.ClassifierConfig(LABELS))


@pytest.fixture(scope="module")
def plain(ct: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "model.mlpackage"
    return _save(ct, path, inputs=None)


@pytest.fixture
def damaged(plain: Path, tmp_path: Path) -> Path:
    """A copy of a sound package, to be damaged."""
    return Path(shutil.copytree(plain, tmp_path / "copy.mlpackage"))


def rewrite(package: Path, change: Rewrite) -> None:
    """Change a package's specification."""
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    path = package / SPECIFICATION
    model.ParseFromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())


def operations(model: Any) -> Any:
    function = model.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations


def pixels(batch: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(1).integers(0, 256, (batch, 4, 4, 3), np.uint8)


def scores_of(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the program computes from (batch, channels, height, width)."""
    kernel = KERNEL.astype(np.float16).astype(np.float64)
    return np.asarray(np.einsum("bchw,ochw->bo", images, kernel))


def softmax(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    exponentials = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(1, keepdims=True))


def test_classifier_of_images_applies_scale_bias_and_labels(classifier: Path) -> None:
    executor = MilExecutor(classifier, precision="float32")
    images = pixels(5)
    bias = np.array([-0.5, -0.25, -0.125])
    scores = scores_of((images / 255 + bias).transpose(0, 3, 1, 2))
    np.testing.assert_allclose(executor.logits(images), scores, rtol=2e-3, atol=2e-3)

    answers = executor.predict(images)
    assert executor.labels == tuple(LABELS)
    assert answers["classLabel"] == [LABELS[index] for index in scores.argmax(1)]
    probabilities = answers[executor.program.probabilities_output]
    assert probabilities.shape == (5, 3)
    np.testing.assert_allclose(probabilities, softmax(scores), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("layout", ["BGR", "GRAYSCALE"])
def test_colour_layouts(ct: Any, tmp_path: Path, layout: str) -> None:
    grey = layout == "GRAYSCALE"
    mb = ct.converters.mil.Builder
    shape = (1, 1 if grey else 3, 4, 4)

    @mb.program(input_specs=[mb.TensorSpec(shape)], opset_version=ct.target.iOS16)  # type: ignore[untyped-decorator]
    def program(image: Any) -> Any:
        return mb.mul(x=image, y=np.float32(2))

    layout_type = getattr(ct.colorlayout, layout)
    model = ct.convert(
        program,
        inputs=[ct.ImageType(name="image", shape=shape, color_layout=layout_type)],
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS16,
        skip_model_load=True,
    )
    model.save(str(tmp_path / "model.mlpackage"))
    images = pixels(2)[..., :1] if grey else pixels(2)
    (found,) = MilExecutor(tmp_path / "model.mlpackage").predict(images).values()
    expected = 2.0 * images[..., ::-1].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(found, expected)


def test_array_model_gives_scores_before_the_softmax(plain: Path) -> None:
    executor = MilExecutor(plain, precision="float32")
    images = np.random.default_rng(2).standard_normal((70, 3, 4, 4)).astype(np.float32)
    logits = executor.logits(images)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, scores_of(images), rtol=1e-4, atol=1e-5)
    (probabilities,) = executor.predict(images).values()
    np.testing.assert_allclose(probabilities, softmax(logits), rtol=1e-3, atol=1e-6)
    assert executor.operations() == {"cast": 2, "conv": 1, "reshape": 1, "softmax": 1}


def test_logits_of_a_model_without_softmax_are_its_output(ct: Any, tmp_path: Path) -> None:
    executor = MilExecutor(_save(ct, tmp_path / "m.mlpackage", inputs=None, softmax=False))
    images = np.ones((1, 3, 4, 4), np.float32)
    (output,) = executor.predict(images).values()
    np.testing.assert_array_equal(executor.logits(images), output)


def test_flexible_sizes(ct: Any, tmp_path: Path) -> None:
    side = ct.RangeDim(4, 16, default=8)
    mb = ct.converters.mil.Builder
    symbol = ct.converters.mil.mil.get_new_symbol
    shape = (symbol(), 3, symbol(), symbol())

    @mb.program(input_specs=[mb.TensorSpec(shape)], opset_version=ct.target.iOS17)  # type: ignore[untyped-decorator]
    def program(image: Any) -> Any:
        pooled = mb.reduce_mean(x=image, axes=[2, 3], keep_dims=False)
        return mb.softmax(x=mb.linear(x=pooled, weight=KERNEL[:, :, 0, 0].copy()), axis=-1)

    inputs = [ct.TensorType(name="image", shape=(ct.RangeDim(1, 4, default=1), 3, side, side))]
    model = ct.convert(
        program,
        inputs=inputs,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS17,
        skip_model_load=True,
    )
    model.save(str(tmp_path / "model.mlpackage"))
    executor = MilExecutor(tmp_path / "model.mlpackage", precision="float32")
    images = np.random.default_rng(3).standard_normal((5, 3, 6, 9)).astype(np.float32)
    kernel = KERNEL[:, :, 0, 0].astype(np.float16).astype(np.float32)
    expected = images.mean((2, 3)) @ kernel.T
    np.testing.assert_allclose(executor.logits(images), expected, rtol=1e-4, atol=1e-5)


def test_metadata_and_interface(classifier: Path) -> None:
    program = read_program(classifier)
    assert program.specification == 7
    assert program.metadata["author"] == "the author"
    assert program.metadata["license"] == "Apache-2.0"
    assert program.metadata["version"] == "1.2"
    assert program.metadata["preprocessing"] == "{}"
    (image,) = program.inputs
    assert (image.name, image.kind, image.shape, image.colour) == (
        "image",
        "image",
        (3, 4, 4),
        "RGB",
    )


def test_trace_returns_named_tensors_in_order(plain: Path) -> None:
    executor = MilExecutor(plain)
    images = np.ones((2, 3, 4, 4), np.float32)
    trace = executor.trace(images)
    assert next(iter(trace)).startswith("image")
    assert list(trace)[-1] == "probabilities"
    chosen = list(trace)[1]
    np.testing.assert_array_equal(executor.trace(images, [chosen])[chosen], trace[chosen])
    with pytest.raises(InputError, match="no tensor 'nonsense'"):
        executor.trace(images, ["nonsense"])


def test_ranges_count_overflow_and_headroom(plain: Path) -> None:
    executor = MilExecutor(plain, record=True)
    images = np.zeros((2, 3, 4, 4), np.float32)
    images[0] = 60000.0
    images[1, 0, 0, 0] = 1e-6
    executor.logits(images)
    by_operation = {entry.operation: entry for entry in executor.ranges()}
    cast = by_operation["cast"]
    assert cast.largest == 60000.0
    assert cast.elements == images.size
    assert cast.headroom == pytest.approx(65504 / 60000)
    assert cast.subnormals == 1
    assert cast.overflows == 0
    assert by_operation["conv"].overflows > 0
    assert by_operation["conv"].line > cast.line
    with pytest.raises(InputError, match="record=True"):
        MilExecutor(plain).ranges()


def test_range_of_special_values() -> None:
    import torch

    entry = TensorRange("x", "exp", 3)
    special = [1.0, -4.0, float("inf"), float("nan"), 65519.0, 65520.0, 2**-25, 0.0]
    entry.add(magnitudes(torch.tensor(special)))
    entry.add(magnitudes(torch.tensor([])))
    assert entry.elements == 8
    assert entry.largest == 65520.0
    assert entry.overflows == 3
    assert entry.vanished == 1
    assert entry.subnormals == 0
    assert TensorRange("x", "exp", 3).headroom == float("inf")


def test_names_lead_back_to_torch() -> None:
    import torch

    assert torch_name("conv2d_3_cast_fp16") == "conv2d_3"
    assert torch_name("p_head_weight_to_fp16_palettized") == "p_head_weight"
    assert torch_name("split_2_cast_fp16_1") == "split_2"
    assert torch_name("_to_fp16") == "_to_fp16"
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    exported = torch.export.export(network, (torch.zeros(1, 2),))
    assert module_owners(exported)["relu"] == "1"
    assert module_owners(exported)["linear"] == "0"


def test_settings_that_contradict(plain: Path) -> None:
    with pytest.raises(InputError, match="precision='half'"):
        MilExecutor(plain, precision="float32", accumulate="float16")
    with pytest.raises(InputError, match="precision='half'"):
        MilExecutor(plain, precision="float32", flush_subnormals=True)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 4, 4, 3), np.float32),
        np.zeros((1, 3, 4, 4), np.float64),
        np.zeros((1, 3, 5, 4), np.float32),
        np.zeros((3, 4, 4), np.float32),
        np.zeros((0, 3, 4, 4), np.float32),
    ],
    ids=["layout", "type", "size", "rank", "empty"],
)
def test_images_that_do_not_fit(plain: Path, images: np.ndarray[Any, Any]) -> None:
    with pytest.raises(DataError, match=r"input 'image' takes float32 \(n, 3, 4, 4\)"):
        MilExecutor(plain).predict(images)


def test_image_model_wants_bytes(classifier: Path) -> None:
    with pytest.raises(DataError, match=r"takes uint8 \(n, 4, 4, 3\), not float32"):
        MilExecutor(classifier).predict(np.zeros((1, 4, 4, 3), np.float32))


def test_missing_folder_and_foreign_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        read_program(tmp_path / "none.mlpackage")
    with pytest.raises(ArtifactError, match=r"no Manifest\.json"):
        read_program(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is no JSON"),
        ("{}", "does not name the package's model"),
        ('{"rootModelIdentifier": "a"}', "does not name the package's model"),
        ("[]", "does not name the package's model"),
    ],
)
def test_bad_manifest(damaged: Path, content: str, message: str) -> None:
    (damaged / "Manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        read_program(damaged)


def test_missing_specification(damaged: Path) -> None:
    (damaged / SPECIFICATION).unlink()
    with pytest.raises(ArtifactError, match=r"incomplete.*model\.mlmodel is missing"):
        read_program(damaged)


def test_cut_off_specification(damaged: Path) -> None:
    path = damaged / SPECIFICATION
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="not a Core ML specification, or is cut off"):
        read_program(damaged)


def test_missing_weights(damaged: Path) -> None:
    (damaged / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=r"weight\.bin is missing"):
        read_program(damaged)


@pytest.mark.parametrize("length", [0, 80, 160])
def test_cut_off_weights(damaged: Path, length: int) -> None:
    path = damaged / WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ArtifactError, match=r"weight\.bin is cut off"):
        read_program(damaged)


def test_weights_of_another_model(damaged: Path) -> None:
    path = damaged / WEIGHTS
    content = bytearray(path.read_bytes())
    content[64:68] = b"\0\0\0\0"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="no record at byte 64"):
        read_program(damaged)
    content[64:72] = struct.pack("<II", 0xDEADBEEF, 2)
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="is FLOAT16, its record is FLOAT32"):
        read_program(damaged)
    content[64:80] = struct.pack("<IIQ", 0xDEADBEEF, 1, 2)
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="is stored in 2 bytes"):
        read_program(damaged)


def test_weights_outside_the_package(damaged: Path) -> None:
    def point_away(model: Any) -> None:
        for operation in operations(model):
            value = operation.attributes["val"]
            if value.WhichOneof("value") == "blobFileValue":
                value.blobFileValue.fileName = "@model_path/../../../secret.bin"

    rewrite(damaged, point_away)
    with pytest.raises(ArtifactError, match="outside its package"):
        read_program(damaged)


def test_older_kind_of_model(damaged: Path) -> None:
    rewrite(damaged, lambda model: model.neuralNetwork.SetInParent())
    with pytest.raises(ArtifactError, match="kind 'neuralNetwork', not an ML Program"):
        read_program(damaged)


def test_program_without_its_function(damaged: Path) -> None:
    def rename(model: Any) -> None:
        model.mlProgram.functions["other"].CopyFrom(model.mlProgram.functions["main"])
        del model.mlProgram.functions["main"]

    rewrite(damaged, rename)
    with pytest.raises(ArtifactError, match=r"no function 'main', only \['other'\]"):
        read_program(damaged)


def test_unknown_operation_is_named_with_its_line(damaged: Path) -> None:
    lines = []

    def replace(model: Any) -> None:
        for line, operation in enumerate(operations(model), start=1):
            if operation.type == "softmax":
                operation.type = "hypermax"
                lines.append(line)

    rewrite(damaged, replace)
    expected = (
        rf"operation 'hypermax' \(line {lines[0]} of the program, result 'probabilities_\w+'\)"
    )
    with pytest.raises(UnsupportedOperatorError, match=expected):
        MilExecutor(damaged)


def test_unknown_and_missing_inputs_of_an_operation(damaged: Path) -> None:
    def add(model: Any) -> None:
        softmax_operation = operations(model)[-1]
        softmax_operation.inputs["temperature"].CopyFrom(softmax_operation.inputs["x"])

    rewrite(damaged, add)
    with pytest.raises(UnsupportedOperatorError, match="unknown input 'temperature'"):
        MilExecutor(damaged)

    def remove(model: Any) -> None:
        del operations(model)[-1].inputs["temperature"]
        del operations(model)[-1].inputs["x"]

    rewrite(damaged, remove)
    with pytest.raises(UnsupportedOperatorError, match="lacks its input 'x'"):
        MilExecutor(damaged)


def test_undefined_value(damaged: Path) -> None:
    def misname(model: Any) -> None:
        operations(model)[-1].inputs["x"].arguments[0].name = "nowhere"

    rewrite(damaged, misname)
    with pytest.raises(ArtifactError, match="uses 'nowhere' undefined"):
        MilExecutor(damaged)


def test_labels_of_the_wrong_length(classifier: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(classifier, tmp_path / "copy.mlpackage"))

    def shorten(model: Any) -> None:
        classes = operations(model)[-1].inputs["classes"].arguments[0].value
        del classes.immediateValue.list.values[-1]

    rewrite(package, shorten)
    with pytest.raises(ArtifactError, match="2 class labels for 3 probabilities"):
        MilExecutor(package)


def test_several_inputs(damaged: Path) -> None:
    def double(model: Any) -> None:
        second = model.description.input.add()
        second.CopyFrom(model.description.input[0])
        second.name = "second"

    rewrite(damaged, double)
    with pytest.raises(ArtifactError, match="models with one input"):
        MilExecutor(damaged)


def test_reading_does_not_import_coremltools(plain: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from pipeline.emulate.mil.program import read_program;"
        f"read_program(Path({str(plain)!r}));"
        "sys.exit('coremltools' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_manifest_may_name_any_path(damaged: Path) -> None:
    target = damaged / "Data/elsewhere"
    shutil.move(damaged / "Data/com.apple.CoreML", target)
    manifest = damaged / "Manifest.json"
    content = json.loads(manifest.read_text())
    for item in content["itemInfoEntries"].values():
        item["path"] = item["path"].replace("com.apple.CoreML", "elsewhere")
    manifest.write_text(json.dumps(content))
    assert len(read_program(damaged).constants) > 0
