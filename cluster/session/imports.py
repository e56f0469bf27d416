"""Imports that libraries make for nothing, and where processes that are started import our code from. No Ray."""

from __future__ import annotations

import site
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import graftwork


@contextmanager
def without(module: str) -> Iterator[None]:
    """Have what is imported within find that `module` is not installed, unless it is loaded already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # how Python marks what cannot be imported
    try:
        yield
    finally:
        del sys.modules[module]


def code_folders() -> list[str]:
    """Return the folder that graftwork was imported from, unless every Python of this environment has it."""
    folder = str(Path(graftwork.__file__).absolute().parent.parent)
    return [] if folder in (*site.getsitepackages(), site.getusersitepackages()) else [folder]
