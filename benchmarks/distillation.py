"""Distillation straight from memory, against the public way through the disk.

    python -m benchmarks.distillation [--json FILE]                        on a CPU: width 384, 12 blocks, 6 sites
    python -m benchmarks.distillation --width 1152 --depth 28 --heads 16 --samples 8000 --compile       on a GPU

The public way (REFERENCE: arXiv 2506.05340's code): one pass of the whole rootstock writes a file a sample and site,
and then, one site after another, every epoch reads the files back through a DataLoader; the loss is asked for at each
step. Its scions are of PyTorch's own layers, unless it is given ours. Ours on a CPU are the steps of a job, run as any
job's are; on a GPU it is the stage itself, all sites in one task. Both start from the same scions, see the same batches
at the same rates, and compute in the same precision: after the first epoch their held-out errors must agree site by
site, and at the end, when rounding has had the time to grow, in the mean over sites. The floor is the FLOPs of the
scions' training, as they are counted in a step, and of one pass of the rootstock up to the last site, over the measured
peak of a matrix product on the same cores.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.artifacts import Folder
from benchmarks.command_line import parser
from benchmarks.operators import with_public_layers
from benchmarks.report import fastest_device, limits, show, timed
from graftwork.cluster.machine import num_cpus
from graftwork.models import checkpoints
from graftwork.models.numerics.precision import computing, products
from graftwork.models.numerics.streams import generator
from graftwork.models.rootstocks import Rootstock
from graftwork.models.rootstocks.dit import Block, DiT, DiTConfig
from graftwork.models.surgery import new_scion, observe
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.costs import rootstock_cost
from graftwork.specs.edits import Edit, OperatorEdits, Site
from graftwork.specs.resources import StepResources
from graftwork.specs.training import DistillSpec
from graftwork.stages.artifacts.latents import LatentsMeta, noised, read, write_meta
from graftwork.stages.catalog.distill import DistillParams
from graftwork.stages.contract import Context, TaskScope
from graftwork.stages.distillation import distill
from graftwork.stages.registry import STAGES

JOB = Path(__file__).parents[1] / "examples" / "digits.yaml"
CLASSES = 10
EXTRACTED = 64  # samples of the public pass
LOADERS = 1  # processes that read files back, beside the one that trains


@dataclass(frozen=True)
class Work:
    """What both ways are to do."""

    inputs: Mapping[str, Folder]
    edits: tuple[Edit, ...]
    recipe: DistillSpec
    place: Path
    device: torch.device
    our_operators: bool  # in the public way, too

    def params(self, edit: Edit) -> DistillParams:
        return DistillParams(seed=0, edit=edit, recipe=self.recipe)


def main() -> None:
    options = arguments()
    device = fastest_device()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        work = prepared(options, Path(folder), device)
        with products(options.precision):
            peak = limits(device, options.precision)
            public, public_errors, written = public_way(work)
        flops = floor_flops(options, work)
        ours, our_errors = (one_task if options.one_task else whole_job)(work)
    pairs = [zip(our_errors[site], public_errors[site], strict=True) for site in our_errors]
    apart = [max(abs(one / other - 1) for one, other in epoch) for epoch in zip(*pairs, strict=True)]
    best = fmean(min(our_errors[site]) / min(public_errors[site]) for site in our_errors) - 1
    rows = [
        {"way": "public, through files", "s": public["all"], "of which extracting": public["extracting"],
         "of peak": flops / peak.flops / public["all"], "GB of activations written": written / 1e9, "ratio": 1.0},
        {"way": "ours, in memory", "s": ours, "of peak": flops / peak.flops / ours,
         "GB of activations written": 0.0, "ratio": public["all"] / ours},
        {"way": "floor", "s": flops / peak.flops, "of peak": 1.0},
    ]  # fmt: skip
    facts = {
        "operator": options.operator,
        "precision": options.precision,
        "sites x samples x epochs": f"{len(work.edits)} x {options.samples} x {options.epochs}",
        "ours": "one task" if options.one_task else f"a job, on {num_cpus()} cores",
        "threads of the public way": torch.get_num_threads(),
        "layers of the public way": "ours" if options.our_operators else "PyTorch's",
        "peak, TFLOP/s": peak.flops / 1e12,
        "held-out errors apart, the worst site, by epoch": " ".join(f"{one:.2g}" for one in apart),
        "best held-out errors apart, mean over sites": best,
    }
    show("Distillation", rows, facts, options.json)
    assert apart[0] < 0.005, "the two ways do not learn the same"
    assert abs(best) < 0.02, "the two ways do not come to the same"


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """line: the command's arguments, or else this process's."""
    made = parser(__doc__)
    made.add_argument("--width", type=int, default=384)
    made.add_argument("--depth", type=int, default=12)
    made.add_argument("--heads", type=int, default=6)
    made.add_argument("--side", type=int, default=32, help="of the latents; patches of 2")
    made.add_argument("--sites", type=int, default=6)
    made.add_argument("--samples", type=int, default=512, help="to train on, and as many held out")
    made.add_argument("--epochs", type=int, default=20)
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--operator", default="hyena_y")
    made.add_argument("--precision", choices=("bf16", "tf32", "fp32"), default="bf16")
    made.add_argument("--compile", action="store_true", help="ours: torch.compile each scion")
    made.add_argument("--one-task", action="store_true", default=torch.cuda.is_available(), help="ours: without Ray")
    made.add_argument("--our-operators", action="store_true", help="the public way with our layers, not PyTorch's own")
    made.add_argument("--folder", type=Path, help="where files are written; by default the system's")
    return made.parse_args(line)


def config_of_options(options: argparse.Namespace) -> DiTConfig:
    return DiTConfig(
        input_size=options.side,
        in_channels=4,
        patch=2,
        depth=options.depth,
        width=options.width,
        heads=options.heads,
        num_classes=CLASSES,
    )


def prepared(options: argparse.Namespace, folder: Path, device: torch.device) -> Work:
    """A rootstock with random weights, and latents of noise: what is computed does not depend on them."""
    features, base = folder / "features", folder / "base"
    features.mkdir()
    base.mkdir()
    draws, shape = np.random.default_rng(0), (4, options.side, options.side)
    for split in ("training", "heldout"):
        latents = draws.standard_normal((options.samples, *shape), dtype=np.float32)
        np.save(features / f"{split}_latents.npy", latents)
        np.save(features / f"{split}_labels.npy", np.arange(options.samples) % CLASSES)
    sizes = {"num_training": options.samples, "num_heldout": options.samples}
    write_meta(features, LatentsMeta(codec="vae", shape=shape, classes=("c",) * CLASSES, **sizes))
    config = config_of_options(options)
    torch.manual_seed(0)
    model = DiT(config)
    model.initialise()
    for block in model.blocks:
        assert isinstance(block, Block)
        last = block.adaLN_modulation[1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.02)  # zero at the start, operators would see no latents
    checkpoints.save(model, (), base)
    chosen = OperatorEdits.model_validate(
        {"target": "mha", "operator": {"kind": options.operator}, "layers": {"kind": "first", "count": options.depth}}
    ).edits(options.depth)
    every = options.depth // options.sites
    recipe = DistillSpec(
        samples=options.samples, epochs=options.epochs, batch=options.batch, loss="l1", precision=options.precision,
        compile=options.compile, checkpoint_every=options.epochs,
    )  # fmt: skip
    inputs = {"features": Folder("f", features), "base": Folder("b", base)}
    edits = tuple(chosen[every - 1 :: every][: options.sites])
    return Work(inputs, edits, recipe, folder, device, options.our_operators)


# -- the public way


class Files(Dataset[tuple[Tensor, Tensor]]):
    """A file a sample: what went in, what came out."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.load(self.folder / f"{index:06d}.pt", weights_only=True)


