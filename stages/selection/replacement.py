"""What scions do to the whole model: its output with some of them in place, held against the rootstock's own.

Every set of scions sees the same latents, timesteps and noise. The rootstock passes once: of its stream before the
blocks where scions begin is kept what there is room for, and the rest is computed again, so that a set of scions costs
the blocks behind its first one.

    error at the output   s = E |out - root|^2 / |root|^2, of the predicted noise or velocity (arXiv 2411.19146, for
                          language models, has it at the logits)
    change of the loss    E [loss - loss of the rootstock], of the objective's training loss

Shapes: B samples of a batch, n samples in all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from graftwork.models.condition import Condition
from graftwork.models.numerics.precision import computing
from graftwork.models.numerics.streams import generator
from graftwork.models.objectives import QUARTERS, Objective
from graftwork.models.rootstocks import Rootstock, Stream
from graftwork.models.rootstocks.parallel import Absorbed, ParallelBlock
from graftwork.models.surgery import new_scion, replace, scion_at
from graftwork.specs.edits import Edit
from graftwork.specs.solve import ScoreSpec
from graftwork.stages.artifacts.evidence import Scored
from graftwork.stages.artifacts.latents import Latents
from graftwork.stages.contract import never


@dataclass(frozen=True)
class Examples:
    """Clean latents with what is drawn for each of them."""

    x0: Tensor  # (n,C,..)
    t: Tensor  # (n,)
    noise: Tensor  # (n,C,..)
    condition: Condition  # of n

    def __len__(self) -> int:
        return len(self.t)

    def split(self, size: int, device: torch.device) -> list[Examples]:
        """Return batches on a device."""
        return [self._of(slice(start, start + size), device) for start in range(0, len(self), size)]

    def _of(self, part: slice, device: torch.device) -> Examples:
        x0, t, noise = (value[part].to(device) for value in (self.x0, self.t, self.noise))
        return Examples(x0, t, noise, self.condition[part].to(device))


def drawn(latents: Latents, objective: Objective, draws: int, seed: int) -> Examples:
    """Return each latent at `draws` timesteps with noise of its own; a latent's draws depend on its place alone."""
    t, noise = [], []
    for index in range(len(latents.x)):
        source = generator(seed, "score", index)
        t.append(objective.draw_t(draws, source))
        noise.append(torch.randn((draws, *latents.x.shape[1:]), generator=source))
    repeated = torch.arange(len(latents.x)).repeat_interleave(draws)
    x0 = latents.tensor().repeat_interleave(draws, 0)
    return Examples(x0, torch.cat(t), torch.cat(noise), latents.condition[repeated])


def read_scion(
    model: Rootstock, edit: Edit, folder: Path, seed: int, device: torch.device, made: Iterable[Edit] = ()
) -> nn.Module:
    """Return a distilled scion, with nothing in common with the model.

    made: edits that are made in any case; a pair among them has those of its blocks.
    """
    if edit.site.target == "pair":
        blocks = {place.block: copy.deepcopy(model.blocks[place.block]) for place in edit.places}
        for other in made:
            if other.site in edit.places:
                model.slots_of(blocks[other.site.block])[other.site.target].fill(new_scion(model, other, seed))
        first, second = (blocks[number] for number in sorted(blocks))
        scion: nn.Module = ParallelBlock(first, second, model.config.width)
    else:
        scion = new_scion(model, edit, seed)
    scion.load_state_dict(load_file(folder / "scion.safetensors"))
    return scion.to(device).eval()


Scions = Mapping[Edit, nn.Module]


@contextmanager
def standing(model: Rootstock, scions: Scions) -> Iterator[None]:
    """Within this context, the scions stand in the model."""
    order = sorted(scions, key=Edit.sort_key)
    before: list[tuple[Edit, list[nn.Module]]] = []
    try:
        for edit in order:
            block = edit.site.block
            pair = edit.site.target == "pair"
            before.append((edit, [*model.blocks[block : block + 2]] if pair else [scion_at(model, edit.site)]))
            replace(model, edit.site, scions[edit])
        yield
    finally:
        for edit, modules in reversed(before):
            if edit.site.target == "pair":
                for offset, module in enumerate(modules):
                    model.blocks[edit.site.block + offset] = module
            else:
                replace(model, edit.site, modules[0])


