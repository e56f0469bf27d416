"""Checks of a machine, in a process that can be left behind. Knows nothing of Ray.

A check may crash its process (a library built for another CUDA) or never come back (a network drive that is gone). So
a child does them one after the other, `main`, and answers with a line each. A check whose child dies or takes too long
is broken by that; another child does those that are left.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import IO, Any, Literal, Self

from graftwork.cluster.session.imports import code_folders
from graftwork.cluster.session.orphans import end_with_parent
from graftwork.specs.problems import ACCEPTED, SpecError, plain, shortened
from graftwork.specs.secrets import redacted

State = Literal["fine", "warning", "broken"]
Value = float | str  # a figure, or a version

SECONDS = 10.0  # that a check has unless it says otherwise
MAX_TEXT = 600  # characters of what was seen


@dataclass(frozen=True)
class Check:
    """The finding of one check, its state, and the advice if it is not fine.

    values: the same for programs: figures by names that end in their unit, versions by the names of packages.
    """

    name: str
    state: State
    seen: str
    advice: str = ""
    values: Mapping[str, Value] = field(default_factory=dict)
    node: str = ""  # that it is of; empty for this machine, or for all of a cluster
    seconds: float = 0.0  # that it took

    def __post_init__(self) -> None:
        """Keep secrets, line ends and endless texts out, whatever a library said."""
        for name in ("seen", "advice"):
            text = shortened(plain(redacted(" ".join(getattr(self, name).split()))), MAX_TEXT)
            object.__setattr__(self, name, text)


def fine(name: str, finding: str, **values: Value) -> Check:
    return Check(name, "fine", finding, values=values)


def warning(name: str, finding: str, advice: str, **values: Value) -> Check:
    return Check(name, "warning", finding, advice, values)


def broken(name: str, finding: str, advice: str, **values: Value) -> Check:
    return Check(name, "broken", finding, advice, values)


def refused(name: str, line: str, state: State = "broken", otherwise: str = "mend that, and look again") -> Check:
    """Return the check that a line of a SpecError comes to: what is accepted is the advice.

    otherwise: the advice of a line that names nothing that is accepted.
    """
    finding, marked, accepted = line.rpartition(ACCEPTED)
    return Check(name, state, finding if marked else line, f"accepted: {accepted}" if marked else otherwise)


@dataclass(frozen=True)
class Probe:
    """A function that looks at something and returns Checks, and how long it may take.

    function: `module:name`. argument: what JSON can hold, for the function; None for one that takes nothing.
    advice: what to do if it crashes or hangs. late: how it is then if it hangs.
    """

    name: str
    function: str
    argument: Any = None
    seconds: float = SECONDS
    advice: str = "this is not expected: put it into a bug report"
    late: State = "broken"


def run_probes(probes: Sequence[Probe], seconds: float = math.inf) -> Iterator[Check]:
    """Yield what the probes say, in their order; those for which `seconds` do not suffice say that in a warning."""
    left, deadline = list(probes), time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        with _Child(left) as child:
            while left and (most := min(left[0].seconds, deadline - time.monotonic())) > 0:
                checks = child.answer(left[0], most)
                yield from checks
                left.pop(0)
                if child.is_gone:
                    break
    yield from map(_left_out, left)


def _left_out(probe: Probe) -> Check:
    return warning(probe.name, "not looked at: the time for all checks was over", "free the machine of other work")


def run_phases(phases: Sequence[Sequence[Sequence[Probe]]], seconds: float) -> Iterator[Check]:
    """Yield what chains of probes say as it comes: those of a phase run side by side, phases one after the other."""
    deadline = time.monotonic() + seconds
    for phase in phases:
        checks: queue.Queue[Check | None] = queue.Queue()

        def run(chain: Sequence[Probe], checks: queue.Queue[Check | None] = checks) -> None:
            try:
                for check in run_probes(chain, deadline - time.monotonic()):
                    checks.put(check)
            finally:
                checks.put(None)

        running = [threading.Thread(target=run, args=(chain,), daemon=True) for chain in phase]
        for thread in running:
            thread.start()
        ended = 0
        while ended < len(running):
            check = checks.get()
            if check is None:
                ended += 1
            else:
                yield check


class _Child:
    """A process that does probes one after the other."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.is_gone = False
        self._errors = _nameless_file()
        reading, writing = os.pipe()
        searched = [*code_folders(), *filter(None, [os.environ.get("PYTHONPATH")])]
        # -P: without the current folder, whose `torch.py` would be taken for torch.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "graftwork.cluster.checks.probes", str(writing), str(os.getpid())],
            pass_fds=[writing],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(searched)},
            start_new_session=True,
        )
        os.close(writing)
        self._answers = os.fdopen(reading, "rb", buffering=0)
        self._unread = b""
        with contextlib.suppress(BrokenPipeError):  # what it died of is told with the first answer
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps([asdict(probe) for probe in probes]).encode())
            self._process.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it is stuck in the kernel, and left behind
            self._process.wait(timeout=1)
        self._answers.close()
        self._errors.close()

    def answer(self, probe: Probe, seconds: float) -> list[Check]:
        """Return what the child says of its next probe, or, of one that it does not survive, that."""
        began = time.monotonic()
        line = self._line(seconds)
        if line is not None:
            return [Check(**check) for check in json.loads(line)]
        self.is_gone = True
        took = time.monotonic() - began
        if took >= seconds:
            if seconds < probe.seconds:  # it might have answered yet
                return [replace(_left_out(probe), seconds=took)]
            return [Check(probe.name, probe.late, f"no answer within {seconds:.0f} s", probe.advice, seconds=took)]
        return [replace(broken(probe.name, self._death(), probe.advice), seconds=took)]

    def _line(self, seconds: float) -> bytes | None:
        """Return the next line of the child's; None if it is gone, or none comes in time."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready or not (piece := self._answers.read(2**16)):
                return None
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _death(self) -> str:
        """Return what the child died of, with the last line that it wrote."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        code = self._process.returncode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return f"its process ended with {how}" + (f": {lines[-1]}" if lines else "")


