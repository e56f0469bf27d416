"""What is said of a request that cannot be carried out: one line a problem, plain text, without the secrets in it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from graftwork.specs.masking import masked

SHOWN = 80  # characters of a value
LINE = 600  # characters of a problem
ACCEPTED = "; accepted: "


class SpecError(Exception):
    """The request cannot be carried out as it stands; each line names a field or file, what it is, what is accepted."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = [problem(line) for line in lines]
        super().__init__("\n".join(self.lines))


def problem(line: str) -> str:
    """Return a line that can be printed, see `plain`. If it is too long, shorten the part before `accepted`."""
    line = masked(plain(line))
    if len(line) <= LINE:
        return line
    start, marker, accepted = line.rpartition(ACCEPTED)
    if not marker:
        return shortened(line, LINE)
    end = shortened(marker + accepted, LINE // 2)
    return shortened(start, LINE - len(end)) + end


def refusal(field: str, value: object, accepted: str) -> str:
    """The line for a field; where what was found says by itself what is accepted, that counts."""
    return f"{field}: got {value}" + ("" if ACCEPTED in str(value) else f"{ACCEPTED}{accepted}")


def shortened(text: str, limit: int) -> str:
    """Text of at most so many characters, with " ..." for the words that are left out at its end."""
    if len(text) <= limit:
        return text
    words = text[: limit - 3].rpartition(" ")[0].rstrip(" ,;")
    return f"{words} ..." if len(words) > limit // 2 else f"{text[: limit - 3]}..."


def first_few(items: Sequence[str], most: int, between: str = ", ", last: str = " and ") -> str:
    """Return the first items joined, and how many more there are: "a, b and 3 more"."""
    return between.join(items[:most]) + (f"{last}{len(items) - most:,} more" if len(items) > most else "")


def plain(text: str) -> str:
    """Text that a terminal only prints: line ends, control characters and what is no character are spelt out."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def text(name: str) -> str:
    """Return a file's name as text: bytes of it that are not UTF-8 are spelt out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_text(value: str) -> bool:
    """Return whether it can be written as UTF-8: an escape in JSON may stand for half a character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """A value as an error line shows it: short, on one line."""
    from pydantic import BaseModel  # not to load it for those who have no spec to show

    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    try:
        text = "nothing" if value is None else masked(repr(value))
    except (ValueError, RecursionError):  # integers of thousands of digits have no repr
        text = "a value too large to be shown"
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def named(step: object) -> str:
    """A field's name in a path, whatever somebody called it."""
    text = plain(str(step))
    return text if len(text) <= SHOWN // 2 else text[: SHOWN // 2 - 3] + "..."
