"""An array of an artifact that is too large for memory: written part by part, in the order of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class GrowingArray:
    """An .npy of so many rows, of which the first part says what they are."""

    def __init__(self, path: Path, num_rows: int) -> None:
        self.path, self.num_rows = path, num_rows
        self._done = 0
        self._file: np.memmap[Any, np.dtype[Any]] | None = None

    def append(self, rows: NDArray[Any]) -> None:
        """Write the rows (n,..) that come next; the last ones complete the file."""
        if self._file is None:
            shape = (self.num_rows, *rows.shape[1:])
            self._file = np.lib.format.open_memmap(self.path, "w+", rows.dtype, shape)
        self._file[self._done : self._done + len(rows)] = rows
        self._done += len(rows)
        if self._done == self.num_rows:
            self._file.flush()
