"""Artifacts without a store, for a stage that is called on its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folder:
    """An artifact that a step needs, in any folder."""

    key: str
    place: Path

    def path(self) -> Path:
        return self.place
