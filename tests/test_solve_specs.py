"""Specs of what is solved for: limits, what does not fit together, and what a limit changes of a plan's keys."""

from __future__ import annotations

from typing import Any

import pytest

from graftwork.pipeline.planning.limits import unreachable_limits
from graftwork.pipeline.planning.plan import make_plan
from graftwork.specs.job import JobSpec
from graftwork.specs.problems import SpecError
from graftwork.specs.reading.load import job_from
from graftwork.specs.solve import amount_of
from graftwork.stages.catalog.finetune import FinetuneParams

DOCUMENT: dict[str, Any] = {
    "name": "solved",
    "model": {"kind": "dit", "depth": 4, "width": 32, "heads": 2, "patch": 2},
    "graft": [
        {"target": "mha", "operator": {"kind": "hyena_x"}, "layers": {"kind": "solved"}},
        {"target": "mha", "operator": {"kind": "none"}, "layers": {"kind": "solved"}},
        {"target": "mlp", "operator": {"kind": "mlp", "ratio": 2}, "layers": {"kind": "solved"}},
        {"kind": "parallel", "pairs": "any", "layers": {"kind": "solved"}},
    ],
    "solve": {"limits": {"flops": "85%"}},
    "distill": {"samples": 64, "heldout": 64},
    "evaluate": {"samples": 40, "metrics": ["classifier"], "sampler": {"kind": "ddim", "steps": 4}},
}


def job(**sections: Any) -> JobSpec:
    return job_from({**DOCUMENT, **sections})


def refusal(**sections: Any) -> str:
    """What a job with these sections is refused for, in a line."""
    with pytest.raises(SpecError) as refused:
        job(**sections)
    (line,) = refused.value.lines
    return line


@pytest.mark.parametrize(
    ("cost", "given", "amount"),
    [
        ("flops", "75%", 75.0),
        ("flops", " 75.5 % ", 75.5),
        ("flops", "80G", 80e9),
        ("flops", "1.5e9", 1.5e9),
        ("flops", 12, 12.0),
        ("params", "500M", 500e6),
        ("params", "0.5B", 500e6),
        ("latency_ms", 31.0, 31.0),
        ("latency_ms", "120%", 120.0),
        ("peak_memory", "8GiB", 8 * 2**30),
        ("peak_memory", "500MB", 500e6),
    ],
)
def test_a_limit_is_a_share_of_the_rootstocks_or_an_amount(cost: Any, given: Any, amount: float) -> None:
    assert amount_of(cost, given, rootstock=100.0) == amount


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ({}, "solve.limits: got {}; accepted: a limit for at least one of flops, params, latency_ms, peak_memory"),
        ({"flops": "75 %%"}, "solve.limits.flops.max: got '75 %%'; accepted: a share"),
        ({"flops": "-5%"}, "solve.limits.flops.max: got '-5%'; accepted: a share"),
        ({"flops": "0%"}, "solve.limits.flops.max: got '0%'; accepted: more than 0"),
        ({"latency_ms": "31s"}, "solve.limits.latency_ms.max: got '31s'; accepted: a share"),
        ({"peak_memory": "lots"}, "solve.limits.peak_memory.max: got 'lots'; accepted: a share"),
        ({"flops": {"min": "90%", "max": "80%"}}, "solve.limits.flops.min: got '90%'; accepted: at most max, 80%"),
        ({"flops": {}}, "solve.limits.flops: got {}; accepted: min, max or both"),
        ({"flops": {"max": [1]}}, "solve.limits.flops.max: got [1]"),
        ({"flops": True}, "solve.limits.flops: got True"),
        ({"latency": "75%"}, "solve.limits.latency: unknown field"),
    ],
)
def test_a_limit_that_cannot_be_read_is_refused_in_a_line(limits: Any, line: str) -> None:
    assert line in refusal(solve={"limits": limits})


