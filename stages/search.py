"""`search`: gates learn which of the candidates' sites to replace, while scions and LoRA learn to live with it.

Each training step draws, for each example and group, which originals stay (models.gates); the loss is the ordinary
diffusion loss, and the mask that the averaged gates find most probable is the choice. Leaves `search.json`, the course
of the probabilities, and in `hybrid` the model as chosen and trained, with LoRA merged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from cluster.launcher import launch
from models import checkpoints
from models.gates import GatedDiT, Gates, gumbel
from models.streams import generator
from models.surgery import all_edits, new_scion
from specs.graft import Edit
from specs.steps import SearchParams
from specs.training import SearchSpec
from stages import Context
from stages.evidence import Search, SearchedGroup
from stages.latents import read
from stages.training import POINTS, PlainEngine, TrainingSet, final_state, train

GATES = "gates.logits"  # their name among the weights
Course = list[tuple[float, ...]]  # (step, probability of each mask, group after group)


class LearnedGroup(SearchedGroup):
    """All of what the gates of one group came to."""

    keep: int
    pinned: tuple[int, ...]
    masks: tuple[tuple[int, ...], ...]  # the blocks that each keeps
    probabilities: tuple[float, ...]  # of each mask
    chosen: tuple[int, ...]  # the blocks of the group that are replaced
    decided: bool


class Learned(Search):
    """`search.json`."""

    groups: tuple[LearnedGroup, ...]
    skipped_steps: int  # whose loss or gradient was no number
    warnings: tuple[str, ...]


def run(context: Context) -> None:
    params: SearchParams = context.params
    launch(search, context, params.recipe.workers, context.resources)
    conclude(context)


def search(context: Context, device: torch.device) -> None:
    """One worker's part."""
    params: SearchParams = context.params
    recipe = params.recipe
    gated, _ = build(context)
    gated = gated.to(device)
    latents = read(context.input("features"), "training")
    latents = latents.first(max(1, round(len(latents.x) * recipe.fraction)))
    train(
        lambda state: SearchEngine(gated, recipe, params.seed, state),
        TrainingSet(latents.x, latents.labels, gated.model.config.num_classes, device),
        recipe,
        seed=params.seed,
        stream="search",
        partial=context.partial,
        report=context.report,
    )


def conclude(context: Context) -> None:
    """Read the choice off the averaged gates of a search that has ended, and leave what was learned."""
    from stages.pictures import loss_curve  # matplotlib, which the workers do not need
    from stages.search_pictures import course_of_the_gates

    params: SearchParams = context.params
    state, curve = final_state(context.partial)
    gated, edits = build(context)
    average = {name.removeprefix("ema/"): value for name, value in state.items() if name.startswith("ema/")}
    gated.load_state_dict(average, strict=False)
    learned = outcome(gated.gates, params.recipe, skipped=int(state["counts"][1]))
    (context.out / "search.json").write_text(learned.model_dump_json(indent=1))
    course = [tuple(row) for row in state["course"].tolist()]
    course_of_the_gates(course, gated.gates.groups, gated.gates.masks, context.out / "course")
    loss_curve(curve, "loss of the search", context.out / "loss")

    made = [edit for edit in params.candidates if edit.site.block in learned.chosen]
    folder = context.out / "hybrid"
    folder.mkdir()
    checkpoints.save(gated.merge(), all_edits(edits, made), folder)


def build(context: Context) -> tuple[GatedDiT, tuple[Edit, ...]]:
    """The rootstock with the distilled scions beside its operators, and the edits that it carries already."""
    params: SearchParams = context.params
    model, edits = checkpoints.load(context.input("base"))
    scions = {edit.site: new_scion(model, edit, params.seed) for edit in params.candidates}
    for edit in params.candidates:
        scions[edit.site].load_state_dict(load_file(context.input(f"scions/{edit.name}") / "scion.safetensors"))
    recipe = params.recipe
    gated = GatedDiT(
        model,
        scions,
        params.groups,
        logit_start=recipe.logit_start,
        lora_rank=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        seed=params.seed,
    )
    return gated, edits


