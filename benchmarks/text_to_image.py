"""`text`, `synthesis` and the samples of a row, as a job runs them, against a bare loop of the same network.

    python -m benchmarks.text_to_image [--batches 6] [--rounds 2] [--json FILE]     CPU or GPU: examples/shapes.yaml

The job is that of examples/shapes.yaml with the rootstock that comes with the project, and more samples and texts.

text: captions through a text encoder, in shards. The job's own is done with a text in a fraction of a millisecond, and
    is too small to be measured by: it is another T5, with random weights (--encoder). The bare loop has the tokens of
    each batch in memory.
synthesis: samples of the rootstock. evaluate/rootstock: those of its row, decoded, and judged by GenEval's rules. Their
    bare loop has texts and noise in memory, and leaves latents: it neither decodes, nor judges, nor writes.

Steps are measured while they run, on a Ray of one worker, from a quarter of their work on; `start s` says how long they
took to get there. Bare loops run in this process, on one thread of a CPU. `share of the bare loop` is the median over
rounds of the loop's time over the step's: how busy the step keeps its device. `share by processor time`, on a CPU, is
the same of the processor's seconds, those of the step with all of Ray's processes: it is the telling one on a machine
that is busy with other things. What both compute must agree.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks import report
from benchmarks.artifacts import Folder
from benchmarks.command_line import parser
from benchmarks.engine import Spent, middle, now
from graftwork.cluster.machine import num_cpus
from graftwork.cluster.memory import keep_freed
from graftwork.models import checkpoints
from graftwork.models.condition import Condition
from graftwork.models.numerics.streams import SampleNoise, initialising, seed_of
from graftwork.models.rootstocks import Rootstock
from graftwork.models.sampling.scheduled import new_scheduler
from graftwork.pipeline.planning.plan import Plan, make_plan
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.data import SyntheticData
from graftwork.specs.reading.load import load
from graftwork.specs.sampler import SchedulerSampler
from graftwork.stages.artifacts.latents import SPLITS, read_meta
from graftwork.stages.artifacts.samples import SAMPLES
from graftwork.stages.artifacts.texts import TextTable
from graftwork.stages.contract import Context, Report
from graftwork.stages.evaluation.samples import batches_of, labels_of
from graftwork.stages.features.codec import to_images
from graftwork.stages.registry import STAGES
from graftwork.stages.synthesis import synthesis
from graftwork.stages.text import encode
from graftwork.stages.text.encoder import Folders, TextEncoder

ROOT = Path(__file__).parents[1]
JOB = ROOT / "examples" / "shapes.yaml"
PROMPTS, ROOTSTOCK = (ROOT / "examples" / "shapes" / name for name in ("prompts.txt", "rootstock"))
ROW = "evaluate/rootstock"
APART = 1e-3  # that states and latents of both ways may be, over the largest
MAX_LEVELS = 1  # of 256, that pixels of both may be apart
ENCODER = {"d_model": 256, "d_kv": 64, "num_heads": 4, "d_ff": 1024, "num_layers": 4}
NUM_PROMPTS = 227  # of the example, that are all different
Batch = tuple[Condition, Condition, Tensor]  # texts, empty texts and noise


@dataclass
class Steps:
    """The steps of a job up to the row's samples, each in a folder of its own."""

    home: Path
    plan: Plan
    starts: dict[str, list[float]] = field(default_factory=dict)  # seconds, by step
    done: dict[str, Folder] = field(default_factory=dict)
    runs: int = 0

    def run(self, name: str) -> Spent:
        """Do a step, or do it again; return what it takes a unit from a quarter of its work on."""
        seen: list[tuple[Spent, int]] = []
        context = self.context(name, lambda done, total, metrics=None: seen.append((now(), done)))
        began = now()
        STAGES[self.plan[name].stage].run(context)
        self.done[name] = Folder(self.plan[name].key, context.out)
        if not seen:  # a step that says nothing of how far it is
            return now() - began
        ended, total = seen[-1]
        quarter, done = next((at, done) for at, done in seen if done >= total / 4)
        self.starts.setdefault(name, []).append((quarter - began).wall)
        return (ended - quarter).each(max(1, total - done))

    def context(self, name: str, reported: Report) -> Context:
        step, self.runs = self.plan[name], self.runs + 1
        store = Store(str(self.home / f"store-{self.runs}"))
        return Context(
            step=name,
            params=step.params,
            inputs={role: self.done[needed] for role, needed in step.needs.items()},
            out=store.workplace(step.key),
            partial=store.partial(step.key),
            report=reported,
            resources=step.resources,
            device=torch.device("cpu"),
        )


