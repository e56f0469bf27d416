"""Graftwork from Python: `plan`, `run`, `resume`, `stop`, `compare`, `export` and others.

The command line is a thin layer on it.

Nothing heavy is imported until a step has to run: a run whose steps are all cached starts neither Ray nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.pipeline.execution.run import Run
from graftwork.pipeline.execution.view import LoggedView, SilentView, View
from graftwork.pipeline.planning import plan as planning
from graftwork.pipeline.planning import preflight
from graftwork.pipeline.planning.contents import Contents, Report
from graftwork.pipeline.planning.plan import Plan
from graftwork.pipeline.runs import record, stopping
from graftwork.pipeline.runs.record import Expected, RunRecord
from graftwork.pipeline.store.artifacts import State, Store
from graftwork.pipeline.store.errors import StoreError
from graftwork.pipeline.store.manifest import Manifest
from graftwork.pipeline.tracking.destination import destination
from graftwork.specs.costs import GraftCost
from graftwork.specs.export import Adapters, Layout
from graftwork.specs.figures import amount, column_word
from graftwork.specs.hub import is_hub_id, local_snapshot
from graftwork.specs.job import JobSpec
from graftwork.specs.metrics import INCEPTION_METRICS
from graftwork.specs.paths import expand_weights, settle_home
from graftwork.specs.problems import shown
from graftwork.specs.reading.load import SpecError, job_from, load
from graftwork.specs.reading.overrides import expanded
from graftwork.specs.store import DEFAULT_STORE
from graftwork.specs.text import JSON_PROMPTS
from graftwork.specs.vae import VaeConfig, vae_folder
from graftwork.stages.data.listing import listing_once
from graftwork.stages.data.sources import num_classes
from graftwork.stages.registry import makes_model

if TYPE_CHECKING:
    from pandas import DataFrame

WORTH_TELLING = 2**28  # bytes that are read
ROW = "evaluate/"  # how the name of a step begins that samples a row


def plan(
    job: JobSpec | str | Path, overrides: Iterable[str] = (), read: bool = False, contents: Contents | None = None
) -> Plan:
    """Return what a job comes to, step by step; raise SpecError where it cannot be done.

    Files that the job names may lie elsewhere: `preflight.absent` lists them, and the keys are not those of a run. Nor
    are they if files that were never read are too many to be read for a plan, unless `read` says so. Checkpoints and
    references that are here, and that a step will read, are looked into: torch loads for a checkpoint.

    contents: of the job's files; it has notes on what changed in them, and what was not read.
    """
    spec = job if isinstance(job, JobSpec) else load(job, overrides)
    settle_home()
    with listing_once():
        shortages = preflight.shortages(spec)
        if shortages:
            raise SpecError(shortages)
        store = Store(spec.store)
        made = planning.make_plan(spec, contents or Contents(store, quick=not read))
        return replace(made, notes=tuple(preflight.check_pending(made, store, preflight.PLANNED_HEADERS)))


def costs(job: JobSpec) -> GraftCost | None:
    """What the graft costs beside its rootstock; None where a search under a budget or a solver will settle it, or
    where the number of classes is in data that are elsewhere."""
    if job.budget() is not None or job.solve is not None:
        return None
    count = num_classes(job.data) if job.model.told == "classes" else 0  # texts have no parameters
    return None if count is None else planning.costs(job, count)


def estimate(
    made: Plan, store: Store, states: Mapping[str, State], manifests: Iterable[Manifest], gpus: int | None = None
) -> tuple[Expected, RunRecord | None]:
    """What the steps that are not cached should take, and the last run that kept such an estimate and its time.

    manifests: of the store. gpus: that are meant; None for as many as the widest step takes at once. Raises SpecError.
    """
    from graftwork.pipeline.estimates import estimate as estimates
    from graftwork.pipeline.estimates.history import History
    from graftwork.pipeline.estimates.simulate import machine_for

    history = History(store, manifests)
    undone = [step for step, state in states.items() if state != "cached"]
    last = history.last() if undone else record.load_or_none(store, record.run_name(made))
    expected = estimates.estimate(made, undone, history, machine_for(made, gpus))
    return expected, last


def untracked(made: Plan) -> list[str]:
    """What keeps MLflow from taking the figures of a run of the plan, a line each; nothing is started or written."""
    store = Store(made.job.store)
    try:
        there = destination(made.job.tracking, store, record.load_or_none(store, record.run_name(made)))
        there.check()
    except SpecError as error:
        return error.lines
    return []


def run(job: JobSpec | str | Path, overrides: Iterable[str] = (), view: View | None = None) -> RunRecord:
    """Run a job: compute the steps that its store lacks, and return the record of the run.

    job: a JobSpec, or the path of a YAML file. overrides: `path=value` each, as after `--set`. view: what shows the
    course of the run; by default nothing is printed. The logger `graftwork` has each step's end as INFO.
    The record has `run` (the name), `steps`, `results` (row -> column -> value) and `frame()`.
    Raise SpecError before anything starts, RunFailed or RunStopped afterwards.
    """
    spec = job if isinstance(job, JobSpec) else load(job, overrides)
    view = LoggedView(view or SilentView())
    settle_home()
    preflight.fetch(spec)
    try:
        with listing_once():
            preflight.check(spec)
            contents = Contents(Store(spec.store), report=reading(view))
            made = planning.make_plan(spec, contents)
            for line in (*preflight.notes(spec), *contents.notes):
                view.say(line)
        return Run(made, view, begun=contents.keep).go()
    except StoreError as error:
        raise SpecError([str(error)]) from None


def reading(view: View) -> Report:
    """Return what tells of the reading of many files, tenth by tenth."""
    tenth = 0

    def report(done: int, total: int) -> None:
        nonlocal tenth
        if done == 0:
            tenth = 0
        if total >= WORTH_TELLING and (done == 0 or 10 * done // total > tenth):
            view.say(f"reading files, once, for what they hold: {amount(done)} of {amount(total)}")
            tenth = 10 * done // total

    return report


def resume(name: str, store: str = DEFAULT_STORE, view: View | None = None) -> RunRecord:
    """Resume a run: keep the steps that the store has, and let trainings go on from their last checkpoints.

    name: of the run, as `graft status` lists it. Raise SpecError if there is no such run; otherwise as `run`.
    """
    past = record.find(Store(store), name)
    return run(job_from({**past.job, "store": store}), view=view)


def stop(name: str, store: str = DEFAULT_STORE) -> RunRecord:
    """Ask the driver of a run, on any machine, to save and stop. Return the run's current record.

    Raise SpecError if no driver is at work on that run.
    """
    place = Store(store)
    run_record = record.find(place, name)
    if record.holder(place, run_record.run) is None:
        raise SpecError(
            [f"run: got {run_record.run!r}, which is not running ({run_record.status}); accepted: a run at work"]
        )
    stopping.ask(place, run_record.run)
    return run_record


def compare(runs: Sequence[str], store: str = DEFAULT_STORE) -> list[dict[str, Any]]:
    """Return one flat row a run: `run`, `name`, `status`, and each figure as `row.column`, as MLflow names it.

    Raise SpecError if there is no such run in the store. `table` returns the same as a pandas DataFrame.
    """
    records = [record.find(Store(store), name) for name in runs]
    return [
        {"run": one.run, "name": one.name, "status": one.status}
        | {f"{row}.{column}": value for row, columns in one.results.items() for column, value in columns.items()}
        for one in records
    ]


def table(runs: Sequence[str], store: str = DEFAULT_STORE) -> DataFrame:
    """Return what `compare` returns as a pandas DataFrame: a row a run, a column a figure."""
    import pandas

    return pandas.DataFrame(compare(runs, store)).set_index("run")


def export(
    name: str,
    out: str | Path,
    layout: Layout = "graftwork",
    store: str = DEFAULT_STORE,
    vae: str | None = None,
    adapters: Adapters | None = None,
    pipeline: str | None = None,
) -> Path:
    """Write a model of a run for other tools, with a model card. Raise SpecError if it cannot be exported.

    name: RUN, for the finetuned graft, or RUN/STEP for another step that leaves a model.
    vae, pipeline: with layout diffusers, what a whole DiTPipeline is made with, or a whole PixArtSigmaPipeline.
    adapters: of a finetune by LoRA, write them for peft `beside` the model without them, or `alone`.
    """
    from graftwork.models.checkpoints import Card, ExportRefused, UnfitCheckpoint, export

    out = Path(expanded(str(out), "export"))
    vae = expanded(vae, "vae", expand_weights) if vae is not None else None
    pipeline = expanded(pipeline, "pipeline", expand_weights) if pipeline is not None else None
    run_name, _, step = name.partition("/")
    place = Store(store)
    run_record = record.find(place, run_name)
    models = [one.name for one in run_record.steps if makes_model(one.name)]
    if (step or "finetune") not in models:
        raise SpecError(
            [f"export: got {shown(name)}; accepted: {', '.join(f'{run_record.run}/{model}' for model in models)}"]
        )
    artifact = run_record.step(step or "finetune")
    if place.manifest(artifact.key) is None:
        raise SpecError(
            [f"export: {run_record.run}/{artifact.name} is not in the store; go on with: graft resume {run_record.run}"]
        )
    job = run_record.job
    for field, given in (("vae", vae), ("pipeline", pipeline)):
        if given is not None:
            _require_same_latents(place, run_record, field, given)
    card = Card(
        title=run_record.run,
        rootstock=f"`{json.dumps(job['model'])}`, {_origin(job['weights'])}.",
        recipe=_recipe(job),
        results=run_record.results,
        keys={one.name: one.key for one in run_record.steps},
    )
    try:
        export(
            place.artifact(artifact.key).path(), out, layout, card=card, vae=vae, pipeline=pipeline, adapters=adapters
        )
    except (ExportRefused, UnfitCheckpoint) as refused:
        raise SpecError([f"export: {refused}"]) from None
    return out


def images(name: str, out: str | Path, store: str = DEFAULT_STORE) -> Path:
    """Write the samples of a row of a run in GenEval's folders, for its own scorer; return the folder.

    name: RUN, for `stage2`, or RUN/ROW for another row. out: a new or empty folder. Raise SpecError if the run kept no
    samples, or drew them for other prompts than GenEval's.
    """
    out = Path(expanded(str(out), "images"))
    run_name, _, row = name.partition("/")
    place = Store(store)
    run_record = record.find(place, run_name)
    steps = {step.name.removeprefix(ROW): step for step in run_record.steps if step.name.startswith(ROW)}
    if (row or "stage2") not in steps:
        accepted = ", ".join(f"{run_record.run}/{one}" for one in steps) or "a run that samples a row"
        raise SpecError([f"images: got {shown(name)}; accepted: {accepted}"])
    _require_kept_samples(run_record)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SpecError([f"images: {out}: is there already; accepted: a new or empty folder"])
    from graftwork.stages.artifacts.samples import read_samples
    from graftwork.stages.artifacts.texts import GENEVAL_PROMPTS
    from graftwork.stages.evaluation.geneval.files import parse_jsonl
    from graftwork.stages.evaluation.geneval.layout import write_samples
    from graftwork.stages.evaluation.geneval.prompts import Prompt

    samples, texts = steps[row or "stage2"], run_record.step("text")
    for step in (samples, texts):
        if place.manifest(step.key) is None:
            problem = f"{run_record.run}/{step.name} is not in the store"
            raise SpecError([f"images: {problem}; go on with: {run_record.resume_command()}"])
    prompts = parse_jsonl("evaluate.prompts", place.artifact(texts.key).read(GENEVAL_PROMPTS), Prompt)
    write_samples(out, prompts, read_samples(place.artifact(samples.key).path()))
    return out


def _require_kept_samples(run: RunRecord) -> None:
    """Raise SpecError where a run has no samples of GenEval's prompts, with the field that asks for them."""
    evaluate = run.job["evaluate"]
    if not (evaluate.get("prompts") or "").endswith(JSON_PROMPTS):
        accepted = "a run whose samples are of GenEval's evaluation_metadata.jsonl"
        got = shown(evaluate.get("prompts"))
        raise SpecError([f"images: got {run.run}, with evaluate.prompts {got}; accepted: {accepted}"])
    if not evaluate["keep_samples"]:
        accepted = "a run that kept its samples, by --set evaluate.keep_samples=true"
        raise SpecError([f"images: got {run.run}, with evaluate.keep_samples false; accepted: {accepted}"])


