"""`compare`: what became better or worse between two runs?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.commands.rebuild import rebuilt
from pipeline.core.errors import ArtifactError, GateFailedError, InputError
from pipeline.core.files import refuse_foreign_file, write_atomically
from pipeline.report import compare as results
from pipeline.report import compare_pages as pages
from pipeline.report.history import PREVIOUS, previous


def compare(baseline: Path, new: Path, **files: Path | None) -> int:
    """Print what two runs differ in; returns the exit code, 1 where a regression is proven.

    Args:
        baseline: Results' folder that stands for how it was, an entry of a history, or "previous"
            for the newest one of the new results that is another.
        new: The other one.
        files: Where to write the same, see `Files`.

    Raises:
        ArtifactError: A folder holds no results, or a file of somebody else would be replaced.
        InputError: The runs judged other images.
    """
    written = Files(**files)
    written.refuse_foreign()
    if str(baseline) == PREVIOUS:
        baseline = previous(new)
    return written.tell(results.compare(baseline, new), new)


def compare_rebuilt(
    folder: Path, requirements: Sequence[str], python: Path | None, **files: Path | None
) -> int:
    """Print what results would differ in if another environment made them; see `compare`.

    Args:
        folder: The results' folder.
        requirements: Versions of the other environment, such as "onnxruntime==1.23.0".
        python: An interpreter of an environment that is there, in place of these.
        files: Where to write the same, see `Files`.

    Raises:
        PipelineError: See `pipeline.commands.rebuild.rebuilt`.
    """
    written = Files(**files)
    written.refuse_foreign()
    with rebuilt(folder, requirements, python) as other:
        compared = results.compare(folder, other.folder)
        named = replace(compared, new=f"{folder}, {other.title}", remarks=other.remarks)
        return written.tell(named, folder)


@dataclass(frozen=True)
class Files:
    """Where else a comparison goes.

    Attributes:
        markdown: For a pull request.
        html: A page with the images whose answers changed.
        junit: JUnit XML.
        json_file: All of it, as JSON.
    """

    markdown: Path | None = None
    html: Path | None = None
    junit: Path | None = None
    json_file: Path | None = None

    def refuse_foreign(self) -> None:
        """Refuse to replace a file of somebody else.

        Raises:
            ArtifactError: There is one.
        """
        for path in (self.markdown, self.html, self.junit, self.json_file):
            if path is not None:
                refuse_foreign_file(path, pages.is_ours)

    def tell(self, compared: results.Compared, images: Path) -> int:
        """Print a comparison, write the files, and return the exit code.

        Args:
            compared: What two runs differ in.
            images: The results' folder whose images are shown.

        Raises:
            InputError: The runs judged other images, so that no accuracy is compared.
        """
        written: dict[Path | None, Callable[[], str]] = {
            self.markdown: lambda: pages.markdown(compared),
            self.html: lambda: pages.html(compared, _pixels(images)),
            self.junit: lambda: pages.junit(compared),
            self.json_file: lambda: results.to_json(compared, pages.MARK),
        }
        for path, content in written.items():
            if path is not None:
                write_atomically(path, content(), pages.is_ours)
        print(pages.text(compared))
        if compared.judged_others:  # who asks whether something became worse was not answered
            raise InputError(results.OTHER_IMAGES)
        return GateFailedError.exit_code if compared.regressions else 0


def _pixels(folder: Path) -> results.PixelsOrNone:
    """The validation images; None where they are gone: the page then names them only."""
    try:
        return results.pixels_of(folder)
    except ArtifactError:
        return None