def _nameless_file() -> IO[bytes]:
    """Return a file in memory, on Linux: a machine whose folder for temporary files is full has checks, too."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("graft"), "w+b")
    return tempfile.TemporaryFile()


def look(probe: Probe) -> list[Check]:
    """Return what a probe says, here and now; an error of its own is what is broken."""
    began = time.monotonic()
    try:
        module, _, name = probe.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        result = function() if probe.argument is None else function(probe.argument)
        checks = [result] if isinstance(result, Check) else _listed(result)
    except SpecError as error:
        checks = [refused(probe.name, line) for line in error.lines]
    except (Exception, SystemExit) as error:  # whatever a library raises
        text = str(error).strip().splitlines()
        checks = [broken(probe.name, f"{type(error).__name__}: {text[0] if text else 'no text'}", probe.advice)]
    took = round(time.monotonic() - began, 3)
    return [replace(check, seconds=took) for check in checks]


def _listed(checks: Iterable[Check]) -> list[Check]:
    return list(checks)


def main(answers: int, parent: int) -> None:
    """Do the probes that stdin has as JSON, and answer each with a line of Checks."""
    end_with_parent(parent)
    probes = [Probe(**probe) for probe in json.load(sys.stdin)]
    with os.fdopen(answers, "wb", buffering=0) as out:
        for probe in probes:
            checks = [asdict(check) for check in look(probe)]
            out.write(json.dumps(checks).encode() + b"\n")
    os._exit(0)  # threads that a probe left behind may never end


if __name__ == "__main__":
    from graftwork.cluster.checks import probes  # the module that checks import, whose Check is another than this one's

    probes.main(int(sys.argv[1]), int(sys.argv[2]))
