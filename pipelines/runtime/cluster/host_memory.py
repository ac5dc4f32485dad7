"""Memory of freed tensors in a process that computes on a CPU.

PyTorch on a CPU has no caching allocator. glibc returns a large tensor's memory to the kernel immediately, and the kernel zeroes each page
before it hands it out again. This takes half of the time of encoding with KL-16, and a quarter of a training step of the base model. With
a C library other than glibc this module has no effect.
"""

import ctypes
import os

# Set when a worker process starts: all threads share one heap. Ray runs actor methods and training on threads, and `keep_freed_memory`
# has no effect on the separate heaps that glibc otherwise creates for threads.
ENVIRONMENT = {"MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "1")}


def keep_freed_memory() -> None:
    """Make this process reuse the memory of freed tensors instead of returning it to the kernel. Its memory stays at its peak."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # constants from malloc.h
        mallopt(-4, 0)  # M_MMAP_MAX: never allocate with mmap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return memory
