"""The sections behind a field's annotation, and the kind that each section has."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in a type, however deep."""
    return [part for part in members_of(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]


def members_of(annotation: Any) -> list[Any]:
    """A type and what it is made of, however deep, annotations included."""
    return [annotation, *(part for inner in get_args(annotation) for part in members_of(inner))]


def kind_of(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return field.default if field else None
