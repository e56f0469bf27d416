"""How steps become a job: plan, store, execute, track, and the command line."""

from pipeline.api import RunFailed, compare, export, plan, resume, run
from pipeline.remote import submit
from specs.load import SpecError

__all__ = ["RunFailed", "SpecError", "compare", "export", "plan", "resume", "run", "submit"]
