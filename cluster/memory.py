"""How a process on a CPU deals with the memory of its tensors, and how errors say that there is not enough of it.

Knows nothing of Ray.
"""

from __future__ import annotations

import ctypes
import errno
import re

# As malloc.h of the GNU C library numbers them.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = 2**30  # bytes that are free and yet not given back
LARGEST = 2**25  # of a block that is kept at all; more the library does not allow

# In what torch, the CUDA runtime and driver, Triton and NCCL say; then cuBLAS, cuDNN, cuSOLVER, cuSPARSE and cuFFT.
SHORT = re.compile(r"OutOfMemory|out of memory|(can't|[Cc]annot) allocate memory|_ALLOC(ATION)?_FAILED")


def is_short(error: BaseException) -> bool:
    """Whether an error, by its class or its text, is of memory that could not be had: a GPU's or the system's."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return SHORT.search(f"{type(error).__name__}: {error}") is not None


def keep_freed() -> None:
    """Have the C library keep memory for the next tensor, instead of asking the system for each, which clears it page
    by page: a tenth of a pass's time. Where the library is another, nothing happens."""
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(MMAP_THRESHOLD, LARGEST)
        adjust(TRIM_THRESHOLD, KEPT)
