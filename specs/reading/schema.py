"""What may stand at each place of a job's document: which sections, of which kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from pydantic import BaseModel, Discriminator
from pydantic.fields import FieldInfo

from graftwork.specs.job import JobSpec

Section = type[BaseModel]


@dataclass(frozen=True)
class Place:
    """A place of the document: the sections that may stand there, and the field that it is; none for the job itself."""

    sections: tuple[Section, ...]
    field: FieldInfo | None = None

    @property
    def section(self) -> Section | None:
        """The section that stands there, if it can only be one."""
        return self.sections[0] if len(self.sections) == 1 else None

    def below(self, name: str) -> Place:
        """Return the place of a field of its section, or of the first of its sections that has such a field."""
        field = next((one.model_fields[name] for one in self.sections if name in one.model_fields), None)
        return Place(tuple(_sections_in(field.annotation)), field) if field is not None else Place(())

    def of_kind(self, kind: str | int) -> Place | None:
        """Return the place with the section of that kind alone, where there are several; None if none is of it."""
        section = next((one for one in self.sections if kind_of(one) == kind), None)
        return Place((section,), self.field) if section is not None and len(self.sections) > 1 else None

    @cached_property
    def default_kind(self) -> str | None:
        """The kind of the section that stands there where the document does not say."""
        if self.field is None:
            return None
        if self.section is not None:
            return kind_of(self.section)
        for part in _members_of(self.field.annotation):
            if isinstance(part, Discriminator) and callable(part.discriminator):
                return str(part.discriminator({}))
        return getattr(self.field.default, "kind", None)


JOB = Place((JobSpec,))


def place_at(path: Sequence[str]) -> Place:
    """Return the place at a path of the job's document; a list's index is a step of it, too."""
    place = JOB
    for step in path:
        if not step.isdecimal():
            place = place.below(step)
    return place


def kind_of(section: Section) -> str | None:
    """Return a section's kind."""
    field = section.model_fields.get("kind")
    return field.default if field else None


def _sections_in(annotation: Any) -> list[Section]:
    """Return the sections in a type, however deep."""
    return [part for part in _members_of(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]


def _members_of(annotation: Any) -> list[Any]:
    """Return a type and what it is made of, however deep, annotations included."""
    return [annotation, *(part for inner in get_args(annotation) for part in _members_of(inner))]
