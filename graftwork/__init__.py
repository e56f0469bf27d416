"""Graftwork: try new architectures inside pretrained diffusion transformers.

    plan(job)                 what a job comes to, step by step; nothing runs
    run(job)                  compute what the store lacks; returns the record of the run
    resume(run), stop(run)    go on with a run; have its driver save and stop
    compare(runs)             a row a run, as dicts; table(runs): as a pandas DataFrame
    images(run/row, folder)   a row's samples in GenEval's folders; geneval(results): what its own scorer found in them
    score(samples, reference) FID and others of anybody's samples
    export(run, folder)       the graft for others; load(folder): a model from a folder, a file or a hub id
    submit(job, address)      run a job on a Ray cluster elsewhere
    doctor(job)               what is wrong with this machine, or a cluster

A job is a JobSpec or the path of a YAML file. Errors: SpecError (a request that cannot be carried out, a line a
problem), RunFailed, RunStopped, UnfitCheckpoint. The logger `graftwork` says what a run does.

This is the one import name; beside it lie, as links, the five packages that do the work. A call loads when it is first
asked for: a command needs few of them, and its help none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.models import load
    from graftwork.models.checkpoints.errors import UnfitCheckpoint
    from graftwork.pipeline.api import compare, export, geneval, images, plan, resume, run, score, stop, table
    from graftwork.pipeline.doctor.doctor import doctor
    from graftwork.pipeline.execution.remote import submit
    from graftwork.pipeline.execution.run import RunFailed, RunStopped
    from graftwork.specs.job import JobSpec
    from graftwork.specs.problems import SpecError

__version__ = "0.1.0"
__all__ = [
    "JobSpec", "RunFailed", "RunStopped", "SpecError", "UnfitCheckpoint", "__version__", "compare", "doctor", "export",
    "geneval", "images", "load", "plan", "resume", "run", "score", "stop", "submit", "table",
]  # fmt: skip

_HOMES = {
    "doctor": "graftwork.pipeline.doctor.doctor",
    "load": "graftwork.models",
    "submit": "graftwork.pipeline.execution.remote",
    "JobSpec": "graftwork.specs.job",
    "RunFailed": "graftwork.pipeline.execution.run",
    "RunStopped": "graftwork.pipeline.execution.run",
    "SpecError": "graftwork.specs.problems",
    "UnfitCheckpoint": "graftwork.models.checkpoints.errors",
} | dict.fromkeys(
    ("compare", "export", "geneval", "images", "plan", "resume", "run", "score", "stop", "table"),
    "graftwork.pipeline.api",
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
