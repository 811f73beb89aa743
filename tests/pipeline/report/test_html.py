from __future__ import annotations

import html as html_escapes
import itertools
import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.figures import Number
from pipeline.report import html

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
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.elements if (value := attrs.get(name)) is not None]


def test_page_is_well_formed(results: dict[str, Any]) -> None:
    page = Page(html.page(results))
    assert ("html", {"lang": "en"}) in page.elements
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))


def test_links_within_the_page_lead_somewhere(results: dict[str, Any]) -> None:
    page = Page(html.page(results))
    links = [href for href in page.attributes("href") if href.startswith("#")]
    assert links
    assert {href[1:] for href in links} <= set(page.attributes("id"))


def test_headings_skip_no_level(results: dict[str, Any]) -> None:
    levels = Page(html.page(results)).headings
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_tables_have_captions_and_scopes(results: dict[str, Any]) -> None:
    page = Page(html.page(results))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("table") == tags.count("caption") > 5
    assert all("scope" in attrs for tag, attrs in page.elements if tag == "th")


def test_plots_have_a_title_and_a_description(results: dict[str, Any]) -> None:
    text = html.page(results)
    svgs = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert len(svgs) == 4  # accuracy by latency and by size, two batches
    assert all("<title" in svg and "<desc" in svg and 'role="img"' in svg for svg in svgs)


def test_page_loads_nothing(results: dict[str, Any]) -> None:
    text = html.page(results)
    assert "://" not in text
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text
    loaded = [v for name in ("src", "href") for v in Page(text).attributes(name)]
    assert all(value.startswith(("#", "data:,")) for value in loaded)


def test_same_results_give_the_same_bytes(results: dict[str, Any]) -> None:
    plain = json.loads(json.dumps(results))
    assert html.page(results) == html.page(plain)


def test_states_are_words_with_reasons(results: dict[str, Any]) -> None:
    text = Page(html.page(results)).text
    assert "Accuracy emulated by strict ONNX executor, since no NVIDIA GPU was found" in text
    assert "Latency not measured no NVIDIA GPU was found" in text
    assert "Accuracy measured ONNX Runtime 1, 2 threads" in text
    assert "not measured accuracy of coreml/fp16" in text


def test_failures_and_gates_come_first(results: dict[str, Any]) -> None:
    text = Page(html.page(results)).text
    failure = text.index("coreml/mixed failed: coremltools refuses the operation 'erf'")
    gate = text.index("gate does not hold: ort/int8: agreement is 0.95")
    assert failure < gate < text.index("Every artifact.")
    assert "1 failure and 1 gate that does not hold (exit code 3: a build failed)" in text


def test_a_good_run_says_so(results: dict[str, Any]) -> None:
    results |= {"exit_code": 0, "gates": [], "steps": []}
    results["artifacts"] = [a for a in results["artifacts"] if not a["failure"]]
    text = html.page(results)
    assert 'class="verdict good"' in text
    assert "Everything was built, and no gate failed" in text


def test_every_figure_of_an_artifact_is_there(results: dict[str, Any]) -> None:
    text = Page(html.page(results)).text
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
        "of the time of PyTorch",
        "of the time of fp32",
        "end to end",
        "too few samples",
        "Graph passes",
        "model.bin",
        "Made from checkpoint c0ffeec0ffee",
    ):
        assert words in card, words


def test_emulation_notes_and_overflows_are_told(results: dict[str, Any]) -> None:
    text = Page(html.page(results)).text
    assert "trt/fp16: 3 values left the range of their type" in text
    assert "headroom 31" in text


def test_warnings_are_told(results: dict[str, Any]) -> None:
    text = Page(html.page(results)).text
    assert "Warning: an int64 was clamped" in text
    assert "calibration: the class 'bag' has 3 images less" in text


def test_repeated_warnings_are_told_once(results: dict[str, Any]) -> None:
    results["artifacts"][0]["facts"]["warnings"] = ["scales become float32"] * 90 + ["other"]
    text = Page(html.page(results)).text
    assert text.count("scales become float32") == 1
    assert "scales become float32 (90 times)" in text