@dataclass(frozen=True)
class ScoredFiles:
    """What files of GenEval's results come to: for `results` and `beside` their figures, and lines on what is odd."""

    figures: dict[str, dict[str, float]]
    notes: tuple[str, ...]


def geneval(results: str | Path, beside: str | Path | None = None, detector: str | None = None) -> ScoredFiles:
    """Return the figures of a `results.jsonl` of GenEval's own scorer: each tag's share, their mean, and the gain.

    beside: the results of the rootstock, of the same prompts and samples, over which the gain is, with the bounds of
    its 95% interval. detector: what found the objects, to stand in the figures' names. Raise SpecError for other files.
    """
    from graftwork.stages.evaluation.geneval.results import (
        gain_figures,
        read_results,
        score,
        score_figures,
    )

    given = {"results": results} | ({"beside": beside} if beside is not None else {})
    read = {role: read_results(Path(expanded(str(path), role))) for role, path in given.items()}
    figures: dict[str, dict[str, float]] = {}
    notes = []
    name = column_word(detector) if detector else None
    for role, lines in read.items():
        scored = score(lines)
        shares = {tag: of_tag.share for tag, of_tag in scored.tags.items()}
        figures[role] = {"images": len(lines)} | score_figures(shares, name)
        if scored.absent:
            others = "geneval is the mean of the other tags, and compares to no published one"
            notes.append(f"{given[role]}: no images of {', '.join(scored.absent)}: {others}")
    if "beside" in read:
        figures["results"] |= gain_figures(read["beside"], read["results"])
    return ScoredFiles(figures, tuple(notes))