class SearchEngine(PlainEngine):
    """A gated model in training. It draws each step's gates, skips steps that are no numbers, and keeps the course."""

    def __init__(self, gated: GatedDiT, recipe: SearchSpec, seed: int, state: Mapping[str, Tensor] | None) -> None:
        self.gated, self.recipe, self.seed = gated, recipe, seed
        self.done = self.skipped = self.skipped_in_a_row = 0
        self.course: Course = []
        super().__init__(
            gated, betas=recipe.betas, clip=recipe.clip, ema=recipe.ema, rates={GATES: recipe.gate_lr}, state=state
        )
        if state is None:
            self._note_course()
        else:
            self.done, self.skipped, self.skipped_in_a_row = state["counts"].tolist()
            self.course = [tuple(row) for row in state["course"].tolist()]

    def __call__(self, *args: Tensor) -> Tensor:
        """Pass this worker's slice of the step's batch, under its slice of the step's gates."""
        recipe, step = self.recipe, self.done
        noise = gumbel(recipe.batch, len(self.gated.gates.logits), generator(self.seed, "search", "gates", step))
        rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share = slice(rank * recipe.batch // workers, (rank + 1) * recipe.batch // workers)
        self.gated.draw(
            noise[share].to(args[0].device),
            at(recipe.temperature, step, recipe.steps),
            at(recipe.logit_scale, step, recipe.steps),
        )
        return self.gated(*args)

    def step(self, loss: Tensor, lr: float) -> bool:
        made = super().step(loss, lr)
        self.done += 1
        if self.done % max(1, self.recipe.steps // POINTS) == 0 or self.done == self.recipe.steps:
            self._note_course()
        return made

    def takes(self, loss: Tensor, norm: Tensor) -> bool:
        finite = (loss.isfinite() & norm.isfinite()).float()
        if dist.is_initialized():
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        if finite.item():
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == self.recipe.nan_patience:
            raise FloatingPointError(
                f"the loss or its gradient was no number in {self.recipe.nan_patience} steps in a row, up to step "
                f"{self.done + 1}; a lower lr or clip may help"
            )
        return False

    def state(self) -> dict[str, Tensor]:
        return super().state() | {
            "counts": torch.tensor([self.done, self.skipped, self.skipped_in_a_row]),
            "course": torch.tensor(self.course, dtype=torch.float64),
        }

    def _note_course(self) -> None:
        """What the averaged gates find of each mask, at the scale of the step that was done."""
        scale = at(self.recipe.logit_scale, max(0, self.done - 1), self.recipe.steps)
        logits = self.ema[self.names.index(GATES)]
        self.course.append((self.done, *torch.cat(self.gated.gates.probabilities(scale, logits)).tolist()))


def at(ends: tuple[float, float], step: int, steps: int) -> float:
    """Where a schedule from the first to the last step's value is at `step`, 0 .. steps - 1; linear."""
    share = step / max(1, steps - 1)
    return (1 - share) * ends[0] + share * ends[1]


def outcome(gates: Gates, recipe: SearchSpec, skipped: int) -> Learned:
    """The choice of these gates, how sure they are, and a warning of each group that is not."""
    groups, lines = [], []
    probabilities = gates.probabilities(recipe.logit_scale[1])
    for group, masks, values, kept in zip(gates.groups, gates.masks, probabilities, gates.choice(), strict=True):
        confidence = values[masks.index(kept)].item()
        decided = confidence >= recipe.undecided
        groups.append(
            LearnedGroup(
                blocks=group.blocks,
                keep=group.keep,
                pinned=group.pinned,
                masks=masks,
                probabilities=tuple(values.tolist()),
                chosen=tuple(block for block in group.blocks if block not in kept),
                confidence=confidence,
                decided=decided,
            )
        )
        if not decided:
            lines.append(
                f"the group of blocks {group.blocks[0]}-{group.blocks[-1]} did not decide: its best mask, which keeps "
                f"{list(kept)}, has a probability of {confidence:.2f} only, of {len(masks)} masks"
            )
    chosen = sorted(block for group in groups for block in group.chosen)
    return Learned(chosen=tuple(chosen), groups=tuple(groups), skipped_steps=skipped, warnings=tuple(lines))
