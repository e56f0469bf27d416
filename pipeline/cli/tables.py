"""What commands print on stdout: tables, and documents for programs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from graftwork.specs.figures import amount, counted, figure, flops, number
from graftwork.specs.problems import first_few, plain
from graftwork.specs.secrets import redacted

if TYPE_CHECKING:
    from graftwork.cluster.checks.probes import Check
    from graftwork.cluster.jobs import Submission
    from graftwork.pipeline.doctor.doctor import Checkup
    from graftwork.pipeline.runs.gc import Garbage, Holding
    from graftwork.pipeline.runs.record import Expected, RunRecord
    from graftwork.specs.costs import GraftCost

NAMED = 6  # steps of a list


def show_costs(cost: GraftCost) -> None:
    """Parameters and FLOPs of one forward pass of one sample, and how the graft compares."""
    rows = [
        ("rootstock", cost.rootstock, None),
        ("graft", cost.graft, cost.rootstock),
        ("operators before", cost.replaced, None),
        ("operators after", cost.scions, cost.replaced),
    ]
    print(f"{'costs':18}{'parameters':>16}{'':9}{'a forward pass':>16}")
    for name, of, against in rows:
        more_params, more_flops = (
            f" {new / old - 1:+8.1%}" if against is not None and old else f"{'':9}"
            for new, old in ((of.params, against and against.params), (of.flops, against and against.flops))
        )
        print(f"{name:18}{number(of.params):>16}{more_params}{flops(of.flops):>16}{more_flops}".rstrip())


def show_expected(expected: Expected, steps: int, last: RunRecord | None) -> None:
    """What a job's steps should take and what that is based on; and how far off the last such estimate was."""
    if steps:
        known = steps - len(expected.unknown)
        on = (
            f"{expected.gpus:g} GPUs, {expected.gpu_hours:.3g} GPU hours"
            if expected.gpus
            else f"{expected.cpus:g} CPUs"
        )
        print(f"expected, by estimate: {lasting(expected.seconds) if known else 'not known'} on {on}")
        if expected.shares:
            shares = sorted(expected.shares.items(), key=lambda part: -part[1])
            print(f"  by stage: {', '.join(f'{stage} {share_of(share)}' for stage, share in shares if share)}")
    if as_before := steps - len(expected.assumed) - len(expected.unknown):
        print(f"  {counted(as_before, 'step')} as fast as the most similar ones in this store were")
    if expected.assumed:
        print(f"  no such step in this store, so {expected.assumption} is assumed: {listed(expected.assumed)}")
    if expected.unknown:
        print(f"  no basis, so counted as nothing: {listed(expected.unknown)}")
    if last is not None and (told := last.estimated()):
        off = f"{abs(told['off']):.0%} {'more' if told['off'] > 0 else 'less'}"
        print(
            f"last estimate: {told['run']}: expected {lasting(told['expected'])}, took {lasting(told['took'])} ({off})"
        )


def lasting(seconds: float) -> str:
    """`1m10s`: the two largest units."""
    whole = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller_size:02}{smaller}"
    return f"{whole}s"


def share_of(share: float) -> str:
    """`51%`; what is there is never 0%."""
    return "under 1%" if share < 0.01 else f"{share:.0%}"


def listed(names: Sequence[str]) -> str:
    return first_few(names, NAMED)


def show_holdings(holdings: Sequence[Holding]) -> None:
    print("what runs refer to stays:")
    cells = [[one.run, one.status, amount(one.size), amount(one.alone), one.started] for one in holdings]
    columns([["run", "status", "size", "it alone", "started"], *cells])


def _of(piece: Garbage) -> str:
    """Return the step, or the path, whose files they are; empty if nobody knows."""
    return piece.step or piece.of or ""


def show_garbage(pieces: Sequence[Garbage], runs: Sequence[str], done: bool) -> None:
    now = time.time()
    cells = [
        [
            one.kind,
            amount(one.size),
            f"{max(0.0, now - one.modified) / 86400:.1f} days",
            one.step or one.of or "",
            one.place,
        ]
        for one in pieces
    ]
    if cells:
        columns([["kind", "size", "age", "of", "place"], *cells])
    for run in runs:
        print(f"{'forgotten' if done else 'would forget'}: {run}")
    print(f"{'freed' if done else 'would free'}: {amount(sum(one.size for one in pieces))} in {len(pieces)} places")


def show_submissions(submissions: Sequence[Submission]) -> None:
    for one in submissions:
        print(f"{one.state:9}  {one.started}  {one.id}")


def show_run(run: RunRecord) -> None:
    print(f"{run.run}: {run.status}, started {run.started}")
    columns([[step.state, step.key[:12], f"{step.seconds:.1f}s", step.name, step.made_by or ""] for step in run.steps])
    show_results(run)
    for line in (run.error or "").splitlines():
        print(plain(redacted(line)))


def show_results(run: RunRecord) -> None:
    if not run.results:
        return
    # The last row has every figure; that of real images lacks those of metrics that judge samples alone.
    names = list(dict.fromkeys(name for row in reversed(run.results.values()) for name in row))
    columns(
        [["row", *names]]
        + [[row, *(figure(name, run.results[row].get(name)) for name in names)] for row in run.results]
    )


def show_check(check: Check) -> None:
    """What one check saw, and what to do."""
    on = f"{check.node}: " if check.node else ""
    print(f"{check.state:8} {check.name:22} {on}{check.seen}{_advice(check)}", flush=True)


def _advice(check: Check) -> str:
    return f"  => {check.advice}" if check.advice else ""


def show_checkup(made: Checkup) -> None:
    """How many checks came to what."""
    counts = Counter(check.state for check in made.checks)
    told = ", ".join(f"{counts[state]} {state}" for state in ("broken", "warning", "fine") if counts[state])
    print(f"{told}, in {lasting(made.seconds)}")


def show_nodes(checks: Sequence[Check]) -> None:
    """Checks of a cluster: those of several nodes that say the same as one."""
    alike: dict[tuple[str, ...], list[Check]] = {}
    for check in checks:
        alike.setdefault((check.name, check.state, check.seen, check.advice), []).append(check)
    for same in alike.values():
        on = listed([check.node for check in same]) if same[0].node else ""
        show_check(replace(same[0], node=on))


def columns(lines: list[list[str]]) -> None:
    """Print cells in columns: the first to the left, the rest to the right unless they are text."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def document(content: object) -> None:
    print(json.dumps(content, indent=1))
