"""What the work of a step is computed from, for the steps of a plan and for those behind artifacts."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from graftwork.pipeline.planning.plan import Plan
from graftwork.pipeline.store.manifest import Manifest
from graftwork.specs import params
from graftwork.specs.fields import Spec
from graftwork.stages.work import Known


def known_steps(plan: Plan) -> dict[str, Known]:
    """A plan's steps, by their keys."""
    keys = {step.name: step.key for step in plan.steps}
    return {
        step.key: Known(step.params, {role: keys[name] for role, name in step.needs.items()}, step.identity["outside"])
        for step in plan.steps
    }


PARAMS: dict[str, tuple[type[Spec], ...]] = {
    "features": (params.FeaturesParams,),
    "base": (params.BaseParams,),
    "classifier": (params.ClassifierParams,),
    "profile": (params.ProfileParams,),
    "distill": (params.DistillParams,),
    "search": (params.SearchParams,),
    "select": (params.SelectParams,),
    "finetune": (params.FinetuneParams,),
    "reference": (params.TrainingStatisticsParams, params.GivenStatisticsParams, params.HeldoutParams),
    "evaluate": (params.SampleParams, params.EvaluateParams),
}


# What an identity leaves out, since it cannot change a result, but a spec requires.
ELSEWHERE = {"reference": "elsewhere"}
LEFT_OUT = {"data": {"path": "elsewhere"}, "weights": {"path": "elsewhere"}, "recipe": ELSEWHERE}


def known_artifact(manifest: Manifest) -> Known | None:
    """The step that made an artifact; None where its identity is of another time, or makes no sense."""
    identity = manifest.identity
    try:
        told = {name: _as_given(part) for name, part in identity["params"].items()}
        needs = {role: str(key) for role, key in identity["needs"].items()}
        outside = dict(identity["outside"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    filled = {name: LEFT_OUT.get(name, {}) | part if isinstance(part, dict) else part for name, part in told.items()}
    for kind in PARAMS.get(str(identity.get("stage")), ()):
        for given in (told, filled, ELSEWHERE | filled):
            with suppress(ValidationError):
                return Known(kind.model_validate(given), needs, outside)
    return None


def _as_given(part: Any) -> Any:
    """An identity has every field; a spec refuses some beside others, whatever is in them."""
    if isinstance(part, list):
        return [_as_given(one) for one in part]
    if isinstance(part, dict) and part.get("kind") == "learned":
        shares = ("ratio", "count", "budget")
        beside = {"keep"} if any(part.get(name) is not None for name in shares) else set()
        beside |= {"groups"} if part.get("budget") is not None else set()
        return {name: one for name, one in part.items() if name not in beside}
    return {name: _as_given(one) for name, one in part.items()} if isinstance(part, dict) else part
