"""Which layers to replace: plans of equal FLOPs from every strategy, with the same scions, finetune and seeds.

    python benchmarks/layer_choice.py [examples/digits.yaml] [--seeds 0 1 2 3 4] [--out docs/layer-choice]

Two cases: one operator in half of the blocks, and a mixture under the same share of FLOPs that half of all sites leave.
A seed's first job distils and scores all candidates and solves greedily; what the other strategies choose follows from
its artifacts. Each plan of a seed is then finetuned once, whichever strategies chose it. Writes OUT.json (from which it
goes on), OUT.md and OUT.png. `distance` is the job's own Frechet distance on its classifier's features, over that of
the same seed's rootstock; p is of a paired t-test against `interleaved`.

    python benchmarks/layer_choice.py --curve [--out docs/quality-cost]

Five budgets solved from one seed's scores: distance after both stages against FLOPs and against measured latency.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from scipy.stats import ttest_rel

from benchmarks.command_line import add_job, bare_parser
from graftwork import run
from graftwork.pipeline.cli.plain import PlainView
from graftwork.pipeline.runs.record import RunRecord
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.reading.load import load
from graftwork.specs.solve import SolveSpec

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ALONE = ("weights.workers=1", "finetune.workers=1")  # so that jobs of several seeds run side by side
SETTINGS = (*ALONE, "finetune.control=false", "evaluate.samples=400", "evaluate.rows=[rootstock, stage1, stage2]")
SEARCH = "{steps: 300, batch: 32, lr: 5e-4, warmup: 10, fraction: 1.0, ema: 0.99, checkpoint_every: 100}"
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)

Plan = dict[str, list[int]]  # by target: the blocks
Found = dict[str, dict[str, dict[str, dict[str, Any]]]]  # case -> strategy -> seed -> what the plan came to


@dataclass(frozen=True)
class Case:
    """Operators that a job may put in, one a target, and how many."""

    operators: dict[str, str]  # by target
    sites: int  # of each target


def main() -> None:
    arguments = bare_parser(__doc__)
    add_job(arguments)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments.add_argument("--cases", nargs="+", default=["one operator", "mixed"])
    arguments.add_argument("--learned", action="store_true", help="search by gates, too, for one operator")
    arguments.add_argument("--curve", action="store_true")
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    if chosen.curve:
        curve(chosen.job, chosen.out or Path("docs/quality-cost"))
    else:
        out = chosen.out or Path("docs/layer-choice")
        study(chosen.job, chosen.cases, chosen.seeds, out, chosen.learned)


def study(job: str, names: Sequence[str], seeds: Sequence[int], out: Path, learned: bool) -> None:
    """Run what is missing in OUT.json, case by case and seed by seed."""
    half = load(job).model.depth // 2
    cases = {
        "one operator": Case({"mha": "{kind: hyena_y, kernel: 4}"}, half),
        "mixed": Case({"mha": "{kind: hyena_y, kernel: 4}", "mlp": "{kind: mlp, ratio: 2}"}, half),
    }
    found: Found = json.loads(out.with_suffix(".json").read_text()) if out.with_suffix(".json").exists() else {}
    for name in names:
        for seed in seeds:
            of_case = found.setdefault(name, {})
            if str(seed) in of_case.get("interleaved", {}):
                continue
            for strategy, entry in outcomes(job, cases[name], seed).items():
                of_case.setdefault(strategy, {})[str(seed)] = entry
            keep(found, out)
    for seed in seeds if learned else ():
        entries = found["one operator"].setdefault("learned", {})
        if str(seed) not in entries:
            entries[str(seed)] = by_gates(job, cases["one operator"], seed)
            keep(found, out)


def keep(found: Found, out: Path) -> None:
    out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    out.with_suffix(".md").write_text(table(found))
    plot(found, out.with_suffix(".png"))
    print(table(found), flush=True)


def outcomes(job: str, case: Case, seed: int) -> dict[str, dict[str, Any]]:
    """Return what each strategy's plan comes to, by its name."""
    depth = load(job).model.depth
    scored, store = _scored(job, case, seed, _limit(job, case)), Store(load(job).store)
    plans = {
        "interleaved": _static(case, [block for block in range(depth) if block % 2]),
        "first": _static(case, range(case.sites)),
        "last": _static(case, range(depth - case.sites, depth)),
        "lowest_error": _ranked(
            case, depth, lambda name: _read(store, scored, f"distill/{name}", "distill.json")["relative_error"]
        ),
        "lowest_score": _ranked(case, depth, partial(_alone, store, scored)),
    }
    solutions = _read(store, scored, "select", "solutions.json")  # the first is the greedy one
    by_sum = min(solutions, key=lambda solution: sum(_alone(store, scored, name) for name in solution["solved"]))
    for name, solution in (("solved", by_sum), ("solved, greedily", solutions[0])):
        plans[name] = _sites(case, [edit["edit"] for edit in solution["edits"]])
    made = dict[str, dict[str, Any]]()
    for plan in plans.values():
        if (key := json.dumps(plan)) not in made:
            made[key] = _outcome(job, case, seed, plan)
    return {name: made[json.dumps(plan)] for name, plan in plans.items()}


