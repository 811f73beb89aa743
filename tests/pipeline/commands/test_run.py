"""What the command line says of where steps run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline import config
from pipeline.cli import main
from pipeline.commands.run import with_fleet
from pipeline.config import FleetConfig, Written
from pipeline.core.errors import ConfigError

VALUES: dict[str, Any] = {
    "name": "mine",
    "model": {"name": "care_tiny", "checkpoint": "embedded"},
    "data": {"validation": "fashion-mnist", "calibration": "fashion-mnist"},
    "targets": {"ort": {"precisions": ["fp32"]}},
}


def written(**fleet: Any) -> Written:
    return config.from_mapping({**VALUES, **({"fleet": fleet} if fleet else {})})


def test_the_command_line_goes_before_the_file() -> None:
    assert with_fleet(written(), None, False).config.fleet is None
    there = written(scheduler="tls://box:1", wait_s=5.0)
    assert with_fleet(there, None, False).config.fleet == there.config.fleet
    found = with_fleet(there, "tls://other:2", False).config.fleet
    assert found == FleetConfig(scheduler="tls://other:2", wait_s=5.0)
    found = with_fleet(there, None, True).config.fleet
    assert found == FleetConfig(scheduler="tls://box:1", wait_s=5.0, insecure=True)
    found = with_fleet(written(), "tcp://127.0.0.1:8786", False).config.fleet
    assert found == FleetConfig(scheduler="tcp://127.0.0.1:8786")


@pytest.mark.parametrize("address", ["box:8786", "http://box:8786", "tls://box", "tls://a@box:1"])
def test_what_is_no_scheduler_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a scheduler: write tls://HOST:PORT"):
        with_fleet(written(), address, False)
    with pytest.raises(ConfigError, match=r"fleet\.scheduler"):
        written(scheduler=address)


def test_insecure_without_a_scheduler_means_nothing() -> None:
    with pytest.raises(ConfigError, match="give --scheduler, too"):
        with_fleet(written(), None, True)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--scheduler", "tls://box:1"], "a scheduler needs a store"),
        (["--scheduler", "tls://box:1", "--jobs", "2"], "choose one"),
    ],
)
def test_refusals_end_with_2_and_write_nothing(
    tmp_path: Path, options: list[str], why: str
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "name: mine\nmodel: {name: care_tiny, checkpoint: embedded}\n"
        "data: {validation: fashion-mnist, calibration: fashion-mnist}\n"
        f"targets: {{ort: {{precisions: [fp32]}}}}\noutput: {tmp_path}/out\n"
    )
    result = CliRunner().invoke(main, ["run", str(file), *options])
    assert result.exit_code == 2
    assert why in result.output
    assert not (tmp_path / "out").exists()
