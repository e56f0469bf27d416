"""Processes that end when whoever started them is gone. Knows nothing of Ray."""

from __future__ import annotations

import os
import threading
import time
from functools import cache

PARENT_CHECK_SECONDS = 0.1


@cache
def end_with_parent(known: int | None = None) -> None:
    """Have this process end when its parent is gone; of a Ray task that is Ray's node, which itself lets it go on.

    known: the parent's id, for a process that may begin when its parent is gone already.
    """
    parent = os.getppid() if known is None else known

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
