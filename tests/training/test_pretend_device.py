"""Training on a device that refuses tensors of the host and counts what makes the host wait."""

import os
import subprocess
import sys

import pytest
from helpers import HANGING, ROOT


@pytest.mark.parametrize("kinds", ["dit and not elastic",
                                   pytest.param("elastic or unet or sd", marks=pytest.mark.slow)])
def test_a_run_on_a_pretend_device(tmp_path, kinds):
    """In a process of its own, since the device is registered with all of torch."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
         f"--basetemp={tmp_path / 'runs'}", "tests/training/on_pretend_device.py", "-k", kinds],
        capture_output=True, text=True, timeout=HANGING, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr
