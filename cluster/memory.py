"""How a process on a CPU deals with the memory of its tensors. Knows nothing of Ray."""

from __future__ import annotations

import ctypes

# As malloc.h of the GNU C library numbers them.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = 2**30  # bytes that are free and yet not given back
LARGEST = 2**25  # of a block that is kept at all; more the library does not allow


def keep_freed() -> None:
    """Have the C library keep memory for the next tensor, instead of asking the system for each, which clears it page
    by page: a tenth of a pass's time. Where the library is another, nothing happens."""
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(MMAP_THRESHOLD, LARGEST)
        adjust(TRIM_THRESHOLD, KEPT)
