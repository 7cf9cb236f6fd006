"""What a process is told before torch comes: each test in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

ENVIRONMENT = """
import json, os
from qlora_phi3 import process
process.prepare()
names = ("GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY", "CUDA_VISIBLE_DEVICES")
print(json.dumps({name: os.environ.get(name) for name in names}))
"""

HOLES = """
import sys
import numpy, psutil
from qlora_phi3 import process
if sys.argv[1] == "prepared":
    process.prepare()
for _ in range(3):
    large = numpy.ones(31 * 2**20, numpy.uint8)  # freed, it raises glibc's own threshold to its size
    del large
used = psutil.Process().memory_info().rss
tensors, pins = [], []
for _ in range(40):
    tensors.append(numpy.ones(8 * 2**20, numpy.uint8))
    pins.append(numpy.ones(2**17, numpy.uint8))
del tensors
print((psutil.Process().memory_info().rss - used) // 2**20)
"""


def run(script: str, *arguments: str, **environment: str) -> str:
    known = {key: value for key, value in os.environ.items() if not key.endswith(("_CAPACITY", "_SPINCOUNT"))}
    line = [sys.executable, "-c", script, *arguments]
    return subprocess.run(line, env=known | environment, check=True, text=True, capture_output=True).stdout


def test_kernels_are_kept_within_bounds_and_threads_spin_a_while():
    found = json.loads(run(ENVIRONMENT))
    assert found["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == found["LRU_CACHE_CAPACITY"] == "128"
    assert found["GOMP_SPINCOUNT"] == "2000"


def test_what_the_user_has_set_stays():
    found = json.loads(
        run(ENVIRONMENT, LRU_CACHE_CAPACITY="7", CUDA_VISIBLE_DEVICES="3", OMP_WAIT_POLICY="active")
    )
    assert found["LRU_CACHE_CAPACITY"] == "7"
    assert found["CUDA_VISIBLE_DEVICES"] == "3"
    assert found["GOMP_SPINCOUNT"] is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="is about glibc's malloc")
def test_freed_tensors_go_back_to_the_system():
    # 40 tensors of 8 MiB between small ones that stay; without it the heap keeps all of them
    assert int(run(HOLES, "prepared")) < 40
    assert int(run(HOLES, "plain")) > 250


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="is about glibc's malloc")
def test_a_threshold_of_the_users_own_stays():
    assert int(run(HOLES, "prepared", MALLOC_MMAP_THRESHOLD_=str(16 * 2**20))) > 250
