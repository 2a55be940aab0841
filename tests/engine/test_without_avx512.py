"""The search on a CPU without AVX-512, which torch, oneDNN and numba are configured to ignore.

Environment variables configure a process of its own; ``CHECK`` confirms that they had an effect.
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from search_cases import BACKENDS, KINDS

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx2,+fma",
}
CHECK = """
import torch
from numba.core.registry import cpu_target
from localagg.engine.searchable_bank import product_dtype
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
assert product_dtype(torch.empty(1, 2)) == torch.float32  # bfloat16 would be emulated
features = cpu_target.target_context.codegen().magic_tuple()
assert "avx512" not in str(features), features
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86's features")
def test_the_search_cases_pass():
    environment = os.environ | AVX2
    subprocess.run([sys.executable, "-c", CHECK], env=environment, check=True)
    tests = Path(__file__).with_name("test_search.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed.group(1)) >= len(BACKENDS) * len(KINDS)