@dataclass(frozen=True)
class Compared:
    """A step, and the bare loop of the same network on the same inputs."""

    steps: Steps
    name: str
    units: int  # texts or samples
    bare: Callable[[], list[Tensor]]  # what it computes, batch by batch
    apart: Callable[[list[Tensor]], float]  # how far the step's artifact is from that
    device: torch.device

    def row(self, rounds: int) -> dict[str, Any]:
        """Return what is measured of both, in turn; AssertionError if they do not agree."""
        expected = self.bare()  # also to warm up
        bare, step = list[Spent](), list[Spent]()
        for _ in range(rounds):
            bare.append(self.bare_spent())
            step.append(self.steps.run(self.name))
        apart = self.apart(expected)
        assert apart <= 1, f"{self.name}: the step and the bare loop are {apart:.2g} times as far apart as may be"
        figures: dict[str, Any] = {"step": self.name, "unit": "text" if self.name == "text" else "sample"}
        for way, spent in (("bare loop", bare), ("step", step)):
            figures[f"{way}, ms a unit"] = middle(spent).wall * 1e3
        figures["share of the bare loop"] = report.ratio([one.wall for one in bare], [one.wall for one in step])
        if self.device.type == "cpu":
            figures["share by processor time"] = report.ratio([one.cpu for one in bare], [one.cpu for one in step])
        start = statistics.median(self.steps.starts[self.name])
        return figures | {"start s": start, "apart, of what may be": apart}

    def bare_spent(self) -> Spent:
        """Return what the bare loop takes a unit."""
        cpu = time.process_time()
        seconds = report.timed(self.bare, self.device)
        return Spent(seconds, time.process_time() - cpu).each(self.units)


# -- the text encoder


def text_of(home: Path, shards: int, shape: Mapping[str, int], device: torch.device) -> Compared:
    """Return the step `text` for so many shards of texts, and an encoder of that shape."""
    write_encoder(home / "encoder", shape)
    settings = [f"text.path={home / 'encoder'}", f"data.samples={shards * encode.SHARD}"]
    steps = steps_of(home, shards * encode.SHARD, settings, device)
    steps.run("features")
    params: Any = steps.plan["text"].params
    encoder = TextEncoder(params.text, params.tokens, device)
    captions = read_meta(steps.done["features"].place).classes
    batches = list(text_batches(encoder, captions))

    @torch.no_grad()
    def bare() -> list[Tensor]:
        return [encoder.model(tokens, attention_mask=mask).last_hidden_state for _, tokens, mask in batches]

    def apart(expected: list[Tensor]) -> float:
        table, furthest = TextTable(steps.done["text"].place), 0.0
        for (labels, _, mask), states in zip(batches, expected, strict=True):
            theirs = torch.cat([table.states(label) for label in labels])
            ours = states[mask.bool()].cpu()
            furthest = max(furthest, float((ours - theirs).abs().max() / ours.abs().max()))
        return furthest / APART

    return Compared(steps, "text", len(captions), bare, apart, device)


def write_encoder(folder: Path, shape: Mapping[str, int]) -> None:
    """Leave a T5 of that shape with random weights, and the tokenizer of the project's own."""
    from transformers import T5Config, T5EncoderModel

    own = Folders(str(ROOTSTOCK))
    with initialising(0, "encoder"):
        T5EncoderModel(T5Config(**{**own.config, **shape})).save_pretrained(folder / "text_encoder")
    shutil.copytree(own.tokenizer, folder / "tokenizer")


