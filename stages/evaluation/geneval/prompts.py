"""GenEval's prompts: the lines of its `evaluation_metadata.jsonl`, checked against a vocabulary."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from graftwork.specs.fields import Line, Spec, refuse
from graftwork.specs.problems import first_few
from graftwork.stages.evaluation.geneval.files import read_jsonl
from graftwork.stages.evaluation.geneval.vocabulary import GENEVAL, Relation, Tag, Vocabulary

MAX_NAMED_WORDS = 12  # of a vocabulary, in an error

Count = Annotated[int, Field(ge=1, strict=True)]
Index = Annotated[int, Field(ge=0, strict=True)]


class ObjectCount(Spec):
    """A class of objects and a number of them: at least so many if included, too many if excluded."""

    class_name: str = Field(alias="class")
    count: Count

    @field_validator("class_name")
    @classmethod
    def _is_in_the_vocabulary(cls, name: str, info: ValidationInfo) -> str:
        return _known(name, info.context.classes) if info.context else name


class Requirement(ObjectCount):
    """Objects that an image must show, with the colour of each, or where each is from those of an earlier requirement.

    position: a relation, and the index of that requirement in the prompt's `include`.
    """

    colour: str | None = Field(None, alias="color")
    position: tuple[Relation, Index] | None = None

    @field_validator("colour")
    @classmethod
    def _is_a_colour(cls, colour: str | None, info: ValidationInfo) -> str | None:
        return _known(colour, info.context.colours) if info.context and colour is not None else colour


class Prompt(Spec):
    """A prompt, and what an image of it must and must not show."""

    tag: Tag
    include: tuple[Requirement, ...] = Field(min_length=1)
    exclude: tuple[ObjectCount, ...] = ()
    prompt: Line

    @model_validator(mode="after")
    def _positions_are_from_earlier_objects(self) -> Self:
        for index, requirement in enumerate(self.include):
            if requirement.position is not None and requirement.position[1] >= index:
                accepted = f"an earlier index, at most {index - 1}" if index else "no position for the first object"
                refuse(["include", index, "position", 1], requirement.position[1], accepted)
        return self

    def document(self) -> dict[str, Any]:
        """Return the JSON object of its line, with the fields in the published order."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)


def read_prompts(file: Path, vocabulary: Vocabulary = GENEVAL) -> list[Prompt]:
    """Return the prompts of a file, one a line.

    Raise SpecError with a line for each problem: FILE:LINE: field: got X; accepted: Y.
    """
    return read_jsonl(file, Prompt, vocabulary)


def _known(word: str, words: Sequence[str]) -> str:
    """Return the word; refuse it, with the nearest one, if it is not among the words."""
    if word not in words:
        near = [other for other in words if word and word in other] or difflib.get_close_matches(word, words, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        refuse([], word, first_few(words, MAX_NAMED_WORDS) + hint)
    return word
