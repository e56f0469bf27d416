"""How steps become a job: plan, store, execute, track, and the command line.

The calls for Python load when they are first asked for: a command needs few of them, and its help none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import compare, export, plan, resume, run, stop
    from pipeline.remote import submit
    from pipeline.running import RunFailed, RunStopped
    from specs.load import SpecError

__all__ = ["RunFailed", "RunStopped", "SpecError", "compare", "export", "plan", "resume", "run", "stop", "submit"]

_HOMES = {"submit": "pipeline.remote", "RunFailed": "pipeline.running", "RunStopped": "pipeline.running"}
_HOMES |= {"SpecError": "specs.problems"} | dict.fromkeys(
    ("compare", "export", "plan", "resume", "run", "stop"), "pipeline.api"
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
