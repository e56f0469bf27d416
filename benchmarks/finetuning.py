"""Finetuning a DiT against the plain training loop, on one device; with --scaling also on one and two CPU workers.

    python -m benchmarks.finetuning [--json FILE] [--scaling]

The plain loop is that of DiT's training script: a file a latent and a file a label, read by torch's DataLoader; AdamW
as torch has it by default; an EMA moved parameter by parameter in Python; the diffusion's constants moved to the device
where they are used; the loss asked for at every step. Both loops have the same initial weights, batches, timesteps and
noise; the plain one is given its noise on the device, for nothing. Its weights at the end are what ours are held to:
`apart` is the distance between the two over how far the plain loop's weights moved (without the keys' biases: they
cancel in the softmax, so their gradient is rounding alone, which Adam scales up).

`times_faster` is the median over rounds, `ms_a_step` the best of them, `median_ms` the median over the last round's
steps, on a GPU by its own clock. `cpu_ms_a_step` is the time that the loop's own process spent on a core, all threads,
without the DataLoader's processes: what other work on the machine blurs least.
`floor_ms` is the FLOPs of a step (three forward passes) over those of a large matrix product, `of_peak` that over what
was measured, `data_wait` the share of the time in which the loop waited for a batch. On a GPU the model is DiT-XL/2 at
256 px with a worker's part of the published batch, in bf16; on a CPU a small one on one thread. One more row is
DeepSpeed's engine, where it can be imported; in bf16 it keeps the weights of the passes in bf16, where the others cast.

--scaling launches the finetune's own path (the launcher, DeepSpeed, gloo) on one and on two CPU workers, and one worker
with half of the batch, also while another one trains beside it: what two take longer than that is communication. It
wants more steps than the default: --warmup 5 --points 30.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import command_line, report
from graftwork.models.condition import Condition
from graftwork.models.measures.costs import forward_flops, num_parameters
from graftwork.models.numerics.precision import computing, products
from graftwork.models.numerics.streams import initialising
from graftwork.models.objectives.gaussian import Diffusion
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.specs.resources import StepResources
from graftwork.specs.training import FinetuneSpec, Precision
from graftwork.stages.artifacts.latents import Latents
from graftwork.stages.contract import Stopped
from graftwork.stages.training.batches import Batch, TrainingSet, draw_batch, shuffled
from graftwork.stages.training.engine import PlainEngine
from graftwork.stages.training.loop import POINTS, set_up_blocks, train

SEED, STREAM = 0, "finetune"


@dataclass(frozen=True)
class Work:
    """What every loop does."""

    config: DiTConfig
    batch: int
    samples: int
    warmup: int  # steps before the clock starts
    steps: int  # that are timed
    precision: Precision
    zero: int = 2

    def recipe(self, **changes: Any) -> FinetuneSpec:
        """With a point of the loss curve every `warmup` steps; the last step is never reached."""
        return FinetuneSpec(
            **{
                "steps": POINTS * self.warmup,
                "batch": self.batch,
                "warmup": 0,
                "clip": 1.0,
                "precision": self.precision,
                "deepspeed": {"zero": self.zero},
                "checkpoint_every": POINTS * self.warmup,
                **changes,
            }
        )

    def model(self, device: torch.device) -> DiT:
        """As published, but for the layers that start as zero, behind which nothing else would learn at first."""
        with initialising(SEED, "benchmark"):
            model = DiT(self.config)
            model.initialise()
            for module in (*model.blocks, model.final_layer):
                nn.init.normal_(module.adaLN_modulation[1].weight, std=0.02)
            nn.init.normal_(model.final_layer.linear.weight, std=0.02)
        return model.to(device)

    def latents(self) -> tuple[Tensor, Tensor]:
        draws = torch.Generator().manual_seed(SEED)
        config = self.config
        x = torch.randn(self.samples, config.in_channels, config.input_size, config.input_size, generator=draws)
        return x, torch.arange(self.samples) % config.num_classes


@dataclass
class Clock:
    """Asked before each step whether to stop, it times those after the warm-up; it alone waits for the device."""

    work: Work
    device: torch.device
    asked: int = 0
    began: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of this process, all threads
    marks: list[report.Mark] = field(default_factory=list)  # the beginnings of the steps that are timed

    def __call__(self) -> bool:
        done = self.asked
        self.asked += 1
        if done in (self.work.warmup, self.work.warmup + self.work.steps):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter(), time.process_time()
            self.seconds, self.cpu_seconds = (end - start for start, end in zip(self.began, now, strict=True))
            self.began = now
        if done >= self.work.warmup:
            self.marks.append(report.mark(self.device))
        return done == self.work.warmup + self.work.steps

    def outcome(self, data_wait: float, weights: dict[str, Tensor]) -> Outcome:
        step = statistics.median(report.seconds_between(self.marks))
        return Outcome(self.seconds, self.cpu_seconds, step, data_wait, weights)


@dataclass
class Waits:
    """Takes a training's reports, and keeps the shares of the time that it waited for data."""

    shares: list[float] = field(default_factory=list)

    def __call__(self, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        if metrics and "data_wait" in metrics:
            self.shares.append(metrics["data_wait"])

    @property
    def share(self) -> float:
        """After the warm-up; only the first worker is told."""
        return fmean(self.shares[1:] or [0.0])


class NothingKept:
    """Takes a training's checkpoints, and drops them."""

    def save(self, name: str, write: Callable[[Path], object]) -> None:
        pass

    def load(self, name: str) -> Path | None:
        return None


@dataclass
class Outcome:
    """What a loop came to."""

    seconds: float
    cpu_seconds: float
    step: float  # the median's seconds
    data_wait: float
    weights: dict[str, Tensor]


# -- the plain loop


class PerSampleFiles(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """A file a latent and a file a label."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, latents: Tensor, labels: Tensor) -> None:
        for index, (latent, label) in enumerate(zip(latents.numpy(), labels.numpy(), strict=True)):
            np.save(self.folder / f"{index}-latent.npy", latent)
            np.save(self.folder / f"{index}-label.npy", label)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        latent, label = (np.load(self.folder / f"{index}-{part}.npy") for part in ("latent", "label"))
        return torch.from_numpy(latent), torch.from_numpy(label)


def plain_loop(
    work: Work, files: PerSampleFiles, given: list[Batch], loader_workers: int, device: torch.device
) -> Outcome:
    """given: the timesteps, noise and dropped labels of each step, on the device."""
    recipe, model, diffusion = work.recipe(), work.model(device), Diffusion()
    average = copy.deepcopy(model).requires_grad_(False)
    adam = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=0.0)
    order = [shuffled(work.samples, step * work.batch, work.batch, SEED, STREAM).tolist() for step in range(len(given))]
    loader = torch.utils.data.DataLoader(
        files, batch_sampler=order, num_workers=loader_workers, pin_memory=device.type == "cuda"
    )
    clock, losses, waited = Clock(work, device), 0.0, 0.0
    network = autocast(model, work, device)
    batches = iter(loader)
    for step, drawn in enumerate(given):
        clock()
        began = time.perf_counter()
        x, y = next(batches)
        waited += (time.perf_counter() - began) * (step >= work.warmup)
        x, y = x.to(device), y.to(device)
        null = work.config.num_classes
        condition = Condition(labels=torch.where(drawn.condition.require("labels") == null, null, y))
        loss = diffusion.loss(network, x, drawn.t, condition, drawn.noise).mean()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        adam.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.mul_(recipe.ema).add_(value, alpha=1 - recipe.ema)
        losses += loss.item()
    clock()
    return clock.outcome(waited / clock.seconds, dict(model.cpu().named_parameters()))


# -- ours


def our_loop(
    work: Work, data: TrainingSet, make: Callable[[DiT, FinetuneSpec], Any], compiled: bool = False
) -> Outcome:
    """make: the engine, of the model."""
    recipe, model = work.recipe(compile=compiled), work.model(data.device)
    clock, waits = Clock(work, data.device), Waits()
    set_up_blocks(model, recipe)
    engines = []

    def make_engine(state: Mapping[str, Tensor] | None) -> Any:
        engines.append(make(model, recipe))
        return engines[0]

    with suppress(Stopped):  # by the clock
        train(make_engine, data, recipe, seed=SEED, stream=STREAM, partial=NothingKept(), report=waits, stopping=clock)
    state = engines[0].state()
    weights = {name.removeprefix("weights/"): state[name] for name in state if name.startswith("weights/")}
    return clock.outcome(waits.share, weights)


def plain_engine(model: DiT, recipe: FinetuneSpec) -> PlainEngine:
    return PlainEngine(
        model, betas=recipe.betas, clip=recipe.clip, ema=recipe.ema, precision=recipe.precision, state=None
    )


def sharded_engine(model: DiT, recipe: FinetuneSpec) -> Any:
    from graftwork.cluster.training.deepspeed_engine import ShardedEngine

    return ShardedEngine(model, recipe, None)


def autocast(model: nn.Module, work: Work, device: torch.device) -> Any:
    def network(*inputs: Tensor) -> Tensor:
        with computing(work.precision, device):
            return model(*inputs)

    return network


# -- one device


@torch.no_grad()
def apart(ours: Outcome, plain: Outcome, start: DiT) -> float:
    """How far the two ended from each other, over how far the plain loop came."""
    distance = moved = 0.0
    for name, value in start.cpu().named_parameters():
        found, wanted, before = (part.double().clone() for part in (ours.weights[name], plain.weights[name], value))
        if name.endswith("qkv.bias"):
            for part in (found, wanted, before):
                part.chunk(3)[1].zero_()
        distance += (found - wanted).square().sum().item()
        moved += (wanted - before).square().sum().item()
    return (distance / moved) ** 0.5


def one_device(
    work: Work, chosen: argparse.Namespace, device: torch.device, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each loop, and what holds for all."""
    latents, labels = work.latents()
    np.save(folder / "latents.npy", latents.numpy())
    mapped = torch.from_numpy(np.load(folder / "latents.npy", mmap_mode="c"))
    data = TrainingSet.of(Latents(mapped, Condition(labels=labels)), work.config, device)
    files = PerSampleFiles(folder)
    files.write(latents, labels)
    recipe = work.recipe()
    given = [draw_batch(data, recipe, SEED, STREAM, step, 0, 1).to(device) for step in range(work.warmup + work.steps)]

    loops: dict[str, Callable[[], Outcome]] = {
        "plain loop": partial(plain_loop, work, files, given, chosen.loader_workers, device),
        "ours": partial(our_loop, work, data, plain_engine),
    }
    if chosen.compile:
        loops["ours, compiled"] = partial(our_loop, work, data, plain_engine, compiled=True)
    if chosen.deepspeed:
        alone(device, folder)
        loops[f"ours, DeepSpeed, ZeRO {work.zero}"] = partial(our_loop, work, data, sharded_engine, chosen.compile)
    outcomes: dict[str, Outcome] = {}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in loops}
    memory: dict[str, float | None] = {}

    def run(name: str) -> float:
        with report.peak_memory(device) as peak:
            outcomes[name] = loops[name]()
            memory[name] = peak()
        cpu_seconds[name].append(outcomes[name].cpu_seconds)
        return outcomes[name].seconds

    seconds = report.in_turn({name: partial(run, name) for name in loops}, chosen.rounds)

    limits = report.limits(device, work.precision)
    model = work.model(torch.device("cpu"))
    flops = 3 * work.batch * forward_flops(model)
    floor = limits.floor_seconds(flops)
    rows = []
    for name, outcome in outcomes.items():
        step = min(seconds[name]) / work.steps
        rows.append(
            {
                "loop": name,
                "ms_a_step": 1e3 * step,
                "median_ms": 1e3 * outcome.step,
                "times_faster": report.ratio(seconds["plain loop"], seconds[name]),
                "cpu_ms_a_step": 1e3 * min(cpu_seconds[name]) / work.steps,
                "floor_ms": 1e3 * floor,
                "of_peak": floor / step,
                "data_wait": outcome.data_wait,
                "apart": apart(outcome, outcomes["plain loop"], model),
                **({"peak_gb": memory[name]} if device.type == "cuda" else {}),
            }
        )
    facts = {
        "parameters": num_parameters(model),
        "batch": work.batch,
        "precision": work.precision,
        "steps": work.steps,
        "rounds": chosen.rounds,
        "peak_flops": limits.flops,
    }
    return rows, facts


def alone(device: torch.device, folder: Path) -> None:
    """The group of one worker that DeepSpeed wants."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)


# -- strong scaling


def scaling(work: Work, folder: Path, path: Path | None) -> None:
    from graftwork.cluster.session.runtime import session

    half = replace(work, batch=work.batch // 2)
    with session([StepResources()], min_parallel=3):
        one, two, part = (
            launched(one_work, workers, folder) for one_work, workers in ((work, 1), (work, 2), (half, 1))
        )
        with ThreadPoolExecutor(2) as pool:
            beside = list(pool.map(lambda name: launched(half, 1, folder, name), ("left", "right")))
    crowded = fmean(found["ms"] for found in beside)
    rows = [
        {"workers": workers, "batch": batch, "ms_a_step": ms, "times_faster": one["ms"] / ms}
        for workers, batch, ms in (
            ("1", work.batch, one["ms"]),
            ("2", work.batch, two["ms"]),
            ("1", half.batch, part["ms"]),
            ("1 beside 1 of another training", half.batch, crowded),
        )
    ]
    facts = {
        "steps": work.steps,
        "parameters": num_parameters(work.model(torch.device("cpu"))),
        "efficiency": one["ms"] / two["ms"] / 2,
        "of two workers' step: half of the batch alone": part["ms"] / two["ms"],
        "what two take from each other": (crowded - part["ms"]) / two["ms"],
        "the rest: communication, and waiting for each other": 1 - crowded / two["ms"],
        "collectives of a step, alone": two["collectives_ms"] / two["ms"],
        "data_wait": two["data_wait"],
    }
    report.show("Strong scaling of the launched finetune, CPU workers", rows, facts, path)


def launched(work: Work, workers: int, folder: Path, name: str = "") -> dict[str, float]:
    """What the first of so many workers measured."""
    from graftwork.cluster.training.launcher import launch

    found = folder / f"{workers}-{work.batch}{name}.json"
    launch(partial(one_worker, work, found), None, work.recipe(workers=workers), StepResources(), last=True)
    return json.loads(found.read_text())


def one_worker(work: Work, found: Path, _: object, device: torch.device) -> None:
    latents, labels = work.latents()
    data = TrainingSet.of(Latents(latents, Condition(labels=labels)), work.config, device)
    outcome = our_loop(work, data, sharded_engine)
    size = num_parameters(work.model(device))
    collectives = report.best(partial(one_steps_collectives, size), device)
    if dist.get_rank() == 0:
        figures = {
            "ms": 1e3 * outcome.seconds / work.steps,
            "collectives_ms": 1e3 * collectives,
            "data_wait": outcome.data_wait,
        }
        found.write_text(json.dumps(figures))


def one_steps_collectives(size: int) -> None:
    """What ZeRO 2 sends each step: gradients to be summed, and each worker's part of the weights to all."""
    workers = dist.get_world_size()
    gradients = torch.zeros(-(-size // workers) * workers)
    dist.all_reduce(gradients)
    dist.all_gather_into_tensor(torch.empty_like(gradients), gradients.chunk(workers)[0].clone())


# -- the command line


def main() -> None:
    device = report.fastest_device()
    chosen = options(device.type == "cuda").parse_args()
    work = work_of(chosen)
    with tempfile.TemporaryDirectory(prefix="graftwork-benchmark-") as name:
        if chosen.scaling:
            scaling(work, Path(name), chosen.json)
            return
        if device.type == "cpu":
            torch.set_num_threads(1)  # as every task of a job
        with products(work.precision):  # of the plain loop's backward passes, too
            report.show("Finetuning on one device", *one_device(work, chosen, device, Path(name)), chosen.json)


def work_of(chosen: argparse.Namespace) -> Work:
    return Work(
        DiTConfig(
            input_size=chosen.side,
            in_channels=chosen.channels,
            patch=chosen.patch,
            depth=chosen.depth,
            width=chosen.width,
            heads=chosen.heads,
            num_classes=chosen.classes,
        ),
        chosen.batch,
        chosen.samples,
        chosen.warmup,
        chosen.warmup * chosen.points,
        chosen.precision,
    )


def options(on_gpu: bool) -> argparse.ArgumentParser:
    parser = command_line.parser(__doc__)
    sizes = {  # on a GPU (DiT-XL/2 at 256 px, 256 samples a step over 8 devices), on a CPU
        "side": (32, 16, "latent pixels a side"),
        "channels": (4, 4, "of a latent"),
        "patch": (2, 2, "latent pixels along a token's side"),
        "depth": (28, 4, "blocks"),
        "width": (1152, 128, "channels of a token"),
        "heads": (16, 4, "of attention"),
        "classes": (1000, 10, "labels"),
        "samples": (4096, 1024, "latents to train on"),
        "batch": (32, 32, "samples a step"),
        "warmup": (10, 2, "steps before the clock starts"),
        "points": (5, 3, "times as many steps as those are timed"),
        "rounds": (3, 7, "of all loops in turn"),
        "loader-workers": (4, 1, "processes of the plain loop's DataLoader"),
    }
    for name, (large, small, meaning) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=large if on_gpu else small, help=meaning)
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="bf16" if on_gpu else "fp32")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--compile", action=flag, default=on_gpu, help="a row with compiled blocks")
    parser.add_argument("--deepspeed", action=flag, default=find_spec("deepspeed") is not None, help="a row with it")
    parser.add_argument("--scaling", action="store_true", help="one and two CPU workers instead")
    return parser


if __name__ == "__main__":
    import_module("benchmarks.finetuning").main()  # by its name, under which Ray's workers find its functions
