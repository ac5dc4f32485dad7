"""Freed memory is used again: on the main thread of a process, and on the threads on which Ray calls actors."""

import platform
import subprocess
import sys

import pytest
import ray

from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.cluster.workers import use_threads

PAGES = 96 * 2**20 // 4096
FAULTS = """
import resource, sys, torch
from pipelines.runtime.cluster.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
found = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(96 * 2**20 // 4)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(found[-1])  # at first the heap grows: glibc's thread cache holds up to seven leftovers of aligned allocations between them
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")


def test_a_tensor_of_the_same_size_takes_no_new_pages() -> None:
    def faults(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)

    assert faults("kept") < PAGES // 100
    assert faults("returned") > PAGES // 100  # what this is for; in huge pages a fault brings 512


def test_nor_does_one_on_an_actors_thread(ray_local: ClusterSettings) -> None:
    class Worker:
        def __init__(self) -> None:
            use_threads(ray_local)

        def faults(self) -> int:
            import resource

            import torch

            found = []
            for _ in range(20):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                torch.ones(96 * 2**20 // 4)
                found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
            return found[-1]

    worker = ray.remote(num_cpus=0, max_concurrency=2)(Worker).remote()
    assert ray.get(worker.faults.remote()) < PAGES // 100
