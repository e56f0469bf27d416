"""A file of prompts, a line each."""

from __future__ import annotations

from pathlib import Path

from graftwork.specs.problems import shown

MAX_BYTES = 2**28
ACCEPTED = "accepted: a file of prompts in UTF-8, a line each"


def read_prompts(path: str, field: str = "evaluate.prompts") -> tuple[str, ...]:
    """Return the prompts of a file; lines with nothing in them do not count. Raise ValueError with a line."""

    def misfit(problem: str) -> ValueError:
        return ValueError(f"{field}: got {shown(path)}, {problem}; {ACCEPTED}")

    place = Path(path)
    try:
        if not place.is_file():
            raise misfit("which is a folder" if place.is_dir() else "no such file")
        if place.stat().st_size > MAX_BYTES:
            raise misfit("which is too large for a list of prompts")
        content = place.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = place.read_bytes()[: error.start].count(b"\n") + 1
        raise misfit(f"whose line {number} is no UTF-8") from None
    except OSError as error:
        raise misfit(f"which cannot be read ({error.strerror})") from None
    if "\0" in content:
        raise misfit("which is no text in UTF-8")
    prompts = tuple(line for part in content.split("\n") if (line := part.strip()))
    if not prompts:
        raise misfit("with no prompt in it")
    return prompts
