"""Files of one JSON object a line, read into models; and files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from graftwork.specs.fields import wrap_large_integers
from graftwork.specs.problems import SpecError, named, shown
from graftwork.stages.evaluation.geneval.vocabulary import Vocabulary

MAX_NAMED_PROBLEMS = 20  # of a file

M = TypeVar("M", bound=BaseModel)


def read_jsonl(file: Path, model: type[M], vocabulary: Vocabulary | None = None) -> list[M]:
    """Return the objects of a file, one a line. A byte order mark, CRLF and blank lines are tolerated.

    vocabulary: the classes and colours that the model's validators accept; None accepts any. Raise SpecError with a
    line for each problem: FILE:LINE: field: got X; accepted: Y.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise SpecError([f"{file}: got {error.strerror}; accepted: a file of one JSON object a line"]) from None
    return parse_jsonl(str(file), content, model, vocabulary)


def parse_jsonl(file: str, content: bytes, model: type[M], vocabulary: Vocabulary | None = None) -> list[M]:
    """Return what `read_jsonl` does of a file's content. file: its name, for errors."""
    values: list[M] = []
    problems: list[str] = []
    for number, line in _lines(file, content):
        try:
            values.append(_parse(line, model, vocabulary))
        except SpecError as error:
            problems += [f"{file}:{number}: {problem}" for problem in error.lines]
    if problems:
        raise_problems(problems)
    if not values:
        raise SpecError([f"{file}: got no lines; accepted: one JSON object a line"])
    return values


def raise_problems(problems: Sequence[str]) -> NoReturn:
    """Raise SpecError with the first problems, and how many more there are."""
    more = len(problems) - MAX_NAMED_PROBLEMS
    raise SpecError([*problems[:MAX_NAMED_PROBLEMS], *([f"and {more:,} more problems"] if more > 0 else [])])


def write_whole(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place, and move it there once it is on disk. Make the folder that it lies in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as draft:
        path = Path(draft.name)
        try:
            write(draft)
            draft.flush()
            os.fsync(draft.fileno())
            path.chmod(0o644)
            path.replace(file)
        finally:
            path.unlink(missing_ok=True)


def _lines(file: str, content: bytes) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers from 1; raise SpecError if the content is not text."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise SpecError([f"{file}:{number}: got bytes that are not UTF-8; accepted: text in UTF-8"]) from None
    # Not splitlines(), which also splits at characters that JSON allows within a string.
    yield from ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _parse(line: str, model: type[M], vocabulary: Vocabulary | None) -> M:
    """Return the object of a line; raise SpecError with a line for each problem: field: got X; accepted: Y."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        raise SpecError([f"line: got {shown(line.strip())}; accepted: a JSON object"]) from None
    try:
        return model.model_validate(wrap_large_integers(document), context=vocabulary)
    except ValidationError as error:
        problems = error.errors()
        # pydantic counts a list's valid items only, so a bad item makes the list too short as well: say it once.
        blamed = {problem["loc"][:end] for problem in problems for end in range(len(problem["loc"]))}
        raise SpecError([_describe(problem) for problem in problems if problem["loc"] not in blamed]) from None


def _describe(problem: ErrorDetails) -> str:
    field = ".".join(map(named, problem["loc"])) or "line"
    value = None if problem["type"] == "missing" else problem["input"]
    return f"{field}: got {shown(value)}; accepted: {_accepted(problem)}"


def _accepted(problem: ErrorDetails) -> str:
    """Return what is accepted, where pydantic's own words are about Python."""
    context = problem.get("ctx", {})
    words = {
        "refused": context.get("accepted"),
        "missing": "a value",
        "extra_forbidden": "no field of this name",
        "too_short": "at least one",
        "tuple_type": "a list",
        "model_type": "a JSON object",
    }
    return words.get(problem["type"]) or problem["msg"].removeprefix("Input should be ")
