"""What does not fit together in a job whose edits are solved for, and which choices such a job has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from graftwork.specs.edits import Edit, OperatorEdits, Site
from graftwork.specs.layers.solved import SolvedLayers
from graftwork.specs.metrics import METRICS

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec

Misfit = tuple[Sequence[str | int], object, str]  # the field at fault, its value, and what is accepted
ACCELERATOR = "accelerator_type:"  # begins Ray's names of resources that are models of GPUs


def solving_misfit(job: JobSpec) -> Misfit | None:
    """Return what does not fit together; None if all does."""
    return next(_misfits(job), None)


def _misfits(job: JobSpec) -> Iterator[Misfit]:
    solved = job.solved()
    if job.solve is None:
        for number in solved:
            accepted = "another strategy, or a section `solve` with limits beside the edits"
            yield ["graft", number, "layers", "kind"], "solved", accepted
        return
    if not solved:
        yield (
            ["solve"],
            job.solve.model_dump(mode="json", exclude_unset=True),
            "nothing, or edits whose layers are solved",
        )
        return
    yield from _repeated(job, solved)
    yield from _overlapping(job, solved)
    if names := job.solve.limits.measured():
        resources = job.resources.of("cost")
        if resources.gpu and not any(name.startswith(ACCELERATOR) for name in resources.custom):
            accepted = f"the model of the GPU that {' and '.join(names)} is of, as {{{ACCELERATOR}H100: 0.001}}"
            yield ["resources", "cost", "custom"], resources.custom, accepted
    if (finalists := job.solve.finalists) is not None and finalists.by is not None:
        columns = [name for metric in job.evaluate.metrics for name in METRICS[metric].figures]
        if finalists.by not in columns:
            yield ["solve", "finalists", "by"], finalists.by, f"a column of the job's metrics: {', '.join(columns)}"


def _repeated(job: JobSpec, solved: Mapping[int, SolvedLayers]) -> Iterator[Misfit]:
    """Yield a misfit for an operator that is offered to a site twice."""
    offered, rules = dict[tuple[Site, object], int](), job.rules()
    for number in solved:
        for edit in rules[number]:
            owner = offered.setdefault((edit.site, edit.operator), number)
            if owner != number:
                spec = job.graft[number]
                field = "operator" if isinstance(spec, OperatorEdits) else "pairs"
                yield (
                    ["graft", number, field],
                    edit.operator.kind,
                    f"what graft.{owner} does not offer {edit.site} already",
                )
                return


def _overlapping(job: JobSpec, solved: Mapping[int, SolvedLayers]) -> Iterator[Misfit]:
    """Yield a misfit for a pair that is solved for and takes a block of an edit that is made in any case."""
    rules = job.rules()
    owners = {
        place.block: number
        for number in range(len(rules))
        if number not in solved
        for edit in rules[number]
        for place in edit.places
    }
    for number in solved:
        for edit in rules[number]:
            taken = {place.block for place in edit.places} & owners.keys()
            if edit.site.target == "pair" and taken:
                block = min(taken)
                accepted = (
                    f"pairs without block {block}, which graft.{owners[block]} edits, or that edit solved for too"
                )
                yield ["graft", number, "pairs"], [edit.site.block, edit.site.block + 1], accepted
                return


def bounds(changes: Mapping[Edit, float], depth: int) -> tuple[float, float]:
    """Return the least and the most that choices of edits change a cost of the whole model by.

    changes: what each edit changes it by. A site holds one edit at most, and a pair fills all sites of its blocks.
    """
    least, most = (_extreme(changes, depth, sign) for sign in (1.0, -1.0))
    return least, most


def _extreme(changes: Mapping[Edit, float], depth: int, sign: float) -> float:
    """Return the least sum of changes, or with sign -1 the most."""
    in_block = [dict[Site, float]() for _ in range(depth)]
    of_pair = dict[int, float]()
    for edit, change in changes.items():
        block = edit.site.block
        if edit.site.target == "pair":
            of_pair[block] = min(of_pair.get(block, 0.0), sign * change)
        else:
            in_block[block][edit.site] = min(in_block[block].get(edit.site, 0.0), sign * change)
    best = [0.0] * (depth + 2)  # from each block on
    for block in reversed(range(depth)):
        best[block] = best[block + 1] + sum(in_block[block].values())
        if block in of_pair:
            best[block] = min(best[block], best[block + 2] + of_pair[block])
    return sign * best[0]