def public_way(work: Work) -> tuple[dict[str, float], dict[Site, list[float]], int]:
    """Seconds in all and of the extraction, each site's held-out errors by epoch, bytes written."""
    model, _ = checkpoints.load(work.inputs["base"].path())
    model = model.to(work.device)
    start = time.perf_counter()
    written = sum(extract(work, model, split) for split in ("training", "heldout"))
    extracting = time.perf_counter() - start
    errors = {edit.site: train_from_files(work, model, edit) for edit in work.edits}
    return {"all": time.perf_counter() - start, "extracting": extracting}, errors, written


def extract(work: Work, model: Rootstock, split: str) -> int:
    """The rootstock's own forward pass, whole; what passes the sites goes to files in bf16 or fp32."""
    latents = read(work.inputs["features"].path(), split).first(work.recipe.samples)
    shown = noised(latents, model.config.objective, 1, 0, "distill" if split == "training" else "distill/heldout")
    kept = torch.bfloat16 if work.recipe.precision == "bf16" else torch.float32
    sites = [edit.site for edit in work.edits]
    written = 0
    for site in sites:
        (work.place / split / str(site)).mkdir(parents=True)
    for start in range(0, len(shown.t), EXTRACTED):
        part = slice(start, start + EXTRACTED)
        with computing(work.recipe.precision, work.device), torch.no_grad():
            noisy = shown[part].to(work.device)
            # To the last block, as a forward pass goes; one more site says so to `observe`.
            last = Site(block=model.config.depth - 1, target="mlp")
            seen = observe(model, [*sites, last], noisy.z, noisy.t, noisy.condition)
        for site in sites:
            pairs = zip(seen[site].inputs[0].to(kept).cpu(), seen[site].output.to(kept).cpu(), strict=True)
            for offset, (given, put_out) in enumerate(pairs):
                path = work.place / split / str(site) / f"{start + offset:06d}.pt"
                torch.save((given.clone(), put_out.clone()), path)
                written += path.stat().st_size
    return written