@dataclass(frozen=True)
class ScoredSamples:
    """The figures of samples, and lines on what was left out."""

    figures: dict[str, float]
    notes: tuple[str, ...]


def score(
    samples: str | Path,
    reference: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    inception: str | Path | None = None,
    report: Callable[[str, int, int], object] = lambda part, done, total: None,
) -> ScoredSamples:
    """Return the figures of anybody's samples, as a job's table has them; on a GPU if there is one.

    samples, reference: a folder of images, or an .npz with arr_0, uint8 images (n,H,W,3); the reference also an .npz of
    statistics. metrics: by default all of fid, sfid, is, precision_recall and kid that the reference serves. inception:
    pytorch-fid's weights, by default those in torch's hub cache. report: is told the images of each part of the work
    that are done, and their number. Raise SpecError in a line for files that will not do.
    """
    chosen = list(dict.fromkeys(metrics or INCEPTION_METRICS))
    if unknown := [metric for metric in chosen if metric not in INCEPTION_METRICS]:
        raise SpecError([f"metrics: got {shown(unknown[0])}; accepted: {', '.join(INCEPTION_METRICS)}"])
    place = expanded(str(samples), "samples")
    given = expanded(str(reference), "reference") if reference is not None else None
    weights = expanded(str(inception), "inception") if inception is not None else None
    unfit = preflight.unfit_for_reference(given, chosen)
    problems = preflight.unfit_samples(place, chosen) + preflight.unfit_inception(weights)
    if metrics is not None:
        problems += unfit.values()
    left = [metric for metric in chosen if metric not in unfit]
    if problems or not left:
        raise SpecError(list(dict.fromkeys(problems or unfit.values())))
    import torch

    from graftwork.stages.evaluation.score import Scoring

    scoring = Scoring(place, given, left, weights)
    try:
        figures = scoring.figures(torch.device("cuda" if torch.cuda.is_available() else "cpu"), report)
    except (ValueError, FileNotFoundError) as error:  # what the contents of a file come to, beyond its headers
        raise SpecError([str(error)]) from None
    return ScoredSamples(figures, tuple(f"{metric} left out: {line}" for metric, line in unfit.items()))


