"""Lines that a metric keeps of a row, a JSON object an image; `filename` is the image's place in GenEval's folders."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def place_of(prompt: int, sample: int = 0) -> str:
    """Return the place of an image, by the index of its prompt and its own among that prompt's images."""
    return f"{prompt:05d}/samples/{sample:04d}.png"


def write_records(records: Sequence[str], file: Path) -> None:
    """Write a row's lines in their order, with the number of each image among those of its prompt."""
    seen = Counter[str]()
    with file.open("w", encoding="utf-8") as out:
        for record in records:
            line: dict[str, Any] = json.loads(record)
            prompt = line["filename"].partition("/")[0]
            line["filename"] = place_of(int(prompt), seen[prompt])
            seen[prompt] += 1
            out.write(f"{json.dumps(line)}\n")
