"""Statistics of tensors, from graphs and from callables."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, helper

from calibration.observe import (
    GraphTensors,
    Statistics,
    check,
    fixed_batch,
    merge,
    observe,
    observe_callable,
    open_session,
)
from calibration.ranges import ACTIVATIONS_INT8, ACTIVATIONS_UINT8, Method
from calibration.table import make_table
from pipeline.core.errors import BuildError, DataError

Batch = npt.NDArray[np.float32]
NAMES = ["image", "c1", "c2", "act", "pool", "flat", "norm", "mm", "hidden", "relu", "logits"]


def test_all_tensors_in_the_order_of_the_graph(small_model: ModelProto, pixels: Batch) -> None:
    statistics = observe(small_model, pixels)
    assert list(statistics) == NAMES
    assert statistics["image"].low == float(pixels.min())
    assert statistics["relu"].low == 0
    assert check(statistics) == ()


def test_extremes_are_those_of_a_plain_run(
    small_model: ModelProto, pixels: Batch, run_model: Callable[[ModelProto, Batch], Batch]
) -> None:
    logits = run_model(small_model, pixels)
    seen = observe(small_model, pixels, ["logits"], channels={"logits": 1})["logits"]
    np.testing.assert_allclose([seen.low, seen.high], [logits.min(), logits.max()], rtol=1e-5)
    assert seen.channel_low is not None
    assert seen.channel_high is not None
    np.testing.assert_allclose(seen.channel_low, logits.min(0), rtol=1e-5)
    np.testing.assert_allclose(seen.channel_high, logits.max(0), rtol=1e-5)


def test_groups_and_batches_do_not_change_the_result(
    small_model: ModelProto, pixels: Batch, tmp_path: Path
) -> None:
    onnx.save(small_model, tmp_path / "model.onnx")
    whole = observe(small_model, pixels, batch=10)
    # Less memory than a single tensor takes: every tensor in a run of its own, image by image.
    tight = observe(tmp_path / "model.onnx", pixels, memory=1)
    for name in NAMES:
        assert tight[name].low == pytest.approx(whole[name].low, rel=1e-5, abs=1e-6)
        assert tight[name].high == pytest.approx(whole[name].high, rel=1e-5)
        assert tight[name].histogram.count == pytest.approx(whole[name].histogram.count, abs=20)


CUTS = ([0, 3], [0, 6], [0, 1, 2, 9], [0, 3, 3, 7])


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("values", [7, 16384])
def test_parts_give_the_same_tables_to_the_bit(
    small_model: ModelProto, pixels: Batch, cuts: list[int], values: int
) -> None:
    """However many parts there are, in whichever order; of large tensors some values are taken."""

    def seen(between: tuple[int, int | None] = (0, None)) -> dict[str, Statistics]:
        channels = {"logits": 1}
        return observe(
            small_model, pixels, batch=3, channels=channels, values=values, between=between
        )

    whole = seen()
    spans = zip(cuts, [*cuts[1:], None], strict=True)
    parts = [seen(span) for span in spans if -(-span[0] // 3) != -(-(span[1] or 99) // 3)]
    assert len(parts) > 1
    for order in (parts, parts[::-1]):
        found = merge(order)
        assert list(found) == list(whole)
        for method in Method:
            for scheme in (ACTIVATIONS_INT8, ACTIVATIONS_UINT8):
                table = make_table(found, method, scheme, images=len(pixels))
                assert table == make_table(whole, method, scheme, images=len(pixels))
        for name, one in found.items():
            assert one.histogram.counts.tolist() == whole[name].histogram.counts.tolist()
            assert one.histogram.edges.tolist() == whole[name].histogram.edges.tolist()
        logits = (found["logits"], whole["logits"])
        assert len({str((each.channel_low, each.channel_high)) for each in logits}) == 1


def test_parts_tell_of_what_is_not_finite() -> None:
    """An image that holds such a value moves the values that are taken of no other one."""
    images = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    images[1, 3], images[4, 0] = np.nan, np.inf

    def seen(between: tuple[int, int | None]) -> dict[str, Statistics]:
        return observe_callable(lambda x: {"x": x}, images, batch=2, values=5, between=between)

    whole, found = seen((0, None))["x"], merge([seen((4, None)), seen((0, 4))])["x"]
    assert (found.nan, found.infinite) == (whole.nan, whole.infinite) == (1, 1)
    assert found.histogram.counts.tolist() == whole.histogram.counts.tolist()


def test_only_the_same_tensors_are_merged(small_model: ModelProto, pixels: Batch) -> None:
    one = observe(small_model, pixels, ["c1", "c2"])
    with pytest.raises(DataError, match="of the same tensors"):
        merge([one, {"c1": one["c1"]}])
    with pytest.raises(DataError, match="of the same tensors"):
        merge([])
    with pytest.raises(DataError, match=r"tensor c2 \(axis None\) says nothing of c1"):
        one["c1"].merge(one["c2"])
    with pytest.raises(DataError, match="no calibration images"):
        observe(small_model, pixels, between=(len(pixels), None))


def test_the_plan_stays_within_memory(small_model: ModelProto) -> None:
    tensors = GraphTensors(small_model)
    image = 4 * 3 * 8 * 8
    assert tensors.plan(["image", "c1"], 16, 100 * image) == (16, [("image", "c1")])
    assert tensors.plan(["image", "c1"], 16, 6 * image) == (3, [("image", "c1")])
    assert tensors.plan(["image", "c1", "relu"], 16, image) == (
        1,
        [("image",), ("c1",), ("relu",)],
    )


def test_tensors_of_unknown_size_are_observed_alone(
    make_model: Callable[..., ModelProto], pixels: Batch
) -> None:
    nodes = [
        helper.make_node("Greater", ["image", "zero"], ["is"]),
        helper.make_node("Where", ["is", "image", "image"], ["kept"]),
        helper.make_node("NonZero", ["image"], ["places"]),
        helper.make_node("Cast", ["places"], ["logits"], to=1),
    ]
    zero = {"zero": np.zeros(1, np.float32)}
    model = make_model(nodes, zero, ["batch", 3, 8, 8], [4, "places"])
    _, groups = GraphTensors(model).plan(["kept", "logits"], 4, 2**20)
    assert groups == [("kept",), ("logits",)]
    # Neither the booleans nor the whole numbers have a range.
    assert list(observe(model, pixels)) == ["image", "kept", "logits"]


def test_a_fixed_batch_is_kept(make_model: Callable[..., ModelProto], pixels: Batch) -> None:
    nodes = [helper.make_node("Relu", ["image"], ["logits"])]
    model = make_model(nodes, {}, [5, 3, 8, 8], [5, 3, 8, 8])
    assert observe(model, pixels)["logits"].low == 0
    assert fixed_batch(model) == 5
    # The last batch is filled up with what was seen already: the extremes stay.
    seen = observe(model, pixels[:7])["image"]
    assert (seen.low, seen.high) == (pixels[:7].min(), pixels[:7].max())


def test_constant_subgraphs_are_not_activations(
    make_model: Callable[..., ModelProto], pixels: Batch
) -> None:
    nodes = [
        helper.make_node("Exp", ["zero"], ["one"]),
        helper.make_node("Mul", ["image", "one"], ["logits"]),
    ]
    model = make_model(nodes, {"zero": np.zeros(1, np.float32)}, ["batch", 3, 8, 8])
    assert list(observe(model, pixels)) == ["image", "logits"]
    with pytest.raises(DataError, match="no tensor one"):
        observe(model, pixels, ["one"])


def test_nan_and_infinity_name_the_first_tensor(
    make_model: Callable[..., ModelProto], pixels: Batch
) -> None:
    nodes = [
        helper.make_node("Relu", ["image"], ["positive"]),
        helper.make_node("Sqrt", ["image"], ["root"]),
        helper.make_node("Div", ["root", "zero"], ["logits"]),
    ]
    model = make_model(nodes, {"zero": np.zeros(1, np.float32)}, ["batch", 3, 8, 8])
    statistics = observe(model, pixels, channels={"root": 1})
    root = statistics["root"]
    assert root.nan == int((pixels < 0).sum())
    assert root.infinite == 0
    assert root.low >= 0
    assert root.channel_low is not None
    assert np.isfinite(root.channel_low).all()
    assert statistics["logits"].infinite == int((pixels > 0).sum())
    with pytest.raises(DataError, match=r"tensor root has \d+ NaN and 0 infinite.*1 more"):
        check(statistics)
    assert check(statistics, exempt={"root", "logits"}) == ()


def test_constants_are_flagged() -> None:
    statistics = observe_callable(lambda x: {"flat": np.full_like(x, 2.5), "x": x}, _ramp(4))
    assert statistics["flat"].constant
    assert check(statistics) == (
        "tensor flat is 2.5 on all calibration images: its range says nothing",
    )


def test_callables_run_in_batches() -> None:
    sizes = []

    def run(batch: Batch) -> dict[str, Batch]:
        sizes.append(len(batch))
        return {"x": batch}

    seen = observe_callable(run, _ramp(7), batch=3)["x"]
    assert sizes == [3, 3, 1]
    assert (seen.low, seen.high) == (0, 27)


def _ramp(count: int) -> Batch:
    return np.arange(count * 4, dtype=np.float32).reshape(count, 1, 2, 2)


def test_large_tensors_are_thinned_but_extremes_are_exact() -> None:
    rng = np.random.default_rng(0)
    tensor = rng.standard_normal((4, 100_000)).astype(np.float32)
    tensor[2, 77_777] = 50
    seen = Statistics("x", values=1000)
    seen.add(tensor[:2])
    seen.add(tensor[2:])
    assert seen.high == 50
    assert 3000 < seen.histogram.count < 4010
    at_once = Statistics("x", values=1000)
    at_once.add(tensor)
    assert abs(at_once.histogram.count - seen.histogram.count) == 2  # the extremes of each batch


def test_values_that_are_all_non_finite() -> None:
    seen = Statistics("x")
    seen.add(np.full((2, 3), np.nan, dtype=np.float32))
    assert seen.nan == 6
    assert not seen.finite
    with pytest.raises(DataError, match="6 NaN"):
        check({"x": seen})


def test_what_cannot_be_observed(small_model: ModelProto, pixels: Batch) -> None:
    with pytest.raises(DataError, match="no tensor nothing"):
        observe(small_model, pixels, ["nothing"])
    with pytest.raises(DataError, match="no observed tensor c2"):
        observe(small_model, pixels, ["c1"], channels={"c2": 1})
    with pytest.raises(DataError, match="axis 2 of the images is 4, the graph takes 8"):
        observe(small_model, pixels[:, :, :4])
    with pytest.raises(DataError, match="float64"):
        observe(small_model, pixels.astype(np.float64))
    with pytest.raises(DataError, match="no calibration images"):
        observe(small_model, pixels[:0])
    with pytest.raises(DataError, match="no axis 4"):
        observe(small_model, pixels, ["c1"], channels={"c1": 4})
    with pytest.raises(DataError, match="no range to observe"):
        observe_callable(lambda x: {"x": x > 0}, pixels)
    with pytest.raises(DataError, match="no tensor y"):
        observe_callable(lambda x: {"x": x}, pixels, channels={"y": 1})


def test_graphs_that_cannot_run(small_model: ModelProto, pixels: Batch) -> None:
    two = ModelProto()
    two.CopyFrom(small_model)
    two.graph.input.append(helper.make_tensor_value_info("other", 1, [1]))
    with pytest.raises(DataError, match="2 inputs"):
        observe(two, pixels)
    broken = ModelProto()
    broken.CopyFrom(small_model)
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(BuildError, match="ONNX Runtime refuses"):
        observe(broken, pixels)


@pytest.mark.parametrize(
    ("shape", "asked", "threads"),
    [
        (["batch", 3, 64, 64], None, 1),
        (["batch", 3, 224, 224], None, 5),
        (["batch", 3, "height", "width"], None, 5),
        ([], None, 5),
        (["batch", 3, 64, 64], 2, 2),
    ],
)
def test_a_second_thread_is_for_pictures_that_need_it(
    make_model: Callable[..., ModelProto],
    monkeypatch: pytest.MonkeyPatch,
    shape: list[str | int],
    asked: int | None,
    threads: int,
) -> None:
    opened: list[int] = []

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, model: bytes, options: onnxruntime.SessionOptions, **more: object):
            opened.append(options.intra_op_num_threads)
            super().__init__(model, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr("calibration.observe.machine.granted", lambda: 5)
    model = make_model([helper.make_node("Relu", ["image"], ["logits"])], {}, shape, shape)
    open_session(model, ["logits"], asked)
    assert opened == [threads]
