"""The lowest versions that setup.cfg allows become constraints."""

from __future__ import annotations

import configparser

import lower
import pytest

SETTINGS = """
[options]
install_requires =
    torch>=2.13
    onnx-ir>=0.1.16
[options.extras_require]
test =
    care-deploy[dask]
    pytest
    # Why this one.
    python-dateutil<3
dask =
    distributed[more]>=2026.1; sys_platform == "linux"
coreai =
    coreai-torch>=0.4.3
"""


def test_lowest_versions_become_constraints() -> None:
    settings = configparser.ConfigParser()
    settings.read_string(SETTINGS)
    assert lower.lowest(lower.requirements(settings)) == [
        'distributed==2026.1; sys_platform == "linux"',
        "onnx-ir==0.1.16",
        "torch==2.13",
    ]


def test_every_requirement_of_the_package_states_a_lowest_version(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lower.main()
    told = {line.partition("==")[0] for line in capsys.readouterr().out.splitlines()}
    settings = configparser.ConfigParser()
    settings.read(lower.SETTINGS)
    lines = settings["options"]["install_requires"].split("\n")[1:]
    assert {line.partition(">=")[0] for line in lines} <= told
    assert len(lines) > 20
