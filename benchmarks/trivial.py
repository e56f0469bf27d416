"""A stage that only leaves a number, and a plan of it: for what a step costs beside its work.

Whatever process reads a step of such a plan imports this module, for the class of its parameters; that makes the stage
known there.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence

from pipeline.planning import Plan, Step
from pipeline.store import canonical
from specs.fields import Spec, keyed
from specs.job import JobSpec, StepResources
from stages import STAGES, Context, Stage

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


STAGES[NAME] = Stage(version=1)
sys.modules[f"stages.{NAME}"] = sys.modules[__name__]


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


def _step(name: str, params: TrivialParams, needs: Sequence[Step]) -> Step:
    identity = {
        "stage": NAME,
        "name": name,
        "params": keyed(params),
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
