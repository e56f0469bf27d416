"""Samples of one row of the table: fixed batches, each a task of its own with its own noise, judged where it is drawn.

What comes back of a batch are the judges' features, which the step adds to its sums in the order of the batches: its
memory does not grow with the samples, and neither the number of workers nor a kill shows in a bit of the sums. A kill
loses SAVE_SECONDS of work and the batches that are under way. What a metric needs of every sample, and samples that are
kept, lie in a file a batch until they are all there.

Leaves what `Scores.write` does, `grid.png`, and what metrics keep of samples: `<metric>.<name>.npy`, or features that
several share by their name; and with `evaluate.keep_samples` what `stages.artifacts.samples` reads.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftwork.cluster.fan_out import fan_out
from graftwork.models.condition import Condition
from graftwork.models.numerics.precision import computing
from graftwork.models.numerics.streams import SampleNoise
from graftwork.models.objectives import Network
from graftwork.models.rootstocks import Rootstock
from graftwork.models.sampling import sample
from graftwork.specs.sampler import Sampler
from graftwork.stages.artifacts.hybrids import row_model
from graftwork.stages.artifacts.latents import LatentsMeta, read_meta
from graftwork.stages.artifacts.samples import LABELS, SAMPLES
from graftwork.stages.catalog.evaluate import SampleParams
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.judges import Judges, Scores, Verdict
from graftwork.stages.evaluation.subjects import subjects
from graftwork.stages.features.codec import Coder, load_codec

SAVE_SECONDS = 10.0  # between two checkpoints
STATE = "scores.safetensors"
KEPT_MODELS = 4  # rows whose batches may come to one process in turn
ALL_SAMPLES = Path(SAMPLES).stem


@dataclass(frozen=True)
class Batch:
    """Samples that are drawn together, and the places among them of those in the row's picture."""

    samples: range
    in_picture: tuple[int, ...]


@dataclass(frozen=True)
class Drawn:
    """What comes back of a batch."""

    verdict: Verdict
    in_picture: NDArray[np.uint8]
    arrays: Mapping[str, NDArray[Any]]  # what the row keeps of the batch, by the names of the files without the suffix


@dataclass
class Progress:
    """What is kept of the batches so far."""

    batches: int
    scores: Scores
    in_picture: NDArray[np.uint8] | None = None  # samples in the picture
    num_saved: Counter[str] = field(default_factory=Counter)  # first batches, of each array that the row keeps

    def add(self, drawn: Drawn) -> None:
        self.batches += 1
        self.scores.add(drawn.verdict)
        self.num_saved.update(drawn.arrays.keys())
        self.in_picture = (
            drawn.in_picture if self.in_picture is None else np.concatenate([self.in_picture, drawn.in_picture])
        )

    def save(self, context: Context) -> None:
        state = {
            "batches": torch.tensor(self.batches),
            "shown": torch.from_numpy(self.in_picture),
            **{f"saved/{name}": torch.tensor(count) for name, count in self.num_saved.items()},
            **self.scores.state(),
        }
        context.partial.save(STATE, partial(save_file, state))


def sample_row(context: Context) -> None:
    from graftwork.stages.pictures.pictures import CELLS, sample_grid  # matplotlib, which the workers do not need

    params: SampleParams = context.params
    told = subjects(context)
    picture_samples = picture_samples_of(params.samples, len(told.names), CELLS)
    batches = batches_of(params, picture_samples)
    progress = _resumed(context, batches)
    saved = time.monotonic()
    context.report(progress.scores.count, params.samples)
    missing = batches[progress.batches :]
    for batch, drawn in zip(missing, fan_out(sample_batch, context, missing, context.resources), strict=True):
        for name, rows in drawn.arrays.items():
            context.partial.save(_file(name, batch), partial(_save, rows))
        progress.add(drawn)
        context.report(progress.scores.count, params.samples)
        stopping = context.stopping()
        if stopping or time.monotonic() - saved > SAVE_SECONDS:
            progress.save(context)
            saved = time.monotonic()
        if stopping:
            context.stop_if_asked()
    progress.scores.write(context.out)
    turns = labels_of(range(params.samples), params.samples, len(told.names))
    for name, count in progress.num_saved.items():
        _gather(context, name, batches[:count])
    if params.keep_samples:
        np.save(context.out / LABELS, turns.numpy())
    assert progress.in_picture is not None
    sample_grid(
        progress.in_picture,
        [told.names[turn] for turn in turns[picture_samples]],
        params.row,
        context.out / "grid",
    )


def batches_of(params: SampleParams, in_picture: Sequence[int]) -> list[Batch]:
    starts = range(0, params.samples, params.batch)
    samples = [range(start, min(start + params.batch, params.samples)) for start in starts]
    return [Batch(part, tuple(index - part.start for index in in_picture if index in part)) for part in samples]


