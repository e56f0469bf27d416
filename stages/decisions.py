"""Which kernels the operators of a step ran on its GPUs, and why not a faster one: `kernels.json` of its artifact.

MLflow has it with the step's other files. A step on CPUs leaves none: there is nothing to decide.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graftwork.specs.resources import StepResources

DECIDED = "kernels.json"


@contextmanager
def decisions_in(folder: Path, resources: StepResources) -> Iterator[None]:
    """Write what is decided within this context, in this process and in those of its workers, a line an operator."""
    if not resources.gpu:
        yield
        return
    from graftwork.models.operators.kernels import DECISIONS  # torch

    DECISIONS.clear()
    yield
    if DECISIONS:
        ran = sorted(DECISIONS, key=lambda decision: (decision.operator, decision.kernel, decision.obstacle or ""))
        (folder / DECIDED).write_text(json.dumps([decision._asdict() for decision in ran], indent=1))
