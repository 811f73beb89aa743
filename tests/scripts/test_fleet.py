"""What counts as a difference of a run on workers; the script itself takes some minutes."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any, cast

import fleet
import pytest

from pipeline.steps.artifact import Artifact


def made(**digests: str) -> dict[str, Artifact]:
    def stub(digest: str) -> Artifact:
        class Stub:
            pass

        found: Any = Stub()
        found.digest = digest
        return cast(Artifact, found)

    return {name.replace("_", "/"): stub(digest) for name, digest in digests.items()}


def test_only_what_is_timed_may_differ() -> None:
    plain = made(export="a", ort_fp32="a", bench_ort="a", trt_fp16="a")
    assert fleet.differing(plain, plain) == []
    assert fleet.differing(plain, {**plain, **made(ort_fp32="b", bench_ort="b")}) == []
    assert fleet.differing(plain, {**plain, **made(trt_fp16="b", onnx="a")}) == ["onnx", "trt/fp16"]
    assert fleet.differing(plain, made(export="a")) == ["bench/ort", "ort/fp32", "trt/fp16"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_is_busy_while_it_has_a_process() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while not fleet.busy(process.pid):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert process.stdin is not None
        process.stdin.close()
