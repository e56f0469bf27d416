"""Jobs without work: a stage that only leaves a number, a plan of it, and stores in which all of a plan is done.

Whatever process reads a step of such a plan imports this module, for the class of its parameters; that makes the stage
known there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence

from graftwork.pipeline.execution.run import Run
from graftwork.pipeline.execution.view import SilentView
from graftwork.pipeline.planning.plan import Plan, Step
from graftwork.pipeline.runs import record
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.manifest import Origin, canonical
from graftwork.specs.fields import Spec, keyed
from graftwork.specs.job import JobSpec
from graftwork.specs.resources import StepResources
from graftwork.stages.contract import Context
from graftwork.stages.registry import STAGES
from graftwork.stages.stage import Stage

NAME = "trivial"


class TrivialParams(Spec):
    """What the stage is told."""

    round: int  # for keys of its own
    seconds: float = 0.0  # that it holds its worker


def run(context: Context) -> None:
    params: TrivialParams = context.params
    time.sleep(params.seconds)
    name = "results.json" if context.step == "evaluate" else "figures.bin"
    (context.out / name).write_text(json.dumps({"trivial": {"round": float(params.round)}}))


STAGES[NAME] = Stage(version=1, steps=lambda job: (), module=__name__)


def chain_and_fan(job: JobSpec, each: int, warm: int, number: int) -> Plan:
    """`warm` steps that have all workers load what they need; a chain of `each` steps; as many side by side; the end.

    number: that of the round. Steps are named `warm/0000`, `chain/0000`, `fan/0000` and `evaluate`.
    """
    here, busy = TrivialParams(round=number), TrivialParams(round=number, seconds=1)
    first = [_step(f"warm/{index:04d}", busy, ()) for index in range(warm)]
    chain: list[Step] = []
    for index in range(each):
        chain.append(_step(f"chain/{index:04d}", here, chain[-1:] or first))
    fan = [_step(f"fan/{index:04d}", here, chain[-1:]) for index in range(each)]
    return Plan(job=job, steps=(*first, *chain, *fan, _step("evaluate", here, fan)))


def finish(plan: Plan) -> None:
    """Leave a store as a finished run leaves it, with artifacts of one small file."""
    store = Store(plan.job.store)
    for step in plan.steps:
        folder = store.workplace(step.key)
        (folder / "results.json").write_text('{"rootstock": {"distance": 1.0}}')
        origin = Origin(step=step.name, run="benchmark", seconds=1.0, made="")
        store.commit(step.key, folder, dict(step.identity), origin)
    run = Run(plan, SilentView())
    there = run.destination()
    run.record.status, run.record.mlflow_uri, run.record.mlflow_experiment = (
        "finished",
        there.recorded_uri,
        there.experiment,
    )
    run.record.results = {"rootstock": {"distance": 1.0}}
    record.save(store, run.record)


def _step(name: str, params: TrivialParams, needs: Sequence[Step]) -> Step:
    identity = {
        "stage": NAME,
        "name": name,
        "params": keyed(params),
        "outside": {},
        "needs": {needed.name: needed.key for needed in needs},
    }
    return Step(
        name=name,
        stage=NAME,
        params=params,
        needs={needed.name: needed.name for needed in needs},
        resources=StepResources(),
        identity=identity,
        key=hashlib.sha256(canonical(identity).encode()).hexdigest(),
    )
