"""What every section of a spec is made of: a frozen pydantic model that refuses unknown fields.

A spec serves two readers. A person writes it; the planner hashes it. Most of what a person may set changes the
result and so belongs in a step's key. What cannot change it (how often to checkpoint, how many samplers run side by
side) is marked `Unkeyed` where it is declared, and `keyed` leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError


class Spec(BaseModel):
    """A section of a spec: immutable, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


def refuse(path: Sequence[str | int], given: object, accepted: str) -> NoReturn:
    """Raise from a validator, naming the exact field below the one validated: "got `given`; accepted: `accepted`"."""
    # Braces would be read as a template by PydanticCustomError.
    error = PydanticCustomError("refused", "{accepted}", {"accepted": accepted})
    raise ValidationError.from_exception_data("spec", [InitErrorDetails(type=error, loc=tuple(path), input=given)])
