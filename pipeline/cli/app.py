"""The command line, `graft`. Results go to stdout, everything else to stderr.

Exit codes: 0 fine, 1 a run failed, 2 the request cannot be carried out as it stands.

What a command works with loads when it is called: help, and a word that is no command, need none of it.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import graftwork
from graftwork.pipeline.cli.tables import (
    columns,
    document,
    show_check,
    show_checkup,
    show_costs,
    show_expected,
    show_garbage,
    show_holdings,
    show_nodes,
    show_results,
    show_run,
    show_submissions,
)
from graftwork.specs.export import Adapters, Layout
from graftwork.specs.figures import amount, figure
from graftwork.specs.problems import SpecError, plain, shown
from graftwork.specs.secrets import redacted
from graftwork.specs.store import DEFAULT_STORE

if TYPE_CHECKING:
    from graftwork.cluster.checks.probes import Check
    from graftwork.pipeline.execution.view import View
    from graftwork.pipeline.planning.plan import Step
    from graftwork.pipeline.runs.record import RunRecord
    from graftwork.pipeline.store.artifacts import State, Store
    from graftwork.pipeline.store.manifest import Manifest

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes longer to load than all else that help needs
    help="Edit a pretrained diffusion transformer: swap operators, distil, finetune, measure. One job is one file.",
)

REPEATS = "what was done is kept; to resume comes to the same error: run the job again when its cause is mended"

Job = Annotated[str, typer.Argument(metavar="JOB.yaml", help="the job's spec")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run's name, or how it begins")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="override a field, e.g. finetune.lr=3e-4")
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
StoreUrl = Annotated[str, typer.Option("--store", help="where the runs are kept")]
Address = Annotated[str | None, typer.Option("--address", metavar="URL", help="do it on that Ray cluster")]
Dashboard = Annotated[str, typer.Option("--address", metavar="URL", help="a Ray dashboard, as http://head:8265")]
Follow = Annotated[bool, typer.Option("-f", "--follow", help="show what it prints until it has ended")]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"graftwork {graftwork.__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """Spell out the signs of a name that a terminal's encoding has not."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@app.command()
def run(job: Job, overrides: Overrides = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Run a job; what the store has already is not computed again."""
    from graftwork.pipeline import api

    with problems(debug, as_json):
        with redirect_stdout(sys.stderr):  # whatever a library prints: stdout is for the result
            done = api.run(job, overrides or (), _view())
        _report(done, as_json)


@app.command()
def submit(
    job: Job,
    address: Dashboard,
    overrides: Overrides = None,
    follow: Follow = False,
    debug: Debug = False,
) -> None:
    """Run a job on a Ray cluster; prints the submission's name."""
    from graftwork.pipeline.execution import remote
    from graftwork.specs.reading.load import load

    with problems(debug):
        spec = load(job, overrides or ())
        sent = remote.submit(spec, address)
        _print_lines(remote.needed_there(spec))
    _sent(sent, address, follow, debug)


@app.command()
def logs(
    name: Annotated[str, typer.Argument(metavar="SUBMISSION", help="a submission's name, or how it begins")],
    address: Dashboard,
    follow: Follow = False,
    debug: Debug = False,
) -> None:
    """Show what a submitted job printed."""
    from graftwork.pipeline.execution import remote

    if follow:
        _follow(name, address, debug)
        return
    with problems(debug):
        print(remote.logs(name, address), end="")


@app.command()
def resume(
    name: RunName,
    store: StoreUrl = DEFAULT_STORE,
    address: Address = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Go on with a run from where it stopped."""
    from graftwork.pipeline import api
    from graftwork.pipeline.execution import remote

    if address is not None:
        with problems(debug):
            sent = remote.resume(name, address, _given(store))
        _sent(sent, address, False, debug)
        return
    with problems(debug, as_json):
        with redirect_stdout(sys.stderr):
            done = api.resume(name, store, _view())
        _report(done, as_json)


@app.command()
def stop(name: RunName, store: StoreUrl = DEFAULT_STORE, address: Address = None, debug: Debug = False) -> None:
    """Have a run save what it has and end, wherever its driver is. `graft resume` goes on with it."""
    from graftwork.pipeline import api
    from graftwork.pipeline.execution import remote

    with problems(debug):
        if address is not None:
            remote.stop(name, address, print)
            return
        asked = api.stop(name, store)
        print(f"{asked.run}: asked to stop; go on with it later by: graft resume {asked.run}")


@app.command()
def plan(
    job: Job,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, metavar="N", help="expect so many GPUs; by default what a step needs")
    ] = None,
    read: Annotated[
        bool, typer.Option("--read", help="read files that were never read, however many they are")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show a job's steps, cached, partial or pending, its costs, and the time that it should take.

    Of a step that is not cached, also what sets it apart from the nearest one that is.
    """
    from graftwork.pipeline import api
    from graftwork.pipeline.planning import preflight
    from graftwork.pipeline.planning.contents import Contents
    from graftwork.pipeline.planning.plan import differences
    from graftwork.pipeline.store.artifacts import Store
    from graftwork.specs.reading.load import load
    from graftwork.stages.data.listing import listing_once
    from graftwork.stages.data.sources import labels_line

    with problems(debug), listing_once():
        spec = load(job, overrides or ())
        contents = Contents(Store(spec.store), quick=not read, report=api.reading(_view()) if read else None)
        made = api.plan(spec, contents=contents)
        if read:
            contents.keep()
        absent = preflight.absent(spec)
        notes = [*preflight.notes(spec), *contents.notes, *made.notes, *api.untracked(made)]
        classes = labels_line(made.job.data)
        cost = api.costs(made.job)
        store = Store(made.job.store)
        states = made.states(store)
        manifests: list[Manifest] = list(store.manifests()) if set(states.values()) != {"cached"} else []
        expected, last = api.estimate(made, store, states, manifests, gpus)
        if as_json:
            document(
                {
                    "job": made.job.name,
                    "steps": [_planned(step, states[step.name]) for step in made.steps],
                    "costs": cost and asdict(cost),
                    "expected": expected.model_dump(),
                    "last_estimate": last and last.estimated(),
                    "absent": absent,
                    "unread": contents.unread,
                    "notes": notes,
                }
            )
            return
        differ = differences(made, states, manifests, store)
        for step in made.steps:
            reason = f"differs in {differ[step.name]}" if step.name in differ else ""
            print(f"{states[step.name]:8} {step.key[:12]}  {step.name:24} {reason}".rstrip())
        counts = {state: list(states.values()).count(state) for state in ("cached", "partial", "pending")}
        print(", ".join(f"{count} {state}" for state, count in counts.items()))
        if classes:
            print(classes)
        if cost is not None:
            show_costs(cost)
        elif made.job.solve is not None:
            from graftwork.specs.solve import described  # pydantic, which help need not wait for

            print(f"costs are for the solver to settle: {described(made.job.solve.limits)}")
        elif made.job.budget() is not None:
            print(f"costs are for the search to settle: {made.job.budget():g} of the rootstock's FLOPs, within 2%")
        show_expected(expected, sum(state != "cached" for state in states.values()), last)
        if absent:
            print("graft: these are not here, so the keys above are not those of a run:", file=sys.stderr)
        _print_lines(absent)
        if contents.unread:
            told = "the keys above are provisional until these are read, once, by a run or by graft plan --read:"
            _print_lines([told, *contents.unread])
        _print_lines([*notes, *preflight.machine_problems()])


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="[RUN]", help="a run's name, or how it begins")] = None,
    store: StoreUrl = DEFAULT_STORE,
    address: Address = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show all runs, or one's steps; of a cluster, its submissions."""
    from graftwork.pipeline.execution import remote
    from graftwork.pipeline.runs import record
    from graftwork.pipeline.store.artifacts import Store
    from graftwork.pipeline.tracking.held_back import waiting

    if address is not None and name is not None:
        _relay("status", [name], address, store, as_json, debug)
    with problems(debug):
        if address is not None:
            submissions = remote.submissions(address)
            if as_json:
                document([{"submission": one.id, "state": one.state, "started": one.started} for one in submissions])
            else:
                show_submissions(submissions)
            return
        place = Store(store)
        if name is not None:
            one = record.as_it_is(place, record.find(place, name))
            document(one.model_dump(mode="json")) if as_json else show_run(one)
            left = waiting(place, one.run)
            if left and not as_json:
                count = len(left.entries) + len(left.refused)
                print(f"MLflow lacks {count} of its entries; deliver them: {one.resume_command()}")
            return
        runs = [record.as_it_is(place, record.load(place, run)) for run in place.runs()]
        if as_json:
            document([{"run": one.run, "status": one.status, "started": one.started} for one in runs])
            return
        for one in runs:
            ready = sum(step.state in ("done", "cached") for step in one.steps)
            print(f"{one.status:9} {ready:3}/{len(one.steps)} steps  {one.started}  {one.run}")


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="runs to compare")],
    store: StoreUrl = DEFAULT_STORE,
    address: Address = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put runs side by side: the numbers that MLflow holds."""
    from graftwork.pipeline import api

    if address is not None:
        _relay("compare", names, address, store, as_json, debug)
    with problems(debug):
        rows = api.compare(names, store)
        if as_json:
            document(rows)
            return
        names_of_columns = list(dict.fromkeys(column for row in rows for column in row))
        columns([[column, *(figure(column, row.get(column)) for row in rows)] for column in names_of_columns])


@app.command()
def show(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="a key, how it begins, or RUN/STEP")],
    store: StoreUrl = DEFAULT_STORE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what an artifact holds, what made it and from what."""
    from graftwork.pipeline.store.artifacts import Store

    with problems(debug):
        place = Store(store)
        manifest = _find_artifact(place, artifact)
        if as_json:
            document(manifest.model_dump(mode="json"))
            return
        origin = manifest.origin
        print(f"{manifest.key}\n{plain(f'{origin.step}, made {origin.made} by {origin.run}')} in {origin.seconds:.1f}s")
        print(f"in {place.root / 'artifacts' / manifest.key}")
        for name, entry in manifest.files.items():
            print(f"  {entry.size:>12,}  {entry.sha256[:12]}  {name}")
        print(json.dumps(manifest.identity, indent=1))


