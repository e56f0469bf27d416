"""What a stage is to the planner: the steps that it has in a job, and how they are run.

A stage is one file in stages/catalog and its name in specs/resources.STAGES. The planner reads all of these files, so
they are light: neither torch nor Ray. What does the work may be in the same file or elsewhere, and loads when it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftwork.specs.fields import Spec
from graftwork.specs.resources import StepResources
from graftwork.specs.training import Precision

if TYPE_CHECKING:
    from graftwork.specs.data import Data
    from graftwork.specs.job import JobSpec
    from graftwork.stages.contract import Context, Portion

Needs = dict[str, str]  # role -> step


@dataclass(frozen=True)
class External:
    """A file or folder that a step reads from outside of the store; a fingerprint of it stands in the step's key."""

    role: str
    path: str
    field: str  # of the spec, that names it


@dataclass(frozen=True)
class Work:
    """FLOPs of a step, by formula."""

    own: float
    shared: float = 0.0  # of a pass that steps of its stage have in common
    activations: int = 0  # bytes that it keeps of that pass
    block: int = 0  # up to which that pass runs

    @property
    def total(self) -> float:
        return self.own + self.shared


@dataclass(frozen=True)
class StepDraft:
    """A step as its stage asks for it: it has no key yet."""

    name: str  # the stage's, or begins with that and a slash
    params: Spec  # what decides its result, and all that it sees of the job
    needs: Needs  # the steps whose artifacts it reads
    outside: Mapping[str, str] = field(default_factory=dict)  # what else its result depends on, by role
    external: tuple[External, ...] = ()  # whose fingerprints join that
    data: Data | None = None  # whose content joins that too, for the step that reads it
    work: Work | None = None  # None where there is no formula
    workers: int = 1  # that share the work
    precision: Precision = "fp32"  # of its products
    spreads: bool = False  # whether it spreads its work over whatever of the machine is free


@dataclass(frozen=True)
class Stage:
    """What the planner and the scheduler know of a stage."""

    version: int  # raise it when the stage's code changes what it makes: every artifact of it is then computed anew
    steps: Callable[[JobSpec], Iterable[StepDraft]]  # that a job has of it, each after those that it needs
    module: str  # that has its `run(context)`
    orchestrates: bool = False  # starts workers of its own and waits for them, so that its task takes no CPU
    trains: bool = False  # saves a checkpoint of a whole model when it is asked to stop
    makes_model: bool = False  # its artifact is a model folder, which can be exported
    foundation: bool = False  # all other stages rest on it: where it differs, a job is compared with none in the store
    # Of a stage whose steps have part of their work in common: in how many tasks that part is done before those of the
    # steps, given their parameters, what each takes and how many tasks find room; 0 if each task does it for its own.
    # The module then has a `record(portion)` too.
    shares: Callable[[Sequence[Any], StepResources, int], int] | None = None
    together: bool = False  # of those: whether none starts before all can, so that they share tasks
    memory: str = ""  # the setting to lower where its memory does not suffice

    def run(self, context: Context) -> None:
        """Do a step's work."""
        importlib.import_module(self.module).run(context)

    def record(self, portion: Portion) -> list[Any]:
        """Do a share of what steps have in common; what it returns for each is handed to that step's task."""
        recorded: list[Any] = importlib.import_module(self.module).record(portion)
        return recorded