def train_from_files(work: Work, model: Rootstock, edit: Edit) -> list[float]:
    """One site's held-out error, epoch by epoch."""
    recipe = work.recipe
    scion = new_scion(model, edit, 0).to(work.device)
    if not work.our_operators:
        scion = with_public_layers(scion)
    optimizer = torch.optim.AdamW(scion.parameters(), lr=recipe.lr, weight_decay=0.0)
    sets = {split: Files(work.place / split / str(edit.site), recipe.samples) for split in ("training", "heldout")}
    errors = []
    for epoch in range(recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * 0.5 ** sum(epoch >= milestone for milestone in recipe.milestones)
        # The shuffling of ours, so that both end in the same scion.
        order = torch.randperm(recipe.samples, generator=generator(0, f"distill/{edit.site}", "epoch", epoch)).tolist()
        for given, put_out in batches(sets["training"], order, recipe.batch):
            loss = step_loss(scion, given, put_out, work)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(scion.parameters(), recipe.clip)
            optimizer.step()
            loss.item()
        total = 0.0
        with torch.no_grad():
            for given, put_out in batches(sets["heldout"], range(recipe.samples), recipe.batch):
                total += step_loss(scion, given, put_out, work).item() * len(given)
        errors.append(total / recipe.samples)
    return errors


def batches(files: Files, order: Sequence[int], batch: int) -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(files, batch, sampler=order, num_workers=LOADERS, pin_memory=torch.cuda.is_available())


def step_loss(scion: nn.Module, given: Tensor, put_out: Tensor, work: Work) -> Tensor:
    given, put_out = (value.to(work.device, non_blocking=True) for value in (given, put_out))
    with computing(work.recipe.precision, work.device):
        answer = scion(given)
    return nn.functional.l1_loss(answer.float(), put_out.float())


# -- ours


def whole_job(work: Work) -> tuple[float, dict[Site, list[float]]]:
    """The steps of a job. Seconds, and each site's held-out errors by epoch. Starting processes is not counted."""
    import ray

    from benchmarks.watching import Unwatched
    from graftwork.cluster.session import runtime
    from graftwork.pipeline.execution.scheduler import Execution
    from graftwork.pipeline.planning.plan import Plan, make_plan
    from graftwork.pipeline.store.manifest import Origin
    from graftwork.specs.reading.load import load

    shape = checkpoints.load(work.inputs["base"].path())[0].config
    blocks = [edit.site.block for edit in work.edits]
    operator, recipe = work.edits[0].operator.model_dump_json(), work.recipe.model_dump_json()
    settings = [
        f"store={work.place / 'job'}",
        f"data={{kind: digits, image_size: {shape.latent_shape[-1]}}}",
        f"model={{kind: dit, depth: {shape.depth}, width: {shape.width}, heads: {shape.heads}, patch: {shape.patch}}}",
        f"graft=[{{target: mha, operator: {operator}, layers: {{kind: explicit, blocks: {blocks}}}}}]",
        f"distill={recipe}",
    ]
    job = load(JOB, settings)
    whole = make_plan(job)
    plan = Plan(job, tuple(step for step in whole.steps if step.stage in ("features", "base", "distill")))
    store = Store(job.store)
    for role, folder in work.inputs.items():
        out = store.workplace(plan[role].key)
        shutil.copytree(folder.path(), out, dirs_exist_ok=True)
        origin = Origin(step=role, run="benchmark", seconds=0.0, made="")
        store.commit(plan[role].key, out, dict(plan[role].identity), origin)
    with runtime.session([step.resources for step in plan.steps], min_parallel=1):
        execution = Execution(plan, store, "benchmark", None, Unwatched())
        ray.get([ray.remote(warm).remote() for _ in range(num_cpus())])
        failures: list[Exception] = []
        seconds = timed(lambda: failures.extend(execution.go()))
    if failures:
        raise failures[0]
    curves = {edit.site: store.artifact(plan[f"distill/{edit.name}"].key).path() / "loss.csv" for edit in work.edits}
    return seconds, {site: heldout_errors(curve) for site, curve in curves.items()}


def warm() -> None:
    """Load what a step of distillation loads; long enough for each core to have one."""
    importlib.import_module(STAGES["distill"].module)
    weight = torch.ones(1, requires_grad=True)
    weight.square().sum().backward()
    torch.optim.AdamW([weight], fused=True).step()  # loads the compiler
    time.sleep(5)


def one_task(work: Work) -> tuple[float, dict[Site, list[float]]]:
    """The stage, for all sites in one task and in this process."""
    seconds = timed(lambda: distil(work, work.edits), work.device)
    return seconds, {edit.site: heldout_errors(out_of(work, edit) / "loss.csv") for edit in work.edits}


def heldout_errors(curve: Path) -> list[float]:
    with curve.open(newline="") as file:
        return [float(row["heldout"]) for row in csv.DictReader(file)]


def out_of(work: Work, edit: Edit) -> Path:
    return work.place / "ours" / edit.name


def distil(work: Work, edits: Sequence[Edit]) -> None:
    """The sites of one task."""
    kept: dict[str, Any] = {}
    for number, edit in enumerate(edits):
        distill.run(context_of(work, edit, edits[number + 1 :], kept))


def context_of(work: Work, edit: Edit, following: Sequence[Edit], kept: dict[str, Any]) -> Context:
    """What the stage gets for a site. kept: what the task's sites leave for each other."""
    out = out_of(work, edit)
    out.mkdir(parents=True)
    return Context(
        step=f"distill/{edit.name}",
        params=work.params(edit),
        inputs=work.inputs,
        out=out,
        partial=Store(str(work.place / "store")).partial(edit.name),
        report=lambda done, total, metrics=None: None,
        resources=StepResources(),
        device=work.device,
        task_scope=TaskScope(next=[work.params(other) for other in following], state=kept),
    )


def floor_flops(options: argparse.Namespace, work: Work) -> float:
    """In each epoch samples are learned from and held-out ones looked at; one pass of the rootstock over all."""
    config = config_of_options(options)
    scion = new_scion(checkpoints.load(work.inputs["base"].path())[0], work.edits[0], 0)
    sample = torch.randn(1, config.place.num_tokens, options.width)
    with FlopCounterMode(display=False) as looking, torch.no_grad():
        scion(sample)
    with FlopCounterMode(display=False) as learning:  # no gradient of what goes in
        scion(sample).sum().backward()
    rootstock = rootstock_cost(config, config.place, 4, CLASSES).flops
    depth = (1 + max(edit.site.block for edit in work.edits)) / options.depth
    an_epoch = len(work.edits) * options.samples * (learning.get_total_flops() + looking.get_total_flops())
    return float(options.epochs * an_epoch + 2 * options.samples * rootstock * depth)


if __name__ == "__main__":
    main()
