"""What the engine itself costs: help, imports, a run that finds everything done, a long plan, a step beside its work.

    python -m benchmarks.engine [--rounds 5] [--steps 300] [--json FILE]

Wall and processor seconds, medians over the rounds; on a machine that is busy with other things the processor's are the
telling ones. The floor of a command is an empty Python process; of a plan, reading as many small files; of a step, a
bare Ray task. Steps are of a stage that leaves one small file: their leases, commits, record and MLflow database are
those of any job. A chain's steps wait for each other, a fan's run side by side; "alone" is without record and MLflow.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray

from benchmarks import report
from benchmarks.command_line import parser
from benchmarks.trivial import chain_and_fan, finish
from benchmarks.watching import Unwatched
from graftwork.cluster.machine import num_cpus
from graftwork.cluster.session import runtime
from graftwork.pipeline.execution.run import Run
from graftwork.pipeline.execution.scheduler import Execution
from graftwork.pipeline.execution.task import StepResult
from graftwork.pipeline.execution.view import SilentView
from graftwork.pipeline.planning import plan as planning
from graftwork.pipeline.planning import preflight
from graftwork.pipeline.store import leases
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.leases import Lease, LeaseOwner
from graftwork.pipeline.store.manifest import Origin
from graftwork.specs.job import JobSpec
from graftwork.specs.reading.load import load

JOB = Path(__file__).parents[1] / "examples" / "digits.yaml"
ALL = "layers: {kind: all}"
EVERY_SITE = f"graft=[{{target: mha, operator: {{kind: swa}}, {ALL}}}, {{target: mlp, operator: {{kind: mlp}}, {ALL}}}]"
SHAPE = "model={kind: dit, depth: %d, width: 64, heads: 4, patch: 2}"
THIRTY_STEPS = (SHAPE % 9, EVERY_SITE)
OPERATORS = "{kind: learned, budget: 0.9, operators: [{kind: hyena_x}, {kind: hyena_se}, {kind: swa}]}"
THOUSAND_STEPS = (SHAPE % 256, f"graft=[{{target: mha, operator: {{kind: hyena_y}}, layers: {OPERATORS}}}]")
OVERHEAD_AIM = 0.020  # seconds a step, over a bare Ray task


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock and of the processor, from some moment on."""

    wall: float
    cpu: float

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)

    def each(self, number: int) -> Spent:
        return Spent(self.wall / number, self.cpu / number)


def now() -> Spent:
    """The clock, and what this process and all that it started have used so far."""
    cpu, me = 0.0, psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            cpu += times.user + times.system
    return Spent(time.perf_counter(), cpu)


def middle(spent: Sequence[Spent]) -> Spent:
    return Spent(statistics.median(one.wall for one in spent), statistics.median(one.cpu for one in spent))


def row(what: str, found: Sequence[Spent], floors: Sequence[Spent], aim: float, floor: str) -> dict[str, Any]:
    ours, least = middle(found), middle(floors)
    told = {"what": what, "wall s": ours.wall, "cpu s": ours.cpu, "aim s": aim, "floor": floor}
    return told | {"floor wall s": least.wall, "floor cpu s": least.cpu}


# -- commands


def process(command: Sequence[str]) -> Spent:
    began = time.perf_counter()
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(running.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}")
    return Spent(time.perf_counter() - began, used.ru_utime + used.ru_stime)


