"""Graftwork: try new architectures inside pretrained diffusion transformers.

The one import name: the calls for Python, and beside them, as links, the five packages that do the work. The calls load
when they are first asked for: a command needs few of them, and its help none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.models import load
    from graftwork.pipeline.api import compare, export, plan, resume, run, stop
    from graftwork.pipeline.doctor.doctor import doctor
    from graftwork.pipeline.execution.remote import submit
    from graftwork.pipeline.execution.run import RunFailed, RunStopped
    from graftwork.specs.job import JobSpec
    from graftwork.specs.problems import SpecError

__all__ = [
    "JobSpec", "RunFailed", "RunStopped", "SpecError", "compare", "doctor", "export", "load", "plan", "resume", "run",
    "stop", "submit",
]  # fmt: skip

_HOMES = {
    "doctor": "graftwork.pipeline.doctor.doctor",
    "load": "graftwork.models",
    "submit": "graftwork.pipeline.execution.remote",
    "JobSpec": "graftwork.specs.job",
    "RunFailed": "graftwork.pipeline.execution.run",
    "RunStopped": "graftwork.pipeline.execution.run",
    "SpecError": "graftwork.specs.problems",
} | dict.fromkeys(("compare", "export", "plan", "resume", "run", "stop"), "graftwork.pipeline.api")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
