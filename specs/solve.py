"""What a choice by measurement goes by: how candidates are scored, and what the model that comes of it may cost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter, ValidationError, model_validator

from graftwork.specs.fields import KeyedIfSet, Spec, Unkeyed, refuse
from graftwork.specs.training import Precision

CostName = Literal["flops", "params", "latency_ms", "peak_memory"]
MEASURED: tuple[CostName, ...] = ("latency_ms", "peak_memory")  # the others come by formula
ScoredError = Literal["output", "loss"]
MAX_FINALISTS = 8
SHARE = re.compile(r"(\d+(?:\.\d*)?)\s*%")
AMOUNT = re.compile(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*([KMGBTP]?)", re.IGNORECASE)
THOUSANDS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15}
FORMS: dict[CostName, str] = {
    "flops": "a share of the rootstock's as in 75%, or FLOPs of a pass of one sample as in 80G",
    "params": "a share of the rootstock's as in 75%, or a number of parameters as in 500M",
    "latency_ms": "a share of the rootstock's as in 75%, or milliseconds as in 31.0",
    "peak_memory": "a share of the rootstock's as in 75%, or bytes as in 8GiB",
}


class ScoreSpec(Spec):
    """What candidates are scored on: held-out latents, each at timesteps and with noise that all candidates share."""

    samples: int = Field(128, ge=1, description="held-out samples, or all there are")
    draws: int = Field(1, ge=1, description="timesteps drawn a sample")
    batch: Annotated[int, Unkeyed()] = Field(
        64, ge=1, description="samples that pass at once; sums may differ in their last bits"
    )
    precision: Precision = Field("fp32", description="of the passes. On a CPU tf32 is fp32")


def _number_or_text(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        refuse([], value, "a share of the rootstock's as in 75%, or an amount")
    return value


Amount = Annotated[float | str, Field(union_mode="left_to_right"), BeforeValidator(_number_or_text, float | str)]


class Limit(Spec):
    """What a cost of the whole model may come to: shares of the rootstock's, or absolute."""

    min: Amount | None = None
    max: Amount | None = None

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min is None and self.max is None:
            refuse([], {}, "min, max or both")
        return self

    def bounds(self, cost: CostName, rootstock: float) -> tuple[float | None, float | None]:
        """Return least and most of the whole model. Raise ValueError for what is no share and no amount."""
        least, most = (None if given is None else amount_of(cost, given, rootstock) for given in (self.min, self.max))
        return least, most


def amount_of(cost: CostName, amount: float | str, rootstock: float) -> float:
    """Return a cost given as a share of the rootstock's, as "75%", or as an amount. Raise ValueError for others."""
    text = str(amount).strip()
    if match := SHARE.fullmatch(text):
        return float(match[1]) / 100 * rootstock
    if cost == "peak_memory":
        try:
            return float(TypeAdapter(ByteSize).validate_python(amount))
        except ValidationError:
            raise ValueError(FORMS[cost]) from None
    match = AMOUNT.fullmatch(text)
    if match is None or (cost == "latency_ms" and match[2]):
        raise ValueError(FORMS[cost])
    return float(match[1]) * THOUSANDS[match[2].upper()]


def _as_limit(value: Any) -> Any:
    """Return a bare amount as the most that there may be."""
    bare = isinstance(value, str | int | float) and not isinstance(value, bool)
    return {"max": value} if bare else value


AnyLimit = Annotated[Limit | None, BeforeValidator(_as_limit, json_schema_input_type=Limit | float | str | None)]


class Limits(Spec):
    """What the whole model may cost, all of it together; a bare amount is a most, and `min` and `max` say both."""

    flops: AnyLimit = Field(None, description=f"of a pass of one sample: {FORMS['flops']}")
    params: AnyLimit = Field(None, description=FORMS["params"])
    latency_ms: AnyLimit = Field(None, description=f"of a pass of evaluate.batch samples: {FORMS['latency_ms']}")
    peak_memory: AnyLimit = Field(None, description=f"of a pass of evaluate.batch samples: {FORMS['peak_memory']}")

    @model_validator(mode="after")
    def _readable(self) -> Self:
        for cost, limit in self.by_cost().items():
            for end in ("min", "max"):
                amount = getattr(limit, end)
                try:
                    value = 1.0 if amount is None else amount_of(cost, amount, rootstock=1.0)
                except ValueError as error:
                    refuse([cost, end], amount, str(error))
                if value <= 0:
                    refuse([cost, end], amount, f"more than 0: {FORMS[cost]}")
            least, most = limit.bounds(cost, rootstock=1.0)
            if least is not None and most is not None and is_share(limit.min) == is_share(limit.max) and least > most:
                refuse([cost, "min"], limit.min, f"at most max, {limit.max}")
        if not self.by_cost():
            refuse([], {}, f"a limit for at least one of {', '.join(get_args(CostName))}")
        return self

    def by_cost(self) -> dict[CostName, Limit]:
        """Return the limits that are given."""
        limits: dict[CostName, Limit | None] = {cost: getattr(self, cost) for cost in get_args(CostName)}
        return {cost: limit for cost, limit in limits.items() if limit is not None}

    def measured(self) -> list[CostName]:
        """Return the limited costs that are measured on a device."""
        return [cost for cost in self.by_cost() if cost in MEASURED]


def is_share(amount: float | str | None) -> bool:
    """Whether it is a share of the rootstock's cost."""
    return isinstance(amount, str) and SHARE.fullmatch(amount.strip()) is not None


class FinalistsSpec(Spec):
    """The plans that are tried by a short finetune each; the best of them is finetuned in full."""

    steps: int = Field(ge=1, description="of each short finetune, which is else as `finetune` says")
    by: str | None = Field(
        None, description="the column of the table that decides; by default the first one of evaluate.metrics"
    )


class SolveSpec(Spec):
    """Choose what all sites of the edits whose layers are `solved` hold: the least sum of scores within the limits."""

    error: ScoredError = Field(
        "output", description="what adds up: the error at the model's output, or the change of the diffusion loss"
    )
    limits: Limits
    plans: int = Field(4, ge=1, le=64, description="solutions, of which the best is made; the others are measured")
    apart: int = Field(2, ge=1, description="sites in which any two of them differ, at least")
    given: Literal["none", "greedy"] = Field(
        "none",
        description="none: candidates are scored alone; greedy: one site after another, and those that are left are "
        "scored again beside what was chosen, which sees what sites do to each other",
    )
    finalists: Annotated[FinalistsSpec | None, KeyedIfSet()] = Field(
        None, description="finetune all plans shortly, and go on with the best; by default with the least error"
    )

    @model_validator(mode="after")
    def _few_finalists(self) -> Self:
        if self.finalists is not None and self.plans > MAX_FINALISTS:
            refuse(["plans"], self.plans, f"at most {MAX_FINALISTS} where each is finetuned")
        if self.finalists is not None and self.plans < 2:
            refuse(["plans"], self.plans, "2 or more, where the best of them is to be found by finetuning")
        return self


def described(limits: Limits) -> str:
    """Return the limits in a line, as `flops at most 75%, peak_memory at least 1GiB`."""
    return ", ".join(_described(limits.by_cost()))


def _described(limits: Mapping[CostName, Limit]) -> Iterator[str]:
    for cost, limit in limits.items():
        for end, word in (("min", "at least"), ("max", "at most")):
            amount = getattr(limit, end)
            if amount is not None:
                yield f"{cost} {word} {amount}"
