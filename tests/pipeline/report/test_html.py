from __future__ import annotations

import base64
import hashlib
import html as html_escapes
import itertools
import json
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.answers import Answers, Audit
from pipeline.core.figures import Number, RangeRow, Ratio, State, Throughput
from pipeline.core.runner import DeviceState, Numerics
from pipeline.report import html
from pipeline.report.gallery import Answer, Flipped
from pipeline.report.model import GateReport, Run
from pipeline.report.results import collect
from pipeline.steps.facts.bench import Memory
from pipeline.steps.facts.graphs import TriedCompression
from tests.pipeline.report.changed import (
    artifact_of,
    hasty,
    measured_of,
    with_artifact,
    with_build,
    with_measured,
)
from tests.pipeline.report.making import STEPS, Partial, configured, ended, fill

VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = "<script>alert('x')</script>\"&|"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Page(HTMLParser):
    """Checks that elements nest, and keeps what tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in VOID:
            return
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.elements if (value := attrs.get(name)) is not None]


def test_page_is_well_formed(run: Run) -> None:
    page = Page(html.page(run))
    assert ("html", {"lang": "en"}) in page.elements
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))


def test_links_within_the_page_lead_somewhere(run: Run) -> None:
    page = Page(html.page(run))
    links = [href for href in page.attributes("href") if href.startswith("#")]
    assert links
    assert {href[1:] for href in links} <= set(page.attributes("id"))


def test_headings_skip_no_level(run: Run) -> None:
    levels = Page(html.page(run)).headings
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_tables_have_captions_and_scopes(run: Run) -> None:
    page = Page(html.page(run))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("table") == tags.count("caption") > 5
    assert all("scope" in attrs for tag, attrs in page.elements if tag == "th")


def test_plots_have_a_title_and_a_description(run: Run) -> None:
    text = html.page(run)
    svgs = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert len(svgs) == 4  # accuracy by latency and by size, two batches
    assert all("<title" in svg and "<desc" in svg and 'role="img"' in svg for svg in svgs)


def only_our_script(page: str) -> bool:
    """Whether the one script of a page is the one that copies."""
    script = (html.TEMPLATES / "copy.js").read_text(encoding="utf-8")
    return page.count("<script") == 1 and f"<script>{script}</script>" in page


def test_page_loads_nothing(run: Run) -> None:
    text = html.page(run)
    assert "://" not in text
    assert only_our_script(text)
    assert "@import" not in text
    assert "url(" not in text
    loaded = [v for name in ("src", "href") for v in Page(text).attributes(name)]
    assert all(value.startswith(("#", "data:,")) for value in loaded)


def test_same_results_give_the_same_bytes(run: Run) -> None:
    assert html.page(run) == html.page(Run.from_dict(run.to_dict(), "results.json"))


def test_states_are_words_with_reasons(run: Run) -> None:
    text = Page(html.page(run)).text
    assert "Accuracy emulated by strict ONNX executor, since no NVIDIA GPU was found" in text
    assert "Latency not measured no NVIDIA GPU was found" in text
    assert "Accuracy measured ONNX Runtime 1, 2 threads" in text
    assert "not measured accuracy of coreml/fp16" in text


def test_failures_and_gates_come_first(run: Run) -> None:
    text = Page(html.page(run)).text
    failure = text.index("coreml/mixed failed: coremltools refuses the operation 'erf'")
    gate = text.index("gate does not hold: ort/int8: agreement is 0.945")
    assert failure < gate < text.index("Every artifact.")
    assert "1 failure and 2 gates that do not hold (exit code 3: a build failed)" in text


def good(run: Run) -> Run:
    """The same, as if nothing had failed."""
    artifacts = tuple(artifact for artifact in run.artifacts if not artifact.failure)
    steps = tuple(step for step in run.steps if "mixed" not in step.name)
    return replace(run, exit_code=0, gates=GateReport(7, 7), artifacts=artifacts, steps=steps)


def test_a_good_run_says_so(run: Run) -> None:
    text = html.page(good(run))
    assert 'class="verdict good"' in text
    assert "Everything was built, and no gate failed (exit code 0" in text


def test_a_run_without_gates_does_not_praise_them(run: Run) -> None:
    text = html.page(replace(good(run), gates=GateReport()))
    assert "Everything was built; no gate is set (exit code 0" in text
    assert "no gate failed" not in text


def test_a_run_of_one_stage_speaks_of_what_was_selected(partial: Partial) -> None:
    page = Page(html.page(partial("export", there=False)))
    assert "All that was selected is done, 1 of 20 steps" in page.text
    assert "Everything was built" not in page.text
    assert "was not built" not in page.text
    assert "ort: nothing to choose from: not selected in this run" in page.text
    assert "ort/fp32 not selected in this run" in page.text


def test_what_lies_there_from_earlier_says_so(partial: Partial) -> None:
    page = Page(html.page(partial("export", there=True)))
    assert "ort/fp32 from an earlier run 90.33 %" in page.text
    assert "Accuracy measured ONNX Runtime 1, 2 threads, from an earlier run" in page.text
    assert page.text.count("From an earlier run.") == 5  # all but coreml/mixed, which never was
    whole = Page(html.page(partial(*STEPS, there=True))).text
    assert "earlier run" not in whole


def test_every_figure_of_an_artifact_is_there(run: Run) -> None:
    text = Page(html.page(run)).text
    card = text[text.index("ort/int8 ONNX Runtime") : text.index("coreml/fp16 Core ML")]
    for words in (
        "top-1 drop",
        "top-5",
        "same top-1 class as PyTorch",
        "33 of 600",
        "cosine of the logits",
        "largest difference of logits",
        "latency, median",
        "cold start",
        "Batch 1, against PyTorch: 5.0 x faster",
        "Batch 1, against fp32: 1.7 x faster",
        "end to end",
        "too few samples",
        "Graph passes",
        "model.bin",
        "Made from checkpoint c0ffeec0ffee",
    ):
        assert words in card, words


def test_what_an_executor_saw_is_told(run: Run) -> None:
    text = Page(html.page(run)).text
    assert "trt/fp16: 3 values left the range of their type" in text
    assert "headroom 31" in text


def test_warnings_are_told(run: Run) -> None:
    text = Page(html.page(run)).text
    assert "Warning: an int64 was clamped" in text
    assert "calibration: the class 'bag' has 3 images less" in text


def test_repeated_warnings_are_told_once(run: Run) -> None:
    run = with_build(run, "trt/fp16", warnings=("scales become float32",) * 90 + ("other",))
    text = Page(html.page(run)).text
    assert text.count("scales become float32") == 1
    assert "scales become float32 (90 times)" in text


def test_busy_machine_is_told(run: Run) -> None:
    run = with_measured(run, "ort", load_before=3.5)
    assert (
        "ort: latency is not to be trusted: other processes kept 3.5 of 2 CPUs busy"
        in Page(html.page(run)).text
    )


def test_chain_goes_through_the_form_to_the_checkpoint(run: Run) -> None:
    text = Page(html.page(run)).text
    names = ("checkpoint", "export", "onnx", "precision/float16", "trt/fp16")
    assert re.search("Made from " + " → ".join(rf"{name} \w{{12}}" for name in names), text)


def test_broken_chain_is_told(run: Run) -> None:
    assert run.simplified is not None
    run = replace(run, simplified=replace(run.simplified, digest="f" * 64))
    text = Page(html.page(run)).text
    assert re.search("ort/fp32 is outdated: onnx was made from .{12}, now there is ffff", text)


def test_ranges_are_shown_with_histograms(run: Run) -> None:
    row = RangeRow("stem/conv", (-1.0, 3.0), (-1.0, 2.0), 0.25, False, (0, 5, 900, 20))
    run = with_build(run, "trt/int8", ranges=(row,))
    page = html.page(run)
    text = Page(page).text
    assert "Ranges of 1 tensors: trt/int8" in text
    assert "stem/conv -1 to 3 -1 to 2 25 %" in text
    assert "range -1 to 2" in page


def test_forms_are_told_with_what_speaks_against_them(run: Run) -> None:
    row = RangeRow("head", (-1.0, 1.0), (-1.0, 1.0), 0.0, False, (1, 2))
    form = run.forms["float16"]
    assert "Form float16 casts 2" in Page(html.page(run)).text
    facts = replace(form.facts, why_not="it loses 2 points", why_slow="it is slower", ranges=(row,))
    text = Page(html.page(replace(run, forms={"float16": replace(form, facts=facts)}))).text
    assert "Form float16 casts 2 why not it loses 2 points why slow it is slower" in text
    assert "Ranges of 1 tensors: form float16" in text


def test_the_graph_is_told(run: Run) -> None:
    text = Page(html.page(run)).text
    assert "opset 20 nodes as exported 240" in text
    assert "input shape 1 x 28 x 28" in text
    assert "nodes after simplification 198" in text
    assert "why not simplified" not in text
    assert run.simplified is not None
    facts = replace(run.simplified.facts, simplified=False, why_not="it crashed")
    run = replace(run, simplified=replace(run.simplified, facts=facts))
    assert "simplified no" in Page(html.page(run)).text
    assert "why not simplified it crashed" in Page(html.page(run)).text


def test_search_over_compressions_is_plotted(run: Run) -> None:
    curve = (
        TriedCompression(1_700_000, 0.0, {}),
        TriedCompression(900_000, 0.002, {"int8": 40}),
        TriedCompression(500_000, 0.03, {"palette4": 40}),
    )
    run = with_build(run, "coreml/fp16", curve=curve, chosen=curve[1])
    text = html.page(run)
    assert "What coreml/fp16 could have been" in text
    assert "0.20 % changed at 0.9 MB chosen; 3.00 % changed at 0.5 MB" in text


def test_hostile_text_stays_text(run: Run) -> None:
    export = run.export
    assert export is not None
    network = replace(export.facts.network, labels=(HOSTILE,) * 10)
    failures = tuple(replace(failure, precision=HOSTILE) for failure in run.gates.failures)
    run = with_build(run, "trt/fp16", more={HOSTILE: {HOSTILE: [{HOSTILE: HOSTILE}]}})
    run = with_artifact(run, "trt/fp16", numerics=Numerics(more={HOSTILE: HOSTILE}))
    measured = measured_of(run, "ort")
    latency = measured.batches[1]
    samples = {**latency.samples_ms, HOSTILE: latency.samples_ms["fp32"]}
    run = with_measured(
        run,
        "ort",
        devices={**measured.devices, "fp32": HOSTILE},
        batches={1: replace(latency, samples_ms=samples)},
        device_state={HOSTILE: DeviceState((HOSTILE,))},
    )
    run = replace(
        with_artifact(run, "trt/fp16", precision=HOSTILE),
        name=HOSTILE,
        config=HOSTILE,
        problems=(HOSTILE,),
        gates=replace(run.gates, failures=failures),
        machine=replace(run.machine, cpu=HOSTILE),
        export=replace(export, facts=replace(export.facts, network=network)),
    )
    text = html.page(run)
    assert only_our_script(text)
    assert html_escapes.escape(HOSTILE, quote=False)[:20] in text
    Page(text)


def test_published_rows_stand_only_beside_the_networks_they_are_of(run: Run, imagenet: Run) -> None:
    for other in (run, imagenet):
        assert "CARE, CVPR 2025" not in Page(html.page(other)).text
    assert imagenet.export is not None
    facts = imagenet.export.facts
    network = replace(facts.network, description={"model": "timm/care_s1"})
    export = replace(imagenet.export, facts=replace(facts, network=network))
    text = Page(html.page(replace(imagenet, export=export))).text
    assert "CARE, CVPR 2025" in text
    assert "CARE-S1 1.0 9.6 80.1" in text
    assert "CARE-S2 1.9" not in text
    assert "beside the published rows" not in Page(html.page(run)).text


def test_the_first_table_says_which_to_use_and_how_much_faster(run: Run) -> None:
    text = Page(html.page(run)).text
    assert "ort/fp32 Use this" in text
    assert "ort/int8 Use this" not in text
    assert "3.0 x faster 0.33 of its time" in text


def test_what_to_ship_has_a_sentence_a_path_and_a_way_to_run_it(run: Run) -> None:
    page = Page(html.page(run))
    sentence = "ort/fp32: top-1 90.33 % (measured), 0.00 points lost to PyTorch, 3.0 x faster"
    assert sentence in page.text
    # What to ship, its card, its file, and how to run it: of those to ship it is what runs here.
    assert page.text.count(f"{run.folder}/ort/fp32") == 5
    assert f"python -m pipeline predict photo.jpg --artifact {run.folder}/ort/fp32" in page.text
    assert f'pipeline.load("{run.folder}/ort/fp32").predict("photo.jpg")' in page.text
    assert only_our_script(html.page(run))


def hashed(text: str) -> str:
    """An inline element as a policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_policy_allows_the_page_s_own_script_and_style_alone(run: Run) -> None:
    text = html.page(run)
    policies = [
        attrs["content"]
        for _, attrs in Page(text).elements
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    (style,) = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    assert policies == [
        f"default-src 'none'; style-src {hashed(style)}; img-src data:; base-uri 'none'; "
        f"form-action 'none'; script-src {hashed(script)}"
    ]
    assert text.index("Content-Security-Policy") < text.index("<style>")
    # Neither is allowed by the policy: attributes have no hash.
    names = {name for _, attrs in Page(text).elements for name in attrs}
    assert not {name for name in names if name == "style" or name.startswith("on")}


def buttons(page: str) -> dict[str | None, str]:
    """What each button copies, by its label: the text of the element before it."""
    found = re.findall(
        r"<(code|pre)\b([^>]*)>((?:(?!</\1>).)*)</\1>(<button [^>]*>Copy</button>)", page, re.DOTALL
    )
    texts = [html_escapes.unescape(re.sub("</?code>", "", inner)) for _, _, inner, _ in found]
    labels = [Page(button).elements[0][1]["aria-label"] for *_, button in found]
    return dict(zip(labels, texts, strict=True))


def test_every_path_has_a_button_that_copies_it(run: Run) -> None:
    text = html.page(run)
    found = buttons(text)
    assert found["Copy the path of ort/fp32"] == f"{run.folder}/ort/fp32"
    assert found["Copy the path of model.bin of ort/fp32"] == f"{run.folder}/ort/fp32/model.bin"
    assert found["Copy how to run it"].startswith("python -m pipeline predict photo.jpg --artifact")
    shown = [attrs for tag, attrs in Page(text).elements if tag == "button"]
    # What is to be shipped has one there and one on its card.
    uses = Page(text).attributes("class").count("badge use-this")
    assert len(shown) == len(found) + uses
    # Without a script there is nothing that does nothing.
    assert all("hidden" in attrs and attrs["type"] == "button" for attrs in shown)
    style = (html.TEMPLATES / "report.css").read_text(encoding="utf-8")
    assert "nav, .copier { display: none; }" in style[style.index("@media print") :]


def named(run: Run, name: str) -> str:
    """The page of a run with a name in the folder, a precision and a file."""
    run = with_artifact(replace(run, folder=f"engines/{name}"), "trt/fp16", precision=name)
    built = artifact_of(run, f"trt/{name}").built
    assert built is not None
    files = {name: next(iter(built.files.values()))}
    return html.page(with_artifact(run, f"trt/{name}", built=replace(built, files=files)))


@pytest.mark.parametrize(
    "name", [HOSTILE, '" onclick="alert(1)', "'>\n<img src=x onerror=alert(1)>"]
)
def test_a_name_stays_inside_of_its_button(run: Run, name: str) -> None:
    text = named(run, name)
    assert only_our_script(text)
    found, expected = Page(text).elements, Page(named(run, "x" * len(name))).elements
    assert [(tag, list(attrs)) for tag, attrs in found] == [(t, list(a)) for t, a in expected]
    labels = [attrs["aria-label"] for tag, attrs in found if tag == "button"]
    assert f"Copy the path of {name} of trt/{name}" in labels
    assert buttons(text)["Copy the path of ort/fp32"] == f"engines/{name}/ort/fp32"


def test_parameters_and_multiply_accumulates_are_told(run: Run) -> None:
    assert run.export is not None
    facts = replace(run.export.facts, parameters=7_310_000, macs=701_000_000)
    text = Page(html.page(replace(run, export=replace(run.export, facts=facts)))).text
    assert "parameters 7.31 million" in text
    assert "0.701 GMACs" in text
    assert "images/s" in text


def test_latency_that_is_not_to_be_trusted_is_marked(run: Run) -> None:
    assert "not to be trusted" not in Page(html.page(run)).text
    text = Page(html.page(hasty(run))).text
    assert "measured not to be trusted only 6 calls were timed, and 30 are needed" in text
    table = text[text.index("Every artifact.") : text.index("What to ship")]
    assert "faster" not in table


def test_what_speaks_for_a_latency_is_shown(run: Run) -> None:
    judged = with_measured(
        run,
        "ort",
        distinct=256,
        answers={"fp32": Answers(32, 0, 1e-7)},
        repeated={"fp32": Audit(60, Ratio(1.01, (0.99, 1.03)))},
        memory={"fp32": Memory(Number(8e7, State.MEASURED, "bytes", by="ort"), 50_000_000)},
    )
    text = Page(html.page(judged)).text
    assert "distinct images 256" in text
    assert "32 answers of timed calls are those of the validation" in text
    assert "takes 1.010 (0.990 to 1.030) of the time of distinct ones: fine" in text
    assert "peak memory 80 MB in a process of its own, 50 MB of it before it was opened" in text


def test_images_with_another_answer_are_shown(run: Run) -> None:
    answer = Answer("data:image/png;base64,AAAA", "bag", "bag", HOSTILE)
    page = Page(html.page(run, [Flipped("ort/int8", 33, (answer,))]))
    assert "ort/int8 33 images; the first 1" in page.text
    assert f"bag PyTorch: bag ✓ ort/int8: {HOSTILE}" in page.text
    assert ("img", {"src": answer.source, "alt": "An image of bag"}) in page.elements


@pytest.mark.parametrize(("count", "words"), [(1, "1 image"), (2, "2 images; the first 1")])
def test_images_are_counted_in_plain_words(run: Run, count: int, words: str) -> None:
    answer = Answer("data:image/png;base64,AAAA", "bag", "bag", "shirt")
    source = html.page(run, [Flipped("ort/int8", count, (answer,))])
    assert f"<h3>ort/int8 <small>{words}</small></h3>" in source


def test_imagenet_is_plotted_beside_the_published_rows(imagenet: Run) -> None:
    text = html.page(imagenet)
    assert "ort beside the published rows (Intel i9)" in text
    assert "CARE-S0: 78.40 % at 4.3 ms (published)" in text


def test_run_that_failed_at_once(nothing: Run) -> None:
    page = Page(html.page(nothing))
    assert "export failed: care_tiny does not export to ONNX: no memory" in page.text
    assert "not measured accuracy of trt/fp16" in page.text
    assert "svg" not in [tag for tag, _ in page.elements]


@pytest.mark.parametrize("part", ["export", "simplified", "calibration", "reference"])
def test_missing_parts_are_left_out(run: Run, part: str) -> None:
    changes: dict[str, Any] = {part: None}
    Page(html.page(replace(run, **changes)))


def test_a_run_without_measurements(run: Run) -> None:
    assert "Latency distribution" in html.page(run)
    page = Page(html.page(replace(run, bench=dict.fromkeys(run.bench))))
    assert "Latency distribution" not in page.text
    assert "Measure ort, on a machine that runs it" in page.text


def test_numbers_that_are_not_finite(run: Run) -> None:
    run = with_build(run, "trt/fp16", more={"difference": float("nan")})
    numerics = Numerics(more={"largest_value": float("inf")})
    text = Page(html.page(with_artifact(run, "trt/fp16", numerics=numerics))).text
    assert "difference not a number" in text
    assert "largest value infinite" in text


def test_the_end_to_end_latency_is_that_of_its_batch(tmp_path: Path) -> None:
    config = configured(tmp_path)
    fill(config).benched("ort", {"fp32": 1.0, "pytorch": 3.0}, samples=100, batches=(8, 16))
    run = collect(config, tmp_path / "pipeline.yaml", ended(*STEPS))
    text = Page(html.page(run)).text
    assert "Every artifact. Latency is the median of one call at batch 8" in text
    assert re.search(r"fp32 end to end 8 \d+\.\d{3}", text)
    assert not re.search(r"end to end 1 \d", text)


def test_throughput_and_the_device_are_among_the_circumstances(run: Run) -> None:
    state = DeviceState(("power cap",), {"gpu_memory_bytes": 2_500_000})
    rows = (Throughput(8, 0.5, None, 16_000.0),)
    run = with_measured(run, "ort", device_state={"fp32": state}, throughput={"fp32": rows})
    text = Page(html.page(run)).text
    assert "throttled power cap" in text
    assert "gpu memory 2.50 MB" in text
    assert "16,000" in text or "1.6e+04" in text


def test_measurements_on_other_devices_are_tables_of_their_own(run: Run) -> None:
    part = run.bench["coreml"]
    assert part is not None
    rows = [{"precision": "fp16", "load_ms": 12, "device": "iPhone14,5, iOS 18.2"}]
    more = {"on_devices": rows, "outside_the_neural_engine": []}
    coreml = replace(part, facts=replace(part.facts, more=more))
    text = Page(html.page(replace(run, bench={**run.bench, "coreml": coreml}))).text
    assert "Measured on devices; medians precision load device fp16 12 ms iPhone14,5" in text
    assert "outside the neural engine" not in text.lower()


def test_preprocessing_is_in_pixels(run: Run) -> None:
    assert "side in pixels 28" in Page(html.page(run)).text


def test_commands_name_the_configuration(run: Run) -> None:
    text = Page(html.page(run)).text
    assert "python -m pipeline run 'configs/my run.yaml'" in text
    assert "Measure trt, on a machine that runs it" in text


def test_latency_that_came_from_elsewhere(run: Run) -> None:
    imported = Number(1.5, State.MEASURED, unit="ms", by="iPhone 15, iOS 18")
    text = Page(html.page(with_artifact(run, "coreml/fp16", latency=imported))).text
    assert "Latency measured iPhone 15, iOS 18" in text
    assert artifact_of(run, "coreml/fp16").latency.value is None


def chromium(tmp_path: Path, *arguments: str) -> str:
    """Run chromium with a profile of its own; what it printed."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return run.stdout


def framed(*pages: tuple[str, int]) -> str:
    """Pages in frames of some width, since windows have a least one; tells what sticks out."""
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:4000px" '
        f'srcdoc="{html_escapes.escape(page)}"></iframe>'
        for page, width in pages
    )
    return f"""<!DOCTYPE html><title>frame</title><body style="margin:0">
{frames}
<output></output><script>
const look = frame => {{
  const page = frame.contentDocument;
  page.querySelectorAll("details").forEach(d => {{ d.open = true; }});
  const inside = e => e.closest(".scroll") === null || e.classList.contains("scroll");
  const out = [...page.querySelectorAll("main *")].filter(inside)
    .filter(e => e.getBoundingClientRect().right > frame.contentWindow.innerWidth + 0.5);
  return {{
    width: frame.contentWindow.innerWidth, scroll: page.documentElement.scrollWidth,
    out: out.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
    beside: [...page.querySelectorAll("td .badge")]
      .filter(e => e.getBoundingClientRect().right > e.closest("td").getBoundingClientRect().right)
      .map(e => e.textContent),
    cut: [...page.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth)
      .map(e => e.innerText.slice(0, 80)),
    dark: frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches,
    page: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
  }};
}};
addEventListener("load", () => {{
  const told = [...document.querySelectorAll("iframe")].map(look);
  document.querySelector("output").textContent = JSON.stringify(told);
}});
</script>"""


def clicked(page: str, clipboards: Sequence[str]) -> str:
    """The page in a frame for each clipboard; tells what a click on its buttons does."""
    frame = f'<iframe srcdoc="{html_escapes.escape(page)}"></iframe>'
    made = ", ".join(f"copied => ({clipboard})" for clipboard in clipboards)
    return f"""<!DOCTYPE html><title>frame</title>
{frame * len(clipboards)}
<output></output><script>
const look = async (frame, clipboard) => {{
  const page = frame.contentDocument, view = frame.contentWindow, copied = [], told = [];
  Object.defineProperty(view.navigator, "clipboard", {{ value: clipboard(copied) }});
  page.querySelectorAll("details").forEach(d => {{ d.open = true; }});
  const buttons = [...page.querySelectorAll("button")];
  const shown = buttons.filter(b => !b.hidden).length;
  for (const button of buttons) {{
    button.click();
    await new Promise(done => setTimeout(done, 1));
    told.push([button.textContent, page.getElementById("copied").textContent,
               view.getSelection().toString()]);
  }}
  const now = buttons[0].textContent;
  await new Promise(done => setTimeout(done, 4000));
  return {{
    buttons: buttons.length, shown, copied, told, now, later: buttons[0].textContent,
    status: page.getElementById("copied").textContent, hostile: view.hostile === true,
  }};
}};
addEventListener("load", async () => {{
  const told = [], clipboards = [{made}];
  for (const [number, frame] of [...document.querySelectorAll("iframe")].entries())
    told.push(await look(frame, clipboards[number]));
  document.querySelector("output").textContent = JSON.stringify(told);
}});
</script>"""


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def told_by(folder: Path, text: str, *options: str) -> list[dict[str, Any]]:
    """What a page of frames tells of each of them, by one start of the browser for all."""
    file = folder / "frame.html"
    file.write_text(text)
    dom = chromium(folder, *options, "--virtual-time-budget=30000", "--dump-dom", file.as_uri())
    found = re.search("<output>(.*?)</output>", dom, re.DOTALL)
    assert found, dom[-2000:]
    told: list[dict[str, Any]] = json.loads(html_escapes.unescape(found[1]))
    return told


WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def in_light(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What is told, by name, where the reader prefers no dark."""
    plain, crowded = html.page(run), html.page(hasty(run))
    # As wide as what a browser prints on A4; nobody scrolls on paper.
    paper = crowded.replace("@media print", "@media screen")
    paper = re.sub("<meta http-equiv=[^>]*>", "", paper)  # that style is not the one it allows
    frames = {f"plain {width}": (plain, width) for width in WIDTHS}
    frames |= {f"hasty {width}": (crowded, width) for width in WIDTHS}
    frames |= {"paper": (paper, 718)}
    light = "--blink-settings=preferredColorScheme=1"
    told = told_by(tmp_path_factory.mktemp("light"), framed(*frames.values()), light)
    return dict(zip(frames, told, strict=True))


@needs_chromium
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["plain", "hasty"])
def test_nothing_sticks_out_in_a_browser(
    in_light: dict[str, dict[str, Any]], width: int, name: str
) -> None:
    told = in_light[f"{name} {width}"]
    assert told["width"] == width
    assert told["scroll"] <= told["width"]
    assert told["out"] == []
    assert told["beside"] == []


