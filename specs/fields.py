"""What every section of a spec is made of: a frozen pydantic model that refuses unknown fields.

A spec serves two readers. A person writes it; the planner hashes it. Most of what a person may set changes the
result and so belongs in a step's key. What cannot change it (how often to checkpoint, how many samplers run side by
side) is marked `Unkeyed` where it is declared, and `keyed` leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from graftwork.specs.masking import secret_in
from graftwork.specs.paths import UnknownInPath, expand, expand_absolute, expand_weights
from graftwork.specs.secrets import PLACEHOLDER_HINT

MAX_INTEGER = 2**63 - 1  # of an integer in a spec; the least is its negative
MAX_PATH_BYTES, MAX_NAME_BYTES = 4096, 255  # of a path, and of a name in it


class Spec(BaseModel):
    """A section of a spec: immutable, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = _fields(cls)
        return {name: _unconverted(value, fields[name]) if name in fields else value for name, value in values.items()}


class NotANumber:
    """Wraps a value that pydantic would coerce to a number (True, '4'), so that the field refuses it."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        try:
            return repr(self.value)
        except ValueError:  # of thousands of digits
            return "a number too large to be shown"

    @property
    def too_large(self) -> bool:
        """Whether it is a number that no field has room for."""
        return is_integer(self.value)


def wrap_large_integers(value: Any) -> Any:
    """Wrap integers beyond 64 bits in a document, so that validation refuses them with the value shown."""
    if isinstance(value, dict):
        return {name: wrap_large_integers(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [wrap_large_integers(part) for part in value]
    return NotANumber(value) if is_integer(value) and not -MAX_INTEGER <= value <= MAX_INTEGER else value


def _unconverted(value: Any, members: Sequence[Any]) -> Any:
    """`value`, with what would be taken for a number put out of pydantic's reach: `true` is not 1, nor is '4' 4.

    members: the types that it may be of. A string for a float stays: YAML 1.1 reads 1e-3 as one.
    """
    if isinstance(value, list | tuple):
        items = [part for member in members if get_origin(member) is tuple for part in get_args(member)]
        of_items = [member for part in items for member in _members(part)]
        return [_unconverted(item, of_items) for item in value] if items else value
    if isinstance(value, bool) and bool not in members and (int in members or float in members):
        return NotANumber(value)
    if isinstance(value, str) and str not in members and int in members:
        return NotANumber(value)
    return value


@cache
def _fields(section: type[BaseModel]) -> dict[str, list[Any]]:
    """The types that each field may be of."""
    return {name: _members(field.annotation) for name, field in section.model_fields.items()}


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


@dataclass(frozen=True)
class KeyedIfSet:
    """Marks a field that is in the key unless it is `unset`: jobs of before there was such a field keep their keys."""

    unset: Any = None

    def leaves_out(self, value: object) -> bool:
        return value == self.unset


def keyed(value: Any) -> Any:
    """The part of a spec that decides a result, as plain JSON values."""
    if isinstance(value, BaseModel):
        return {
            name: keyed(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if not any(isinstance(mark, Unkeyed) for mark in field.metadata)
            and not any(
                isinstance(mark, KeyedIfSet) and mark.leaves_out(getattr(value, name)) for mark in field.metadata
            )
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


def refuse(path: Sequence[str | int], value: object, accepted: str) -> NoReturn:
    """Raise from a validator, naming the exact field below the one validated: "got `value`; accepted: `accepted`"."""
    # Braces would be read as a template by PydanticCustomError.
    error = PydanticCustomError("refused", "{accepted}", {"accepted": accepted})
    raise ValidationError.from_exception_data("spec", [InitErrorDetails(type=error, loc=tuple(path), input=value)])


def _line(text: str) -> str:
    if not text.isprintable():
        refuse([], text, "printable characters on one line")
    return text


def _name_of_a_place(text: str) -> str:
    if len(text.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in text.split("/")):
        refuse([], text, f"at most {MAX_PATH_BYTES} bytes, and {MAX_NAME_BYTES} from one / to the next")
    return text


def _without_secret(text: str) -> str:
    if secret_in(text):
        refuse([], text, PLACEHOLDER_HINT if "://" in text else "no password and no token in it")
    return text


def _expanded_by(expansion: Callable[[str], str]) -> AfterValidator:
    def expanded(text: str) -> str:
        try:
            return expansion(text)
        except UnknownInPath as unknown:
            refuse([], text, str(unknown))

    return AfterValidator(expanded)


Line = Annotated[str, StringConstraints(min_length=1), AfterValidator(_line)]  # text of a line
_CHECKS = AfterValidator(_line), AfterValidator(_name_of_a_place), AfterValidator(_without_secret)
# Each with `~` and variables filled in when it is read; checked before, as it is written, and after.
Location = Annotated[Line, *_CHECKS, _expanded_by(expand), *_CHECKS]  # a path or URI
LocalPath = Annotated[Line, *_CHECKS, _expanded_by(expand_absolute), *_CHECKS]  # of a file or folder, made absolute
WeightsPath = Annotated[Line, *_CHECKS, _expanded_by(expand_weights), *_CHECKS]  # the same, or a hub id
