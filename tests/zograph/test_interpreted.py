"""The Triton kernels without a GPU: their interpreter gives the bits of the definitions."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_has_the_bits_of_the_definitions() -> None:
    command = [sys.executable, "-m", "tests.zograph.interpreted"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cases"] > 100
    assert found["differ"] == []
