"""What a process that computes on a CPU does with the memory of tensors that are gone.

PyTorch on a CPU has no caching allocator. glibc returns a large tensor's memory at once, and the kernel hands it out anew, page by page and
zeroed: half of the time of encoding with KL-16, a quarter of a training step of the base model. Where the C library is another, nothing
here does anything.
"""

import ctypes
import os

# Of a worker's process, from its start: threads share the one heap that `keep_freed_memory` speaks of. Ray calls actors and trains on
# threads, and in a thread's own heap glibc gives back what is large, whatever it is told.
ENVIRONMENT = {"MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "1")}


def keep_freed_memory() -> None:
    """Let this process use the memory of freed tensors again instead of giving it back; it holds what it once needed at a time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # the numbers of malloc.h
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back