def commands(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """`graft` as a process of its own, each time."""
    graft, python = str(Path(sys.executable).with_name("graft")), sys.executable
    settings = (*THIRTY_STEPS, f"store={folder / 'thirty'}")
    made = planning.make_plan(load(JOB, settings))
    finish(made)
    overriding = [word for setting in settings for word in ("--set", setting)]
    asked = {
        "import graftwork.specs.reading.load": ([python, "-c", "import graftwork.specs.reading.load"], 0.3),
        "graft --help": ([graft, "--help"], 0.3),
        f"graft run, {len(made.steps)} steps, all cached": ([graft, "run", str(JOB), *overriding], 0.6),
    }
    spent: dict[str, list[Spent]] = {name: [] for name in ("", *asked)}
    for _ in range(rounds):
        spent[""].append(process([python, "-c", "pass"]))
        for name, (command, _) in asked.items():
            spent[name].append(process(command))
    return [row(name, spent[name], spent[""], aim, "empty python") for name, (_, aim) in asked.items()]


# -- a long plan


def long_plan(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """From a job to the state of each of its steps, in this process, with everything in the store."""
    job = load(JOB, (*THOUSAND_STEPS, f"store={folder / 'thousand'}"))
    made = planning.make_plan(job)
    finish(made)
    store = Store(job.store)
    files = [store.root / "artifacts" / step.key / "manifest.json" for step in made.steps]

    def all_of_it() -> None:
        preflight.check(job)
        if set(planning.make_plan(job).states(store).values()) != {"cached"}:
            raise RuntimeError("the store has not all of the plan")

    def read() -> None:
        for file in files:
            Path(file).read_bytes()

    found = [(spent_by(all_of_it), spent_by(read)) for _ in range(rounds)]
    ours, floor = zip(*found, strict=True)
    return [row(f"a plan of {len(made.steps):,} steps, all cached", ours, floor, 1.0, "reading its manifests")]


def spent_by(work: Callable[[], object]) -> Spent:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


# -- a step beside its work


class Marks(Unwatched, SilentView):
    """Notes when the last of a plan's warm steps, of its chain and of all its steps ended."""

    def __init__(self, each: int) -> None:
        self.last = f"chain/{each - 1:04d}"
        self.first = "chain/0000"
        self.marks: dict[str, Spent] = {}

    def change(self, step: str, state: str, note: str = "", seconds: float = 0.0) -> None:
        if state == "done" and step in (self.first, self.last, "evaluate"):
            self.marks[step] = now()

    def found(self, each: int) -> tuple[Spent, Spent]:
        """What a step of the chain took, and one of the fan."""
        first, last, end = (self.marks[name] for name in (self.first, self.last, "evaluate"))
        return (last - first).each(each - 1), (end - last).each(each + 1)

    # -- of a watcher

    def ended(self, step: str, result: StepResult) -> None:
        self.change(step, "done")


@ray.remote
def nothing(*_: object) -> None:
    """The least that Ray can be asked to do."""


def bare_tasks(each: int) -> tuple[Spent, Spent]:
    """What a task of a chain takes, and one of a fan."""
    ray.get([nothing.remote() for _ in range(each)])
    began = now()
    last = nothing.remote()
    for _ in range(each - 1):
        last = nothing.remote(last)
    ray.get(last)
    half = now()
    ray.get([nothing.remote(last) for _ in range(each)])
    return (half - began).each(each), (now() - half).each(each)


def alone(job: JobSpec, each: int, number: int) -> tuple[Spent, Spent]:
    """The execution of a plan: leases, commits, the board; within a session."""
    marks = Marks(each)
    plan = chain_and_fan(job, each, num_cpus(), number)
    if Execution(plan, Store(job.store), "benchmark", None, marks).go():
        raise RuntimeError("a step failed")
    return marks.found(each)


def whole(job: JobSpec, each: int, number: int) -> tuple[tuple[Spent, Spent], float]:
    """A whole run, with its record and MLflow; and the seconds from its last step's end to its own."""
    marks = Marks(each)
    Run(chain_and_fan(job, each, num_cpus(), number), marks).go()
    return marks.found(each), time.perf_counter() - marks.marks["evaluate"].wall


def steps(folder: Path, rounds: int, count: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    job, each = load(JOB, [f"store={folder / 'steps'}"]), count // 2
    bare, ours, runs, ends = [], [], [], []
    with runtime.session((), min_parallel=1):
        for number in range(rounds):
            bare.append(bare_tasks(each))
            ours.append(alone(job, each, number))
    for number in range(rounds, 2 * rounds):
        spent, end = whole(job, each, number)
        runs.append(spent)
        ends.append(end)
    rows = []
    for place, kind in enumerate(("chain", "fan")):
        floors = [one[place] for one in bare]
        aim = middle(floors).wall + OVERHEAD_AIM
        for name, found in (("alone", ours), ("in a run", runs)):
            mine = [one[place] for one in found]
            rows.append(row(f"a step of a {kind}, {name}", mine, floors, aim, "bare Ray task"))
    commits = [spent_by(partial(commit, Store(job.store), number)) for number in range(rounds * 20)]
    return rows, {
        "steps": 2 * each,
        "lease and commit, in one process": f"{middle(commits).wall:.2g} s, {middle(commits).cpu:.2g} s of processor",
        "from the last step's end to the run's": f"{statistics.median(ends):.3g} s",
    }


def commit(store: Store, number: int) -> None:
    """What the store is asked to do for a step."""
    key = f"{number:064x}"
    taken = leases.take(store, key, LeaseOwner.me("benchmark", key))
    assert isinstance(taken, Lease)
    with leases.releasing(taken):
        folder = store.workplace(key)
        (folder / "figures.bin").write_bytes(b"1")
        store.commit(key, folder, {}, Origin(step="commit", run="benchmark", seconds=0.0, made=""))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=300, help="half of them in a chain, half side by side")
    arguments.add_argument("--without-steps", action="store_true", help="do not start Ray")
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = commands(folder, chosen.rounds) + long_plan(folder, chosen.rounds)
        facts: dict[str, Any] = {"rounds": chosen.rounds, "load": os.getloadavg()[0]}
        if not chosen.without_steps:
            more, found = steps(folder, chosen.rounds, chosen.steps)
            rows, facts = rows + more, facts | found
        report.show("What the engine costs", rows, facts, chosen.json)


if __name__ == "__main__":
    main()
