"""Freed memory is used again."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from pipelines.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
found = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**20 // 4)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(found[-1])  # at first the heap grows: glibc's thread cache holds up to seven leftovers of aligned allocations between them
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_a_tensor_of_the_same_size_takes_no_new_pages() -> None:
    def faults(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)

    pages = 64 * 2**20 // 4096
    assert faults("kept") < pages // 100
    assert faults("returned") > pages // 100  # what this is for; in huge pages a fault brings 512