WRITES = "{ writeText: text => { copied.push(text); return Promise.resolve(); } }"
REFUSES = "{ writeText: () => Promise.reject(new Error('no')) }"


CLIPBOARDS = (WRITES, REFUSES, "undefined")


@pytest.fixture(scope="module")
def by_clipboard(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    # What got through all escaping would not run.
    hostile = "<script>window.hostile = true</script><img src=x onerror='window.hostile = true'>"
    page = html.page(run).replace("</body>", f"{hostile}</body>")
    told = told_by(tmp_path_factory.mktemp("clicked"), clicked(page, CLIPBOARDS))
    return dict(zip(CLIPBOARDS, told, strict=True))


@needs_chromium
@pytest.mark.parametrize("clipboard", CLIPBOARDS)
def test_a_click_copies_or_selects(
    run: Run, by_clipboard: dict[str, dict[str, Any]], clipboard: str
) -> None:
    told = by_clipboard[clipboard]
    texts = list(buttons(html.page(run)).values())
    assert told["buttons"] == told["shown"] >= len(texts) > 5
    assert not told["hostile"]
    word = "Copied" if clipboard == WRITES else "Selected"
    assert {each[0] for each in told["told"]} == {word}
    paths = [status.removeprefix(f"{word}: ") for _, status, _ in told["told"]]
    assert set(paths) == set(texts)
    assert told["copied"] == (paths if clipboard == WRITES else [])
    if clipboard != WRITES:
        assert [each[2] for each in told["told"]] == paths
    assert (told["now"], told["later"], told["status"]) == (word, "Copy", "")


@needs_chromium
def test_no_table_is_cut_off_on_paper(in_light: dict[str, dict[str, Any]]) -> None:
    told = in_light["paper"]
    assert (told["cut"], told["beside"]) == ([], [])


@needs_chromium
@pytest.mark.parametrize("width", WIDTHS)
def test_page_is_drawn(run: Run, tmp_path: Path, width: int) -> None:
    page, shot = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(framed((html.page(run), width)))
    chromium(tmp_path, f"--window-size={width},1600", f"--screenshot={shot}", page.as_uri())
    content = shot.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (width, 1600)
    assert len(content) > 30_000  # an empty page takes a tenth of this


@needs_chromium
def test_dark_where_the_reader_prefers_it(
    run: Run, tmp_path: Path, in_light: dict[str, dict[str, Any]]
) -> None:
    dark = "--blink-settings=preferredColorScheme=0"
    (in_dark,) = told_by(tmp_path, framed((html.page(run), 800)), dark)
    for told, scheme, colour in (
        (in_dark, "dark", "rgb(16, 20, 24)"),
        (in_light["plain 1280"], "light", "rgb(246, 247, 249)"),
    ):
        assert told["dark"] == (scheme == "dark")
        assert told["page"] == colour