def by_gates(job: str, case: Case, seed: int) -> dict[str, Any]:
    """Return what learned selection comes to."""
    share = case.sites / load(job).model.depth
    layers = f"{{kind: learned, groups: 2, ratio: {share}, pinned: [], search: {SEARCH}}}"
    done = run(
        job, ("name=layer-choice", f"seed={seed}", f"graft=[{_edit(case, 'mha', layers)}]", *SETTINGS), PlainView()
    )
    plan = _read(Store(load(job).store), done, "select", "plan.json")
    return {"sites": _sites(case, [edit["edit"] for edit in plan]), "results": done.results}


def _limit(job: str, case: Case) -> str:
    """Return the FLOPs of the model with the case's number of sites replaced, as a limit."""
    from graftwork.pipeline.api import costs

    cost = costs(load(job, (f"graft={_graft(case, _static(case, range(case.sites)))}",)))
    assert cost is not None
    return f"{{flops: {cost.graft.flops}}}"


def _scored(job: str, case: Case, seed: int, limits: str) -> RunRecord:
    """Distil and score all candidates, and solve greedily; the plan is hardly finetuned and not measured."""
    graft = ", ".join(_edit(case, target, "{kind: solved}") for target in case.operators)
    settings = (
        *ALONE,
        "finetune.control=false",
        "finetune.steps=1",
        "finetune.warmup=0",
        "evaluate.samples=40",
        "evaluate.rows=[rootstock]",
    )
    overrides = (f"graft=[{graft}]", f"solve={{limits: {limits}, given: greedy, plans: 2, apart: 1}}", "score.draws=2")
    return run(job, ("name=layer-choice", f"seed={seed}", *overrides, *settings), PlainView())


def _outcome(job: str, case: Case, seed: int, plan: Plan) -> dict[str, Any]:
    done = run(job, ("name=layer-choice", f"seed={seed}", f"graft={_graft(case, plan)}", *SETTINGS), PlainView())
    return {"sites": plan, "results": done.results}


def _edit(case: Case, target: str, layers: str) -> str:
    return f"{{target: {target}, operator: {case.operators[target]}, layers: {layers}}}"


def _graft(case: Case, plan: Plan) -> str:
    """Return the edits that make a plan, as YAML."""
    layers = {target: f"{{kind: explicit, blocks: {blocks}}}" for target, blocks in plan.items() if blocks}
    return f"[{', '.join(_edit(case, target, one) for target, one in layers.items())}]"


def _static(case: Case, blocks: Iterable[int]) -> Plan:
    chosen = [*blocks]
    return dict.fromkeys(case.operators, chosen)


def _ranked(case: Case, depth: int, score: Callable[[str], float]) -> Plan:
    """Return, of each target, as many sites as the case has, those with the least scores."""
    return {
        target: sorted(sorted(range(depth), key=partial(_of_site, score, target))[: case.sites])
        for target in case.operators
    }


def _alone(store: Store, done: RunRecord, name: str) -> float:
    """Return what an edit alone does to the output."""
    return float(_read(store, done, f"score/{name}", "score.json")["output"])


def _of_site(score: Callable[[str], float], target: str, block: int) -> float:
    return score(f"{block:02d}.{target}")


def _sites(case: Case, edits: Iterable[dict[str, Any]]) -> Plan:
    sites = [(edit["site"]["target"], edit["site"]["block"]) for edit in edits]
    return {target: sorted(block for other, block in sites if other == target) for target in case.operators}


