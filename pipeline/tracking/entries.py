"""The entries by which a run reports to MLflow; each can wait, and be delivered twice."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

MAX_METRICS = 500  # that MLflow is given at once; it takes at most 1000

EndStatus = Literal["FINISHED", "FAILED", "KILLED"]


class Document(BaseModel):
    """One entry. `run` is the name of a run of ours: the job's, a step's or a group's; `at` is in ms since 1970."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")


class Values(Document):
    """Single figures."""

    kind: Literal["values"] = "values"
    run: str
    at: int
    values: dict[str, float]


class Begin(Document):
    """A run begins or goes on; made where MLflow has none."""

    kind: Literal["begin"] = "begin"
    run: str
    parent: str | None
    at: int
    tags: dict[str, str] = {}
    params: dict[str, str] = {}
    values: Values | None = None  # that were known before MLflow heard of the run


class Reading(Document):
    """A point of a step's curves."""

    run: str
    done: int
    at: int
    metrics: dict[str, float]


class Readings(Document):
    """Points of curves, in the order in which they came."""

    kind: Literal["readings"] = "readings"
    readings: tuple[Reading, ...]


class Tags(Document):
    kind: Literal["tags"] = "tags"
    run: str
    tags: dict[str, str]


class File(Document):
    """A file of an artifact, which stays in the store until it is delivered."""

    kind: Literal["file"] = "file"
    run: str
    key: str
    name: str


class Json(Document):
    """A small document, as a file."""

    kind: Literal["json"] = "json"
    run: str
    name: str
    content: dict[str, Any]


class End(Document):
    kind: Literal["end"] = "end"
    run: str
    at: int
    status: EndStatus


class LateEnd(Document):
    """The end of a step whose driver died before reporting it; applied unless MLflow shows the run as FINISHED."""

    kind: Literal["unseen"] = "unseen"
    run: str
    ending: tuple[Values | File | End, ...]


AnyEntry = Begin | Readings | Values | Tags | File | Json | End | LateEnd
ENTRY: TypeAdapter[AnyEntry] = TypeAdapter(Annotated[AnyEntry, Field(discriminator="kind")])


def merged(first: AnyEntry, second: AnyEntry) -> AnyEntry | None:
    """Two entries that one request can hold as one: points that follow each other, a run and its figures."""
    if isinstance(first, Begin) and isinstance(second, Values) and first.run == second.run and first.values is None:
        return first.model_copy(update={"values": second})
    if not (isinstance(first, Readings) and isinstance(second, Readings)):
        return None
    both = first.readings + second.readings
    return Readings(readings=both) if sum(len(reading.metrics) for reading in both) <= MAX_METRICS else None