def text_batches(encoder: TextEncoder, texts: Sequence[str]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield the labels of a batch's texts, their tokens and the mask: of each shard, texts of like length together."""
    for start in range(0, len(texts), encode.SHARD):
        numbers = dict(enumerate(encoder.tokenizer(texts[start : start + encode.SHARD]), start))
        order = sorted(numbers, key=lambda label: len(numbers[label]))
        for first in range(0, len(order), encoder.text.batch):
            labels = order[first : first + encoder.text.batch]
            rows = [torch.tensor(numbers[label]) for label in labels]
            tokens, mask = (pad_sequence(each, batch_first=True) for each in (rows, list(map(torch.ones_like, rows))))
            yield labels, tokens.to(encoder.device), mask.to(encoder.device)


# -- the rootstock


def samples_of(home: Path, batches: int, device: torch.device) -> list[Compared]:
    """Return the steps `synthesis` and `evaluate/rootstock`, of so many batches each."""
    job = load(JOB)
    assert isinstance(job.data, SyntheticData)
    sizes = {"data.samples": batches * job.data.batch, "evaluate.samples": batches * job.evaluate.batch}
    steps = steps_of(home, NUM_PROMPTS, [f"{name}={size}" for name, size in sizes.items()], device)
    for name in ("features", "text", "base"):
        steps.run(name)
    model = checkpoints.load(steps.done["base"].place)[0].to(device).eval()
    meta, texts = read_meta(steps.done["features"].place), TextTable(steps.done["text"].place)

    def batch(seed: int, numbers: Sequence[int], labels: Tensor) -> Batch:
        condition = texts(Condition(labels=labels)).to(device)
        return condition, texts.conditioner.null(condition), SampleNoise(seed, numbers, meta.shape, device)()

    def synthesised() -> list[Batch]:
        params: Any = steps.plan["synthesis"].params
        folder, seed = steps.done["features"].place, seed_of(params.seed, "synthesis")
        shards = [shard for split in SPLITS for shard in synthesis.shards(folder, split, params.batch)]
        parts = [part for shard in shards for part in shard.batches]
        return [batch(seed, part.numbers, torch.tensor(part.labels)) for part in parts]

    def of_row() -> list[Batch]:
        params: Any = steps.plan[ROW].params
        parts = [part.samples for part in batches_of(params, ())]
        first = texts.meta.captions  # the label of the first prompt
        labels = [first + labels_of(part, params.samples, len(texts.meta.prompts)) for part in parts]
        return [batch(params.seed, part, one) for part, one in zip(parts, labels, strict=True)]

    def latents_apart(expected: list[Tensor]) -> float:
        folder, theirs = steps.done["synthesis"].place, torch.cat(expected).cpu()
        files = [path for split in SPLITS for path in sorted(folder.glob(f"{split}_latents-*.npy"))]
        ours = torch.cat([torch.from_numpy(np.load(path)) for path in files])
        return float((ours - theirs).abs().max() / theirs.abs().max()) / APART

    def pixels_apart(expected: list[Tensor]) -> float:
        ours = torch.from_numpy(np.load(steps.done[ROW].place / SAMPLES)).int()
        theirs = torch.from_numpy(to_images(torch.cat(expected))).int()
        return float((ours - theirs).abs().max()) / MAX_LEVELS

    compared = []
    for name, todo, apart in (("synthesis", synthesised(), latents_apart), (ROW, of_row(), pixels_apart)):
        sampler = steps.plan[name].params.sampler  # type: ignore[attr-defined]
        bare = partial(drawn, model, todo, sampler, meta.bounded)
        compared.append(Compared(steps, name, sum(len(noise) for _, _, noise in todo), bare, apart, device))
    return compared


@torch.no_grad()
def drawn(model: Rootstock, batches: Sequence[Batch], sampler: SchedulerSampler, bounded: bool) -> list[Tensor]:
    """Return the latents of each batch: the scheduler's loop with guidance, written plainly."""
    found = []
    for text, empty, noise in batches:
        x, scheduler, both = noise, new_scheduler(sampler, "epsilon", bounded), text.join(empty)
        scheduler.set_timesteps(sampler.steps, device=x.device)
        for moment in scheduler.timesteps:
            output = model(torch.cat([x, x]), moment.expand(2 * len(x)), both)[:, : x.shape[1]]
            conditional, without = output.chunk(2)
            x = scheduler.step(without + sampler.guidance * (conditional - without), moment, x).prev_sample
        found.append(x)
    return found


# -- the steps


def steps_of(home: Path, num_texts: int, settings: Sequence[str], device: torch.device) -> Steps:
    """Return the example's steps with other settings, for so many captions: prompts, and pairs of prompts."""
    prompts = PROMPTS.read_text().splitlines()
    pairs = (f"{one}, {other}" for one, other in itertools.product(prompts, prompts))
    texts = itertools.islice(itertools.chain(prompts, pairs), num_texts)
    home.mkdir(exist_ok=True)
    (home / "prompts.txt").write_text("\n".join(texts) + "\n")
    settings = [
        *settings,
        f"data.prompts={home / 'prompts.txt'}",
        "text.truncate=true",  # pairs have more tokens than the example's model takes
        "distill.samples=1",
        "distill.heldout=1",
        "evaluate.keep_samples=true",
    ]
    if device.type == "cuda":
        settings += [f"resources.{stage}.gpu=1" for stage in ("text", "evaluate")]
    return Steps(home, make_plan(load(JOB, settings)))


def measured(asked: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each step. Ray must have begun, and the project's folder be the current one."""
    with tempfile.TemporaryDirectory() as folder:
        home, shape = Path(folder), dict(zip(ENCODER, asked.encoder, strict=True))
        compared = [text_of(home / "texts", asked.batches, shape, device)]
        compared += samples_of(home / "samples", asked.batches, device)
        return [each.row(asked.rounds) for each in compared]


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--batches", type=int, default=6, help="of samples in each step; shards of texts")
    made.add_argument("--encoder", type=int, nargs=len(ENCODER), default=list(ENCODER.values()), metavar="N",
                      help=f"the shape of the T5: {', '.join(ENCODER)}")  # fmt: skip
    made.add_argument("--rounds", type=int, default=2)
    return made


def main() -> None:
    asked, device = arguments().parse_args(), report.fastest_device()
    torch.set_num_threads(1)  # as every task of a job
    keep_freed()
    cpus = num_cpus() if device.type == "cuda" else 1  # one worker: what is left of a machine reads and gathers
    with contextlib.chdir(ROOT):
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        rows = measured(asked, device)
        ray.shutdown()
    facts = {"batches": asked.batches, "encoder": asked.encoder, "rounds": asked.rounds}
    report.show("Text to image: how busy a step keeps its device", rows, facts, asked.json)


if __name__ == "__main__":
    import_module("benchmarks.text_to_image").main()  # by its name, under which Ray's workers find its functions
