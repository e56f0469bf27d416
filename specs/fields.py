"""What every section of a spec is made of: a frozen pydantic model that refuses unknown fields.

A spec serves two readers. A person writes it; the planner hashes it. Most of what a person may set changes the
result and so belongs in a step's key. What cannot change it (how often to checkpoint, how many samplers run side by
side) is marked `Unkeyed` where it is declared, and `keyed` leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


class Spec(BaseModel):
    """A section of a spec: immutable, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = cls.model_fields
        return {
            name: _unconverted(value, [fields[name].annotation]) if name in fields else value
            for name, value in given.items()
        }


class _NoNumber:
    """What stands for a value that pydantic would convert to a number: it is refused, and reads as what was given."""

    def __init__(self, given: object) -> None:
        self.given = given

    def __repr__(self) -> str:
        return repr(self.given)


def _unconverted(value: Any, types: Sequence[Any]) -> Any:
    """`value`, with what would be taken for a number put out of pydantic's reach: `true` is not 1, nor is '4' 4.

    A string for a float stays: YAML 1.1 reads 1e-3 as one.
    """
    members = [member for one in types for member in _members(one)]
    if isinstance(value, list | tuple):
        items = [part for member in members if get_origin(member) is tuple for part in get_args(member)]
        return [_unconverted(item, items) for item in value] if items else value
    if isinstance(value, bool) and bool not in members and (int in members or float in members):
        return _NoNumber(value)
    if isinstance(value, str) and str not in members and int in members:
        return _NoNumber(value)
    return value


def _members(annotation: Any) -> list[Any]:
    """The types that a union is of, or a literal's values; of another type, itself."""
    if get_origin(annotation) is Literal:
        return [type(value) for value in get_args(annotation)]
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


@dataclass(frozen=True)
class Unkeyed:
    """Marks a field that cannot change a result: `Annotated[int, Unkeyed()]`."""


def keyed(value: Any) -> Any:
    """The part of a spec that decides a result, as plain JSON values."""
    if isinstance(value, BaseModel):
        return {
            name: keyed(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if not any(isinstance(mark, Unkeyed) for mark in field.metadata)
        }
    if isinstance(value, Mapping):
        return {str(name): keyed(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [keyed(item) for item in value]
    return value


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def are_integers(value: object) -> bool:
    """Whether it is a list of integers."""
    return isinstance(value, list | tuple) and all(map(is_integer, value))


def refuse(path: Sequence[str | int], given: object, accepted: str) -> NoReturn:
    """Raise from a validator, naming the exact field below the one validated: "got `given`; accepted: `accepted`"."""
    # Braces would be read as a template by PydanticCustomError.
    error = PydanticCustomError("refused", "{accepted}", {"accepted": accepted})
    raise ValidationError.from_exception_data("spec", [InitErrorDetails(type=error, loc=tuple(path), input=given)])