def test_busy_machine_is_told(results: dict[str, Any]) -> None:
    results["bench"]["ort"]["facts"]["load_before"] = 3.5
    assert "ort: other processes kept 3.5 of 2 CPUs busy" in Page(html.page(results)).text


def test_chain_goes_through_the_form_to_the_checkpoint(results: dict[str, Any]) -> None:
    onnx = results["onnx"]
    form = {
        "name": "precision/float16",
        "digest": results["artifacts"][0]["made_from"]["precision/float16"],
        "made_from": {"onnx": onnx["digest"]},
        "facts": {"casts": 2},
    }
    results["forms"] = {"float16": form}
    text = Page(html.page(results)).text
    names = ("checkpoint", "export", "onnx", "precision/float16", "trt/fp16")
    assert re.search("Made from " + " → ".join(rf"{name} \w{{12}}" for name in names), text)


def test_broken_chain_is_told(results: dict[str, Any]) -> None:
    results["onnx"]["digest"] = "f" * 64
    text = Page(html.page(results)).text
    assert re.search("ort/fp32 is outdated: onnx was made from .{12}, now there is ffff", text)


def test_ranges_are_shown_with_histograms(results: dict[str, Any]) -> None:
    row = {
        "tensor": "stem/conv",
        "seen": [-1.0, 3.0],
        "chosen": [-1.0, 2.0],
        "clipped": 0.25,
        "constant": False,
        "histogram": [0, 5, 900, 20],
    }
    results["artifacts"][1]["facts"]["ranges"] = [row]
    page = html.page(results)
    assert "Ranges of 1 tensors: trt/int8" in Page(page).text
    assert "range -1 to 2" in page


def test_search_over_compressions_is_plotted(results: dict[str, Any]) -> None:
    curve = [
        {"size": 1_700_000, "changed": 0.0, "tensors": {}},
        {"size": 900_000, "changed": 0.002, "tensors": {"int8": 40}},
        {"size": 500_000, "changed": 0.03, "tensors": {"palette4": 40}},
    ]
    results["artifacts"][4]["facts"] |= {"curve": curve, "chosen": curve[1]}
    text = html.page(results)
    assert "What coreml/fp16 could have been" in text
    assert "0.20 % changed at 0.9 MB chosen; 3.00 % changed at 0.5 MB" in text


def test_hostile_text_stays_text(results: dict[str, Any]) -> None:
    artifact = results["artifacts"][0]
    results["name"] = results["config"] = HOSTILE
    results["gates"] = [HOSTILE]
    results["machine"]["cpu"] = HOSTILE
    artifact["facts"][HOSTILE] = {HOSTILE: [{HOSTILE: HOSTILE}]}
    artifact["notes"] = {HOSTILE: HOSTILE}
    artifact["precision"] = HOSTILE
    results["export"]["facts"]["network"]["labels"] = [HOSTILE] * 10
    results["bench"]["ort"]["facts"]["devices"]["fp32"] = HOSTILE
    samples = results["bench"]["ort"]["facts"]["batches"]["1"]["samples_ms"]
    samples[HOSTILE] = samples.pop("fp32")
    text = html.page(results)
    assert "<script" not in text
    assert html_escapes.escape(HOSTILE, quote=False)[:20] in text
    Page(text)


def test_fashion_mnist_is_never_plotted_beside_imagenet(results: dict[str, Any]) -> None:
    page = Page(html.page(results))
    assert "beside the published rows" not in page.text
    assert "Accuracies of the two groups do not compare" in page.text


def test_imagenet_is_plotted_beside_the_published_rows(imagenet: dict[str, Any]) -> None:
    text = html.page(imagenet)
    assert "ort beside the published rows (Intel i9)" in text
    assert "CARE-S0: 78.40 % at 4.3 ms (published)" in text


def test_run_that_failed_at_once(nothing: dict[str, Any]) -> None:
    page = Page(html.page(nothing))
    assert "export failed: care_tiny does not export to ONNX: no memory" in page.text
    assert "not measured accuracy of trt/fp16" in page.text
    assert "svg" not in [tag for tag, _ in page.elements]


@pytest.mark.parametrize("part", ["export", "onnx", "calibration", "pytorch", "bench"])
def test_missing_parts_are_left_out(results: dict[str, Any], part: str) -> None:
    results[part] = {}
    Page(html.page(results))