@app.command()
def export(
    name: Annotated[str, typer.Argument(metavar="RUN[/STEP]", help="a run's graft, or the model of another step")],
    out: Annotated[str, typer.Argument(metavar="FOLDER", help="a new or empty folder")],
    layout: Annotated[Layout, typer.Option("--as", help="for whom")] = "graftwork",
    vae: Annotated[str | None, typer.Option("--vae", help="for diffusers: write a whole DiTPipeline, with it")] = None,
    pipeline: Annotated[
        str | None,
        typer.Option("--pipeline", help="for diffusers: write a whole PixArtSigmaPipeline, with all else of this one"),
    ] = None,
    adapters: Annotated[
        Adapters | None,
        typer.Option("--adapters", help="of a finetune by LoRA: for peft, beside the model without them, or alone"),
    ] = None,
    store: StoreUrl = DEFAULT_STORE,
    debug: Debug = False,
) -> None:
    """Write a model for other tools, with a model card. As safetensors, for diffusers or as the published .pt."""
    from graftwork.pipeline import api

    with problems(debug):
        print(api.export(name, out, layout, store, vae, adapters, pipeline))


@app.command()
def images(
    name: Annotated[str, typer.Argument(metavar="RUN[/ROW]", help="a run's stage2, or another row of its table")],
    out: Annotated[str, typer.Argument(metavar="FOLDER", help="a new or empty folder")],
    store: StoreUrl = DEFAULT_STORE,
    debug: Debug = False,
) -> None:
    """Write a row's samples in GenEval's folders, for its own scorer. The run needs evaluate.keep_samples."""
    from graftwork.pipeline import api

    with problems(debug):
        print(api.images(name, out, store))


