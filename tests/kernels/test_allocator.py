"""glibc's allocator: what is freed is kept."""

import os
import subprocess
import sys
import sysconfig

import pytest

SCRIPT = """
import resource, sys
import torch
from flow_pl.kernels.allocator import keep_freed_memory

torch.set_num_threads(1)
kept = keep_freed_memory() if sys.argv[1] == "keep" else None

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB: 16384 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# the first few holes that a tensor leaves are a little too small for the next one
print(kept, min(faults() for _ in range(40)))
"""


def run(word, **environment):
    known = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, word], capture_output=True, text=True, check=True, env=known | environment
    )
    kept, faults = process.stdout.split()
    return kept, int(faults)


@pytest.mark.slow
@pytest.mark.skipif("gnu" not in (sysconfig.get_config_var("HOST_GNU_TYPE") or ""), reason="not glibc")
def test_the_memory_of_a_freed_tensor_serves_the_next():
    kept, faults = run("keep")
    assert kept == "True"
    assert faults < 100 < run("leave")[1]


@pytest.mark.slow
def test_settings_of_the_environment_are_left_alone():
    assert run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
