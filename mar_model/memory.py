"""Memory that a process on a CPU keeps from one step to the next."""

import ctypes

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for the next allocation; whether there is a glibc to do so.

    By default it gives large blocks back to the kernel at once, and the next step gets them anew, page by page, each filled with zeros:
    a quarter of a training step of the base model. To be called before there are threads; the process stays as large as it once was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(name, value) == 1 for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)))