def _recipe(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a job that a model card has; `text` where the model is told texts."""
    sections = ("seed", "data", "text", "graft", "distill", "finetune", "evaluate")
    return {name: _without_folders(job[name]) for name in sections if job.get(name) is not None}


def _without_folders(value: Any) -> Any:
    """Return what a job says, with the names alone of the files and folders that it reads on this machine."""
    if isinstance(value, Mapping):
        return {name: _without_folders(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _require_same_latents(store: Store, run: RunRecord, field: str, given: str) -> None:
    """Raise SpecError if a VAE, or a pipeline's, would decode other latents than those of the run, or by other numbers
    than they were made with."""
    if run.job["codec"]["kind"] != "vae":
        accepted = "nothing, or a run with codec: {kind: vae}, since this one's latents are pixels"
        raise SpecError([f"{field}: got {given}; accepted: {accepted}"])
    features = run.step("features")
    place = local_snapshot(given) if is_hub_id(given) else Path(given)
    if place is None or not vae_folder(place).is_dir() or store.manifest(features.key) is None:
        return  # `export` says what is missing
    meta = json.loads((store.artifact(features.key).path() / "meta.json").read_text())
    try:
        own = VaeConfig.of(vae_folder(place)).scaling_factor
    except ValueError:
        return
    if meta["codec"] == "vae" and meta["scale"] != own:
        raise SpecError(
            [f"{field}: got {given}, whose scaling_factor is {own}; accepted: {meta['scale']}, as the run has it"]
        )


def _origin(weights: dict[str, Any]) -> str:
    """Where a rootstock's weights come from, without the folders of this machine."""
    if weights["kind"] == "pretrain":
        return f"pretrained in the job, {weights['steps']} steps of {weights['batch']}"
    return f"read from `{weights['path'] if is_hub_id(weights['path']) else Path(weights['path']).name}`"
