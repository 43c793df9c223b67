"""What the C library does with memory that a step freed: keeps it for the next, as torch does on CUDA.

By itself glibc gives large blocks and the end of its heap back to the kernel, which then hands out the same pages in the
next step one fault after the other, and clears each. Faults are dear in a virtual machine.
"""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
NEVER = 2**31 - 1  # bytes; the most that an int holds
LARGEST = 32 * 2**20  # bytes; blocks above are always given back, for glibc takes no higher bound


def keep_freed_memory() -> bool:
    """From now on; the process stays as large as its largest step.

    Returns:
        Whether the C library knows how; others than glibc do not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(TRIM_THRESHOLD, NEVER)) and bool(mallopt(MMAP_THRESHOLD, LARGEST))