def test_numbers_that_are_not_finite(results: dict[str, Any]) -> None:
    artifact = results["artifacts"][0]
    artifact["facts"]["difference"] = float("nan")
    artifact["notes"] = {"largest_value": float("inf")}
    text = Page(html.page(results)).text
    assert "difference not a number" in text
    assert "largest value infinite" in text


def test_preprocessing_is_in_pixels(results: dict[str, Any]) -> None:
    assert "side in pixels 28" in Page(html.page(results)).text


def test_commands_name_the_configuration(results: dict[str, Any]) -> None:
    text = Page(html.page(results)).text
    assert "python -m pipeline run 'configs/my run.yaml'" in text
    assert "Measure trt, on a machine that runs it" in text


def test_latency_that_came_from_elsewhere(results: dict[str, Any]) -> None:
    imported = {"value": 1.5, "state": "measured", "unit": "ms", "by": "iPhone 15, iOS 18"}
    results["artifacts"][4]["latency"] = Number.from_dict(imported).to_dict()
    assert "Latency measured iPhone 15, iOS 18" in Page(html.page(results)).text


def chromium(tmp_path: Path, *arguments: str) -> str:
    """Run chromium with a profile of its own; what it printed."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return run.stdout


def framed(page: str, width: int) -> str:
    """The page in a frame of some width, since windows have a least one; tells what sticks out."""
    style = f"border:0;width:{width}px;height:4000px"
    return f"""<!DOCTYPE html><title>frame</title><body style="margin:0">
<iframe style="{style}" srcdoc="{html_escapes.escape(page)}"></iframe>
<output></output><script>
const frame = document.querySelector("iframe");
const look = () => {{
  const page = frame.contentDocument;
  page.querySelectorAll("details").forEach(d => {{ d.open = true; }});
  const inside = e => e.closest(".scroll") === null || e.classList.contains("scroll");
  const out = [...page.querySelectorAll("main *")].filter(inside)
    .filter(e => e.getBoundingClientRect().right > frame.contentWindow.innerWidth + 0.5);
  document.querySelector("output").textContent = JSON.stringify({{
    width: frame.contentWindow.innerWidth, scroll: page.documentElement.scrollWidth,
    out: out.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
    dark: frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches,
    page: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
  }});
}};
frame.addEventListener("load", look);
if (frame.contentDocument.readyState === "complete" && frame.contentDocument.body) look();
</script>"""


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_in_a_browser(
    results: dict[str, Any], tmp_path: Path, width: int
) -> None:
    file = tmp_path / "frame.html"
    file.write_text(framed(html.page(results), width))
    dom = chromium(tmp_path, "--virtual-time-budget=5000", "--dump-dom", file.as_uri())
    found = re.search("<output>(.*?)</output>", dom, re.DOTALL)
    assert found, dom[-2000:]
    told = json.loads(html_escapes.unescape(found[1]))
    assert told["width"] == width
    assert told["scroll"] <= told["width"]
    assert told["out"] == []


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_page_is_drawn(results: dict[str, Any], tmp_path: Path, width: int) -> None:
    page, shot = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(framed(html.page(results), width))
    chromium(tmp_path, f"--window-size={width},1600", f"--screenshot={shot}", page.as_uri())
    content = shot.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (width, 1600)
    assert len(content) > 30_000  # an empty page takes a tenth of this


@needs_chromium
def test_dark_where_the_reader_prefers_it(results: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "frame.html"
    file.write_text(framed(html.page(results), 800))
    colours = {}
    for scheme, value in (("dark", 0), ("light", 1)):
        dom = chromium(
            tmp_path,
            f"--blink-settings=preferredColorScheme={value}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            file.as_uri(),
        )
        found = re.search("<output>(.*?)</output>", dom, re.DOTALL)
        assert found
        told = json.loads(html_escapes.unescape(found[1]))
        assert told["dark"] == (scheme == "dark")
        colours[scheme] = told["page"]
    assert colours == {"dark": "rgb(16, 20, 24)", "light": "rgb(246, 247, 249)"}