def _read(store: Store, done: RunRecord, step: str, file: str) -> Any:
    return json.loads(store.artifact(done.step(step).key).read(file))


def ratios(entries: Mapping[str, dict[str, Any]], row: str) -> dict[str, float]:
    """The row's distance over the rootstock's, by the seed."""
    results = {seed: entry["results"] for seed, entry in entries.items()}
    return {seed: one[row]["distance"] / one["rootstock"]["distance"] for seed, one in results.items()}


def table(found: Found) -> str:
    lines = []
    for case, strategies in found.items():
        lines += [f"| {case} | sites, seed by seed | after stage 1 | after stage 2 | p |", "|---|---|---|---|---|"]
        usual = ratios(strategies["interleaved"], "stage2")
        for name, entries in sorted(strategies.items(), key=lambda item: mean(ratios(item[1], "stage2").values())):
            sites = "; ".join(
                " ".join(",".join(map(str, blocks)) or "-" for blocks in entry["sites"].values())
                for entry in entries.values()
            )
            one, two = (ratios(entries, row) for row in ("stage1", "stage2"))
            p = f"{ttest_rel([*two.values()], [usual[seed] for seed in two]).pvalue:.3f}" if len(two) > 2 else ""
            spreads = (mean_and_spread([*values.values()]) for values in (one, two))
            lines.append(f"| `{name}` | {sites} | {' | '.join(spreads)} | {p if name != 'interleaved' else ''} |")
        lines.append("")
    return "\n".join(lines)


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread} x"


def plot(found: Found, path: Path) -> None:
    """Each seed a dot, each mean a bar, after both stages; a panel a case."""
    figure, panels = plt.subplots(len(found), 1, figsize=(7.5, 3.2 * len(found)), layout="constrained", squeeze=False)
    for axes, (case, strategies) in zip(panels.flat, found.items(), strict=True):
        for offset, row in ((-0.15, "stage1"), (0.15, "stage2")):
            for place, entries in enumerate(strategies.values()):
                values = [*ratios(entries, row).values()]
                colour = "0.6" if row == "stage1" else "C0"
                label = {"stage1": "after distillation", "stage2": "after finetuning"}[row] if place == 0 else None
                axes.plot([place + offset] * len(values), values, "o", color=colour, markersize=4, label=label)
                axes.plot([place + offset - 0.1, place + offset + 0.1], [mean(values)] * 2, color=colour)
        axes.axhline(1, color="0.8", linestyle="--")
        axes.set_xticks(range(len(strategies)), list(strategies), rotation=15)
        axes.set(ylabel="distance over the rootstock's", title=case)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curve(job: str, out: Path) -> None:
    """Solve for five budgets of FLOPs from one seed's scores; draw quality against FLOPs and measured latency."""
    graft = (
        "[{target: mha, operator: {kind: hyena_y, kernel: 4}, layers: {kind: solved}}, "
        "{target: mha, operator: {kind: none}, layers: {kind: solved}}, "
        "{target: mlp, operator: {kind: mlp, ratio: 2}, layers: {kind: solved}}, "
        "{target: mlp, operator: {kind: none}, layers: {kind: solved}}]"
    )
    rows = dict[str, dict[str, dict[str, float]]]()
    for budget in BUDGETS:
        solve = SolveSpec.model_validate({"limits": {"flops": f"{budget:.0%}"}, "plans": 1})
        limits = solve.limits.model_dump_json(exclude_none=True)
        overrides = (f"graft={graft}", f"solve={{limits: {limits}, plans: 1}}", *SETTINGS)
        done = run(job, ("name=quality-cost", *overrides), PlainView())
        assert done.results is not None
        rows[f"{budget:.0%}"] = done.results
        out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    draw_curve(rows, out.with_suffix(".png"))


def draw_curve(rows: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
    for axes, name, column in zip(panels, ("FLOPs", "latency"), ("flops", "latency_ms"), strict=True):
        for row, label in (("stage1", "after distillation"), ("stage2", "after finetuning")):
            points = [
                (
                    results[row][column] / results["rootstock"][column],
                    results[row]["distance"] / results["rootstock"]["distance"],
                )
                for results in rows.values()
            ]
            axes.plot(*zip(*sorted([*points, (1.0, 1.0)]), strict=True), "o-", label=label)
        axes.set(xlabel=f"{name} over the rootstock's", ylabel="distance over the rootstock's", yscale="log")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