class Replacements:
    """The rootstock on the samples that scions are scored on, with what is kept of its pass.

    begins: the blocks whose stream is worth keeping. room: bytes for streams, on the device.
    """

    def __init__(
        self,
        model: Rootstock,
        examples: Examples,
        recipe: ScoreSpec,
        device: torch.device,
        begins: Iterable[int] = (),
        room: int = 0,
        stopping: Callable[[], bool] = never,
    ) -> None:
        self.model, self.recipe, self.device, self.stopping = model.to(device).eval(), recipe, device, stopping
        self.objective = model.config.objective.on(device)
        self.batches = examples.split(recipe.batch, device)
        place = model.config.place
        stream_bytes = 4 * place.num_tokens * place.width * len(examples)
        self.kept = tuple(sorted({self._first(block) for block in begins})[: room // stream_bytes])

    def _first(self, block: int) -> int:
        """Return the block at which a pass has to begin that is to see another operator in this one."""
        return block - 1 if isinstance(self.model.blocks[block], Absorbed) else block

    @cached_property
    def _root(self) -> list[_RootPass]:
        """What the rootstock comes to on each batch."""
        return [self._root_pass(batch) for batch in self.batches]

    @torch.no_grad()
    def _root_pass(self, batch: Examples) -> _RootPass:
        streams: dict[int, Stream] = {}
        z = self.objective.noised(batch.x0, batch.t, batch.noise)
        with computing(self.recipe.precision, self.device):
            stream = self.model.start(z, batch.t, batch.condition)
            for index in range(len(self.model.blocks)):
                if index in self.kept:
                    streams[index] = stream
                stream = self.model.through(index, stream)
            output = self.model.finish(stream).float()
        return _RootPass(z, output[:, : z.shape[1]], self._loss(batch, output), streams)

    def _loss(self, batch: Examples, output: Tensor) -> Tensor:
        return self.objective.loss(lambda *_: output, batch.x0, batch.t, batch.condition, batch.noise)

    def score(self, scions: Scions) -> Scored:
        """Return what the model comes to with these scions in it, all of them at once."""
        first = min((self._first(edit.site.block) for edit in scions), default=len(self.model.blocks))
        errors, changes, quarters = [], [], []
        passes = self._root  # before any scion is in its place
        with standing(self.model, scions):
            for batch, root in zip(self.batches, passes, strict=True):
                output = self._output(batch, root, first)
                difference = (output[:, : root.output.shape[1]] - root.output).flatten(1).double()
                errors.append(difference.square().sum(1) / root.output.flatten(1).double().square().sum(1))
                changes.append(self._loss(batch, output).double() - root.loss.double())
                quarters.append(self.objective.quarter(batch.t))
        return _scored(torch.cat(errors).cpu(), torch.cat(changes).cpu(), torch.cat(quarters).cpu(), passes)

    @torch.no_grad()
    def _output(self, batch: Examples, root: _RootPass, first: int) -> Tensor:
        """Return the output (B,C_out,..) of the model as it stands, which is the rootstock up to the block `first`."""
        begin = max((index for index in root.streams if index <= first), default=None)
        with computing(self.recipe.precision, self.device):
            stream = self.model.start(root.z, batch.t, batch.condition) if begin is None else root.streams[begin]
            for index in range(begin or 0, len(self.model.blocks)):
                stream = self.model.through(index, stream)
            return self.model.finish(stream).float()


@dataclass(frozen=True)
class _RootPass:
    """The rootstock's pass of a batch."""

    z: Tensor  # (B,C,..)
    output: Tensor  # (B,C,..): of what is predicted, without what says of its variance
    loss: Tensor  # (B,)
    streams: Mapping[int, Stream]  # by the block before which they are


def _scored(errors: Tensor, changes: Tensor, quarters: Tensor, root: Sequence[_RootPass]) -> Scored:
    """Return the means over samples (n,), and over those of each quarter of the noise levels."""

    def by_quarter(values: Tensor) -> tuple[float | None, ...]:
        parts = [values[quarters == quarter] for quarter in range(QUARTERS)]
        return tuple(part.mean().item() if len(part) else None for part in parts)

    count = len(errors)
    return Scored(
        output=errors.mean().item(),
        output_by_quarter=by_quarter(errors),
        output_standard_error=errors.std().item() / count**0.5 if count > 1 else None,
        loss=changes.mean().item(),
        loss_by_quarter=by_quarter(changes),
        loss_standard_error=changes.std().item() / count**0.5 if count > 1 else None,
        rootstock_loss=torch.cat([one.loss.double().cpu() for one in root]).mean().item(),
        samples=count,
    )
