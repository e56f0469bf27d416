"""How steps become a job: plan, store, execute, track, and the command line."""

from pipeline.api import compare, export, plan, resume, run, stop
from pipeline.remote import submit
from pipeline.running import RunFailed, RunStopped
from specs.load import SpecError

__all__ = ["RunFailed", "RunStopped", "SpecError", "compare", "export", "plan", "resume", "run", "stop", "submit"]
