"""A file of prompts: a line each, or a JSON object each, as GenEval's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from graftwork.specs.problems import is_text, shown
from graftwork.specs.text import JSON_PROMPTS

MAX_BYTES = 2**28
ACCEPTED = "accepted: a file of prompts in UTF-8, a line each, or a .jsonl with `prompt` in each line"


def read_prompts(path: str, field: str = "evaluate.prompts") -> tuple[str, ...]:
    """Return the prompts of a file; lines with nothing in them do not count. Raise ValueError with a line."""

    def misfit(problem: str) -> ValueError:
        return ValueError(f"{field}: got {shown(path)}, {problem}; {ACCEPTED}")

    place = Path(path)
    try:
        if not place.is_file():
            kind = "which is a folder" if place.is_dir() else "which is no file" if place.exists() else "no such file"
            raise misfit(kind)
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
    lines = {number: line for number, part in enumerate(content.split("\n"), 1) if (line := part.strip())}
    prompts = (
        tuple(_prompt_of(*one, misfit) for one in lines.items())
        if path.endswith(JSON_PROMPTS)
        else tuple(lines.values())
    )
    if not prompts:
        raise misfit("with no prompt in it")
    return prompts


def _prompt_of(number: int, line: str, misfit: Callable[[str], ValueError]) -> str:
    """Return the prompt of a line of GenEval's; the rest of it is the metric's."""
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str) or not prompt.strip() or not is_text(prompt):
        raise misfit(f"whose line {number} has no prompt: {shown(line)}")
    return prompt.strip()
