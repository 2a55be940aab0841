"""The Triton kernels: cases under the interpreter, and compilation for a Hopper GPU.

Both run in processes of their own, because Triton chooses between them when it is imported. Neither
needs a GPU; with one, the cases run on it too.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed on this machine"
)

HERE = Path(__file__).parents[1] / "helpers"
SHARED_MEMORY = 227 << 10  # bytes that a program on a Hopper GPU can have

# A driver that reports a GPU without having one turns launches into compilations.
_COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
launch, found = JITFunction.run, {}
tools = Path(triton.__file__).parent / "backends/nvidia/bin"

def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [tools / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups())
    found[kernel.metadata.name] = {
        "registers": registers, "stack": stack, "threads": 32 * kernel.metadata.num_warps,
        "shared": kernel.metadata.shared, "tensor cores": "wgmma" in kernel.asm["ptx"],
    }

JITFunction.run = compile_only
from localagg.engine import cuda_backend as engine
B, N, D, K = 128, 100_000, 128, 4096
embedding, bank = torch.zeros(B, D), torch.zeros(N, D)
rows, _ = engine.top_rows(embedding, bank, K, bank_low=bank.half())
engine.log_partition(embedding, bank, 0.07)
labels, own = (torch.zeros(3, n, dtype=torch.int32) for n in (N, B))
engine.close_rows(labels, own, rows)
print(json.dumps(found))
"""


def run_cases(interpret: bool) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    cases = [str(HERE / "triton_search_cases.py"), str(HERE / "triton_loss_cases.py")]
    done = subprocess.run(
        [*command, *cases], env=environment, cwd=HERE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_cases_under_the_interpreter():
    run_cases(interpret=True)


@pytest.mark.cuda
def test_cases_on_the_gpu():
    run_cases(interpret=False)


@pytest.mark.slow
def test_kernels_compile_for_hopper_and_stay_in_its_registers(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = json.loads(done.stdout)
    assert len(kernels) == 11
    assert all(kernel["shared"] <= SHARED_MEMORY for kernel in kernels.values())
    multiply = {name for name, kernel in kernels.items() if kernel["tensor cores"]}
    assert multiply == {"score_sample", "collect", "_partition_pass"}
    # The three that read the bank or gather from it keep everything in registers, and two of the
    # pass's programs fit on a processor (65,536 registers, 228 KB).
    for name in ("collect", "rescore", "_partition_pass"):
        assert kernels[name]["stack"] == 0, name
    assert 2 * kernels["collect"]["threads"] * kernels["collect"]["registers"] <= 65536
    assert 2 * kernels["collect"]["shared"] <= SHARED_MEMORY