GRAFT: list[Any] = DOCUMENT["graft"]


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"solve": None}, "graft.0.layers.kind: got 'solved'; accepted: another strategy, or a section `solve`"),
        (
            {"graft": [{**GRAFT[0], "layers": {"kind": "all"}}]},
            "accepted: nothing, or edits whose layers are solved",
        ),
        ({"graft": [GRAFT[0], GRAFT[0]]}, "graft.1.operator: got 'hyena_x'; accepted: what graft.0 does not offer"),
        (
            {"graft": [GRAFT[0], {**GRAFT[1], "layers": {"kind": "first"}}]},
            "graft.1.layers: got '00.mha'; accepted: sites that graft.0 has not taken",
        ),
        (
            {"graft": [{**GRAFT[2], "layers": {"kind": "explicit", "blocks": [2]}}, GRAFT[3]]},
            "graft.1.pairs: got [1, 2]; accepted: pairs without block 2, which graft.0 edits",
        ),
        ({"graft": [{**GRAFT[3], "layers": None}]}, "graft.0.pairs: got 'any'; accepted: all or a list"),
        (
            {"graft": [{**GRAFT[0], "layers": {"kind": "solved", "blocks": [1, 4]}}]},
            "graft.0.layers.blocks: got 4; accepted: blocks of this model, 0 .. 3",
        ),
        (
            {"solve": {"limits": {"latency_ms": "75%"}}, "resources": {"cost": {"gpu": 1}}},
            "resources.cost.custom: got {}; accepted: the model of the GPU that latency_ms is of",
        ),
        (
            {"solve": {"limits": {"flops": "85%"}, "finalists": {"steps": 5, "by": "fid"}}},
            "solve.finalists.by: got 'fid'; accepted: a column of the job's metrics: distance, agreement",
        ),
        (
            {"solve": {"limits": {"flops": "85%"}, "plans": 9, "finalists": {"steps": 5}}},
            "solve.plans: got 9; accepted: at most 8",
        ),
        (
            {"evaluate": {**DOCUMENT["evaluate"], "rows": ["finalist1"]}},
            "evaluate.rows.0: got 'finalist1'; accepted: a row of a model that the job makes: no finalist",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_in_a_line(sections: dict[str, Any], line: str) -> None:
    assert line in refusal(**sections)


def test_operators_of_one_site_are_its_options_and_steps_of_their_own() -> None:
    names = [edit.name for edit in job().edits()]
    assert names[:3] == ["00.mha", "00.mha.1", "00.mlp"] and names[-3:] == ["00.pair", "01.pair", "02.pair"]
    steps = {step.name for step in make_plan(job()).steps}
    assert {f"{stage}/{name}" for stage in ("distill", "score") for name in names} <= steps


def keys(made: JobSpec) -> dict[str, str]:
    return {step.name: step.key for step in make_plan(made).steps}


def test_another_limit_solves_again_and_computes_no_score_and_no_cost_again() -> None:
    before, after = keys(job()), keys(job(solve={"limits": {"flops": "80%"}, "plans": 2}))
    changed = {name for name in before if before[name] != after[name]}
    assert {"select", "trial", "finetune", "evaluate/stage1"} <= changed
    assert not [name for name in changed if name.startswith(("score", "cost", "distill", "base", "evaluate/rootstock"))]


def test_the_versions_of_kernels_are_in_the_key_of_what_goes_by_latency_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    by_latency = {"limits": {"latency_ms": "75%"}}
    before = keys(job()), keys(job(solve=by_latency))
    from graftwork.stages.catalog import cost

    monkeypatch.setattr(cost, "versions", lambda: {"torch": "another"})
    after = keys(job()), keys(job(solve=by_latency))
    assert [one["cost"] != other["cost"] for one, other in zip(before, after, strict=True)] == [True, True]
    assert [one["select"] != other["select"] for one, other in zip(before, after, strict=True)] == [False, True]


def test_the_device_that_a_job_names_is_in_the_key_of_its_costs() -> None:
    gpus = [{"cost": {"gpu": 1, "custom": {f"accelerator_type:{name}": 0.001}}} for name in ("H100", "A100")]
    found = {keys(job(resources=resources))["cost"] for resources in ({}, *gpus)}
    assert len(found) == 3


def test_finalists_are_rows_between_the_plans_and_the_finetune() -> None:
    made = job(solve={"limits": {"flops": "85%"}, "plans": 2, "finalists": {"steps": 5}})
    plan = make_plan(made)
    order = [step.name for step in plan.steps]
    assert plan["finetune"].needs["select"] == plan["evaluate/stage1"].needs["select"] == "select/finalist"
    assert order.index("evaluate/finalist2") < order.index("select/finalist") < order.index("finetune")
    params = plan["finetune/finalist2"].params
    assert isinstance(params, FinetuneParams) and params.plan == 1 and params.recipe.steps == 5
    assert {*made.rows()} == {"rootstock", "finalist1", "finalist2", "stage1", "stage2", "random_init"}


def test_finalists_are_sampled_whatever_rows_are_chosen() -> None:
    evaluate = {**DOCUMENT["evaluate"], "rows": ["rootstock", "stage2", "finalist2"]}
    made = job(evaluate=evaluate, solve={"limits": {"flops": "85%"}, "plans": 2, "finalists": {"steps": 5}})
    assert {*made.rows()} == {"rootstock", "stage2", "finalist1", "finalist2"}
    assert {"evaluate/finalist1", "evaluate/finalist2"} <= keys(made).keys()


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ({"flops": "10%"}, "solve.limits.flops.max: got 10%; accepted: what these edits can reach"),
        ({"params": {"min": "300%"}}, "solve.limits.params.min: got 300%; accepted: what these edits can reach"),
        ({"flops": {"min": "85%", "max": "85.001%"}}, "which no choice meets; accepted: limits within flops"),
        ({"flops": "60%", "params": {"min": "99%"}}, "which no choice meets; accepted: limits within flops"),
    ],
)
def test_limits_that_nothing_meets_are_told_before_anything_runs(limits: Any, line: str) -> None:
    (found,) = unreachable_limits(job(solve={"limits": limits}))
    assert line in found


def test_limits_that_something_meets_are_not() -> None:
    assert not unreachable_limits(job()) and not unreachable_limits(job(solve={"limits": {"flops": "100%"}}))
