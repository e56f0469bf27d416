"""mamba-ssm's own Triton kernels against our definition, on a machine without a GPU: interpreted, and compiled."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

SHARED_MEMORY_BYTES = 227 * 2**10  # that a kernel may take on sm_90

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("mamba_ssm") is None, reason="needs mamba-ssm; `make .venv/kernels` installs it"
    ),
]


def scan(*arguments: str, **variables: str) -> Any:
    """What a process of `tests.mamba_scan` prints."""
    command = [sys.executable, "-m", "tests.mamba_scan", *arguments]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("num_tokens", "dtype", "close"), [(300, "float32", 1e-5), (64, "float16", 5e-3)])
def test_the_fused_scan_and_all_its_gradients_are_those_of_the_definition(
    num_tokens: int, dtype: str, close: float
) -> None:
    apart = scan("interpreted", str(num_tokens), dtype, TRITON_INTERPRET="1")
    assert {"output", "input", "A_log", "D", "dt_bias"} < set(apart)
    assert all(distance < close for distance in apart.values()), apart


def test_every_kernel_of_the_fused_scan_is_compiled_for_an_h100_at_the_published_size(tmp_path: Path) -> None:
    shared_memory = scan("compiled", TRITON_CACHE_DIR=str(tmp_path))
    assert {"fwd", "bwd"} <= {part for name in shared_memory for part in name.split("_")}
    assert all(size <= SHARED_MEMORY_BYTES for size in shared_memory.values()), shared_memory