@app.command()
def geneval(
    results: Annotated[str, typer.Argument(metavar="RESULTS.jsonl", help="what GenEval's scorer wrote of a graft")],
    beside: Annotated[
        str | None, typer.Option("--beside", metavar="RESULTS.jsonl", help="of the rootstock: show the gain over it")
    ] = None,
    detector: Annotated[
        str | None, typer.Option("--detector", metavar="NAME", help="what found the objects, for the figures' names")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the figures of GenEval's own scorer: each tag's share, their mean, and the gain with its interval."""
    from graftwork.pipeline import api

    with problems(debug):
        scored = api.geneval(results, beside, detector)
        _print_lines(list(scored.notes))
        if as_json:
            document(scored.figures)
            return
        names = list(scored.figures["results"])
        rows = [[name, *(figure(name, of.get(name)) for of in scored.figures.values())] for name in names]
        columns([["figure", *scored.figures], *rows])


@app.command()
def score(
    samples: Annotated[str, typer.Argument(metavar="SAMPLES", help="an .npz with arr_0, or a folder of images")],
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="REFERENCE", help="the same, or an .npz of statistics; not for [is] alone"),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="LIST",
            help="of fid,sfid,is,precision_recall,kid; by default what the reference serves",
        ),
    ] = None,
    inception: Annotated[
        str | None,
        typer.Option("--inception", metavar="FILE", help="pytorch-fid's weights; by default torch's hub cache"),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Score anybody's samples as ImageNet papers do: FID, sFID, Inception Score, precision, recall and KID."""
    from graftwork.pipeline import api
    from graftwork.pipeline.cli.bars import bars

    names = [name.strip() for name in metrics.split(",")] if metrics is not None else None
    with problems(debug):
        with bars() as report, redirect_stdout(sys.stderr):
            scored = api.score(samples, reference, names, inception, report)
        _print_lines(list(scored.notes))
        if as_json:
            document(scored.figures)
            return
        columns([[name, figure(name, value)] for name, value in scored.figures.items()])


@app.command()
def verify(
    store: StoreUrl = DEFAULT_STORE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="leave what is damaged where it is")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Read every artifact; what is damaged is named and set aside.

    The next run computes it again. Exit code 0 if all are whole, 1 if not.
    """
    from graftwork.pipeline.store.artifacts import Store
    from graftwork.pipeline.store.verify import verify

    with problems(debug):
        checked = []
        for one in verify(Store(store), dry_run):
            checked.append(one)
            if not one.whole and not as_json:
                print(one)
        damaged = [one for one in checked if not one.whole]
        size = sum(one.size for one in checked)
        if as_json:
            document({"artifacts": len(checked), "size": size, "damaged": [asdict(one) for one in damaged]})
        else:
            print(f"{len(checked)} artifacts, {amount(size)}: {len(damaged) or 'none'} damaged")
    if damaged:
        raise typer.Exit(1)


@app.command()
def gc(
    store: StoreUrl = DEFAULT_STORE,
    days: Annotated[float, typer.Option("--older-than", metavar="DAYS", help="leave what is younger")] = 7.0,
    forget: Annotated[
        list[str] | None, typer.Option("--forget", metavar="RUN", help="forget a run, and free what it alone refers to")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="free it; without this, only show it")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Free what no run refers to. Artifacts, checkpoints, what was set aside as damaged, what kills left behind."""
    from graftwork.pipeline.runs import gc, record
    from graftwork.pipeline.store.artifacts import Store

    with problems(debug):
        place = Store(store)
        runs = [record.find(place, run).run for run in forget or ()]
        garbage = gc.garbage(place, days * gc.DAY, runs)
        freed = list(gc.free(place, garbage, runs)) if yes else garbage
        holdings = gc.holdings(place, runs)
        if as_json:
            pieces, kept = ([asdict(one) for one in rows] for rows in (freed, holdings))
            document(
                {"done": yes, "size": sum(one.size for one in freed), "pieces": pieces, "forget": runs, "runs": kept}
            )
            return
        show_garbage(freed, runs, yes)
        if holdings:
            show_holdings(holdings)
        options = ["--store", store] if store != DEFAULT_STORE else []
        options += ["--older-than", f"{days:g}"] if days != 7 else []
        options += [word for run in runs for word in ("--forget", run)]
        if not yes and (garbage or runs):
            print(f"free it with: {shlex.join(['graft', 'gc', *options, '--yes'])}")
        elif holdings:
            print(f"free what a run alone refers to with: {shlex.join(['graft', 'gc', *options, '--forget', 'RUN'])}")


@app.command()
def doctor(
    job: Annotated[str | None, typer.Argument(metavar="[JOB.yaml]", help="a job that is to fit")] = None,
    overrides: Overrides = None,
    store: Annotated[str | None, typer.Option("--store", help=f"by default the job's, or {DEFAULT_STORE}")] = None,
    address: Address = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check this machine, or a cluster's nodes: each line fine, warning or broken, with what to do.

    Exit code 0 if nothing is broken, 1 if something is. Put what it prints into a bug report.
    """
    from graftwork.pipeline.doctor.doctor import doctor as check_up

    several = address is not None or "RAY_ADDRESS" in os.environ
    out = sys.stdout
    if several:
        _print_lines(["looking at all nodes, for up to two minutes"])

    def tell(check: Check) -> None:
        if not (as_json or several):
            with redirect_stdout(out):
                show_check(check)

    with problems(debug):
        with redirect_stdout(sys.stderr):
            made = check_up(job, overrides or (), store, address, tell)
        if as_json:
            document(made.document())
        else:
            if several:
                show_nodes(made.checks)
            show_checkup(made)
    if made.state == "broken":
        raise typer.Exit(1)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page with every field.")] = False,
) -> None:
    """Print the JSON Schema of a job, for editors that complete YAML."""
    from graftwork.specs.reading.load import job_schema
    from graftwork.specs.reading.page import page_of

    if markdown:
        print(page_of(job_schema()), end="")
    else:
        document(job_schema())


@contextmanager
def problems(debug: bool, as_json: bool = False) -> Iterator[None]:
    """Turn errors into lines and exit codes; a failed run still ends with its JSON document, if one was asked for."""
    from graftwork.pipeline.execution.run import RunFailed, RunStopped
    from graftwork.pipeline.store.errors import StoreError

    try:
        yield
    except SpecError as error:
        _trace(traceback.format_exc(), debug)
        _fail(error.lines, 2)
    except StoreError as error:  # of a run that has not begun, or of a command that reads the store
        _trace(traceback.format_exc(), debug)
        _fail([str(error)], 2)
    except RunFailed as error:
        _trace(error.details, debug)
        failed = error.record
        if as_json:
            document(failed.outcome())
        _fail([*str(error).splitlines(), REPEATS if error.repeats else _resume_line(failed)], 1)
    except RunStopped as error:
        if as_json:
            document(error.record.outcome())
        _fail([str(error), _resume_line(error.record)], error.exit_code)
    except KeyboardInterrupt:
        _fail(["interrupted; go on with the same command, or with: graft resume RUN"], 130)
    except Exception as error:
        _trace(traceback.format_exc(), debug)
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        _fail([f"{line} (--debug shows where; a bug report begins with what graft doctor prints)"], 1)


def _sent(submission: str, address: str, follow: bool, debug: bool) -> None:
    print(submission, flush=True)
    print(f"graft: follow it with: graft logs -f {submission} --address {address}", file=sys.stderr)
    if follow:
        _follow(submission, address, debug)


def _follow(submission: str, address: str, debug: bool) -> None:
    """Show what a job prints until it has ended; exits 1 where it did not succeed."""
    from graftwork.pipeline.execution import remote

    with problems(debug):
        try:
            ended = remote.follow(submission, address, lambda text: print(text, end="", flush=True))
        except KeyboardInterrupt:
            print(f"graft: {submission} goes on; graft stop {submission} --address {address}", file=sys.stderr)
            return
    if ended.state != "SUCCEEDED":
        _fail([f"{ended.id}: {ended.state}"], 1)


def _relay(command: str, names: list[str], address: str, store: str, as_json: bool, debug: bool) -> NoReturn:
    """Print what the same command prints on the cluster, and exit as it does."""
    from graftwork.pipeline.execution import remote

    with problems(debug):
        answer = remote.ask(command, names, address, _given(store), *(["--json"] if as_json else []))
    for text, stream in ((answer.stdout, sys.stdout), (answer.stderr, sys.stderr)):
        if text:
            print(text, file=stream)
    raise typer.Exit(answer.code)


def _planned(step: Step, state: State) -> dict[str, Any]:
    return {
        "name": step.name,
        "stage": step.stage,
        "key": step.key,
        "state": state,
        "needs": sorted(set(step.needs.values())),
        "resources": step.resources.model_dump(),
    }


def _given(store: str) -> str | None:
    """The store, unless it is this machine's default."""
    return None if store == DEFAULT_STORE else store


def _fail(lines: list[str], code: int) -> None:
    _print_lines(lines)
    raise typer.Exit(code)


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        print(f"graft: {plain(redacted(line))}", file=sys.stderr)


def _resume_line(left: RunRecord) -> str:
    return f"resume with: {left.resume_command()}"


def _trace(details: str, debug: bool) -> None:
    """Tracebacks, for whoever asked for them."""
    for line in details.splitlines() if debug else ():
        print(plain(redacted(line)), file=sys.stderr)


def _view() -> View:
    if sys.stderr.isatty():
        from graftwork.pipeline.cli.live import LiveView

        return LiveView()
    from graftwork.pipeline.cli.plain import PlainView

    return PlainView()


def _report(done: RunRecord, as_json: bool) -> None:
    if as_json:
        document(done.outcome())
        return
    cached = sum(step.state == "cached" for step in done.steps)
    print(f"{done.run}: {done.status}, {cached} of {len(done.steps)} steps from the store")
    show_results(done)


def _find_artifact(store: Store, name: str) -> Manifest:
    from graftwork.pipeline.runs import record

    if "/" in name:
        run_name, step = name.split("/", 1)
        steps = record.find(store, run_name).steps
        keys = [one.key for one in steps if one.name == step]
        if not keys:
            raise SpecError([f"step: got {shown(step)}; accepted: {', '.join(one.name for one in steps)}"])
        name = keys[0]
    matches = [manifest for manifest in store.manifests() if manifest.key.startswith(name)]
    if len(matches) != 1:
        raise SpecError(
            [
                f"artifact: got {shown(name)}, {len(matches)} artifacts in {store.url}; accepted: "
                "the beginning of one key"
            ]
        )
    return matches[0]