def picture_samples_of(samples: int, num_classes: int, cells: int) -> list[int]:
    """Return the picture's samples: the first ones, or those of evenly spaced classes if there are too few cells."""
    turn = min(samples, num_classes)
    return [cell * turn // cells for cell in range(cells)] if turn > cells else list(range(min(samples, cells)))


def _resumed(context: Context, batches: Sequence[Batch]) -> Progress:
    """What the last checkpoint holds; nothing, where samples or features to be kept of it are damaged."""
    params: SampleParams = context.params
    path = context.partial.load(STATE)
    if path is not None:
        state = load_file(path)
        done = int(state["batches"]) if "count" in state else 0  # of before, by other names
        saved = _saved(state) | ({ALL_SAMPLES: done} if params.keep_samples else {})  # of before, without a count
        files = [context.partial.load(_file(name, batch)) for name in saved for batch in batches[: saved[name]]]
        if done and None not in files:
            return Progress(done, Scores.of_state(state, params.metrics), state["shown"].numpy(), Counter(saved))
    return Progress(0, Scores())


def _saved(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return of how many batches, the first ones, a checkpoint says that each array is saved."""
    names = (name for name in state if name.startswith("saved/"))
    return {name.removeprefix("saved/"): int(state[name]) for name in names}


def labels_of(indices: Iterable[int], total: int, num_classes: int) -> Tensor:
    """Return the labels of some of `total` samples: they take turns, sample i is of class i modulo their number.

    Those of a last turn that is not full are spread over all classes, which the first few would not stand for.
    """
    rest = total % num_classes
    full = total - rest
    return torch.tensor(
        [index % num_classes if index < full else (index - full) * num_classes // rest for index in indices]
    )


def draw(
    network: Network,
    model: Rootstock,
    meta: LatentsMeta,
    indices: Sequence[int],
    condition: Condition,
    sampler: Sampler,
    seed: int,
    device: torch.device,
) -> Tensor:
    """Return latents of the samples with these indices: the same for any batch that they come in, up to rounding.

    model: the network's, which says what it predicts and what it is told; the network may be code compiled from it.
    """
    if model.texts is not None:  # read once for all passes
        condition = model.texts(condition)
    return sample(
        network,
        condition.to(device),
        SampleNoise(seed, indices, meta.shape, device),
        sampler=sampler,
        conditioner=model.conditioner,
        objective=model.config.objective,
        bounded=meta.bounded,
    )


def sample_batch(context: Context, batch: Batch, device: torch.device) -> Drawn:
    params: SampleParams = context.params
    loaded = _loaded(context, device)
    meta = read_meta(context.input("features"))
    told = subjects(context)
    labels = told.first + labels_of(batch.samples, params.samples, len(told.names))
    condition = Condition(labels=labels)
    with computing(params.precision, device):
        latents = draw(
            loaded.network, loaded.model, meta, batch.samples, condition, params.sampler, params.seed, device
        )
    images = loaded.codec.decode(latents)
    verdict = loaded.judges.look(images, labels, batch.samples.start)
    arrays = verdict.arrays() | ({ALL_SAMPLES: images} if params.keep_samples else {})
    return Drawn(verdict.cpu(), images[list(batch.in_picture)], arrays)


@dataclass(frozen=True)
class Loaded:
    """All that a batch of a row needs on its device."""

    network: Network
    model: Rootstock
    codec: Coder
    judges: Judges


_LOADED: dict[tuple[object, ...], Loaded] = {}


def _loaded(context: Context, device: torch.device) -> Loaded:
    """What a process that draws several batches of a row loads, and compiles, once."""
    params: SampleParams = context.params
    # The key of the features stands for the VAE's content.
    keys = (context.inputs[role].key for role in sorted(context.inputs))
    networks = (params.detector, params.clip, params.dino, params.likeness, params.inception)
    identity = (params.row, params.metrics, *networks, params.keep_samples, params.compile, *keys)
    if identity not in _LOADED:
        if len(_LOADED) == KEPT_MODELS:
            _LOADED.clear()
        model = row_model(context, params.row, params.seed).to(device)
        judges = Judges(context, params.metrics, params.inception, device)
        codec = load_codec(params.codec, device, min(context.resources.gpu, 1.0))
        _LOADED[identity] = Loaded(network_of(model, params.compile), model, codec, judges)
    return _LOADED[identity]


def network_of(model: Rootstock, compiled: bool) -> Network:
    """Return what samples are drawn with: the model, or code compiled for each shape that it meets."""
    return cast(Network, torch.compile(model, dynamic=False)) if compiled else model


def _gather(context: Context, name: str, batches: Sequence[Batch]) -> None:
    """Put what the row keeps of these batches into one file, without holding it all."""
    last = _load(context, name, batches[-1])
    shape = (batches[-1].samples.start + len(last), *last.shape[1:])
    gathered = np.lib.format.open_memmap(context.out / f"{name}.npy", "w+", last.dtype, shape)
    for batch in batches:
        rows = _load(context, name, batch)
        gathered[batch.samples.start : batch.samples.start + len(rows)] = rows
    gathered.flush()


def _save(rows: NDArray[Any], path: Path) -> None:
    with path.open("wb") as file:  # given a path, numpy would add a suffix to its name
        np.save(file, rows)


def _load(context: Context, name: str, batch: Batch) -> NDArray[Any]:
    path = context.partial.load(_file(name, batch))
    if path is None:
        raise RuntimeError("a batch of samples was damaged after it was drawn; resume to draw all again")
    return np.load(path)


def _file(name: str, batch: Batch) -> str:
    return f"{name}-{batch.samples.start:07d}.npy"
