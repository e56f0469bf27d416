"""`search`: gates learn which of the candidates' sites to replace, while scions and LoRA learn to live with it.

Each training step draws, for each example and group, which originals stay (models.gates); the loss is the ordinary
diffusion loss, and the mask that the averaged gates find most probable is the choice. Under a budget there are no
groups: each site draws its original or one of several scions, the loss has a penalty on the distance of the expected
FLOPs from the budget, and of what meets the budget the most probable is the choice (models.budget). Leaves
`search.json`, the course of the probabilities, and in `hybrid` the model as chosen and trained, with LoRA merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from graftwork.cluster.training.launcher import launch
from graftwork.models import checkpoints
from graftwork.models.condition import Condition
from graftwork.models.numerics.streams import generator
from graftwork.models.selection.budget import budget_of
from graftwork.models.selection.gates import Gate, GatedRootstock, admissible_masks, gumbel
from graftwork.models.surgery import all_edits, new_scion
from graftwork.specs.edits import Edit, Site
from graftwork.specs.layers.learned import Group
from graftwork.specs.training import SearchSpec
from graftwork.stages.artifacts.evidence import Search, SearchedGroup, SearchedSite
from graftwork.stages.artifacts.hybrids import load_model
from graftwork.stages.artifacts.latents import read
from graftwork.stages.catalog.search import SearchParams
from graftwork.stages.contract import Context
from graftwork.stages.training.batches import TrainingSet, share_of
from graftwork.stages.training.engine import PlainEngine
from graftwork.stages.training.loop import POINTS, final_state, set_up_blocks, train

GATES = "gates.logits"  # their name among the weights
Course = list[tuple[float, ...]]  # (step, probability of each choice, gate after gate)


class LearnedGroup(SearchedGroup):
    """All of what the gate of one group came to."""

    keep: int
    pinned: tuple[int, ...]
    masks: tuple[tuple[int, ...], ...]  # the blocks that each keeps
    probabilities: tuple[float, ...]  # of each mask
    chosen: tuple[int, ...]  # the blocks of the group that are replaced
    decided: bool

    def warning(self) -> str:
        kept = [block for block in self.blocks if block not in self.chosen]
        return (
            f"the group of blocks {self.blocks[0]}-{self.blocks[-1]} did not decide: its best mask, which keeps "
            f"{kept}, has a probability of {self.confidence:.2f} only, of {len(self.masks)} masks"
        )


class LearnedSite(SearchedSite):
    """All of what the gate of one site came to."""

    options: tuple[str, ...]  # the original, and each operator
    probabilities: tuple[float, ...]  # of each option
    chosen: str
    decided: bool

    def warning(self) -> str:
        best, likely = max(zip(self.probabilities, self.options, strict=True))
        ruled_out = f"; the budget has no room for {likely}, which has {best:.2f}" if best > self.confidence else ""
        return (
            f"the site of block {self.block} did not decide: the choice, {self.chosen}, has a probability of "
            f"{self.confidence:.2f} only, of {len(self.options)} options{ruled_out}"
        )


class Learned(Search):
    """`search.json`; under a budget with the cost that was achieved."""

    groups: tuple[LearnedGroup, ...] = ()
    sites: tuple[LearnedSite, ...] = ()
    budget: float | None = None  # FLOPs of the whole model over the rootstock's
    share: float | None = None  # what came of it
    flops: int | None = None  # of a forward pass of one sample of the model as chosen
    skipped_steps: int  # whose loss or gradient was no number
    warnings: tuple[str, ...]


def run(context: Context) -> None:
    params: SearchParams = context.params
    launch(search, context, params.recipe, context.resources)
    conclude(context)


def search(context: Context, device: torch.device) -> None:
    """One worker's part."""
    params: SearchParams = context.params
    recipe = params.recipe
    gated, _ = build(context)
    gated = gated.to(device)
    set_up_blocks(gated.model, recipe)
    latents = read(context.input("features"), "training").share(recipe.fraction)
    train(
        lambda state: SearchEngine(gated, recipe, params.seed, state),
        TrainingSet.of(latents, gated.model.config, device, gated.model.texts),
        recipe,
        seed=params.seed,
        stream="search",
        partial=context.partial,
        report=context.report,
        stopping=context.stopping,
    )


def conclude(context: Context) -> None:
    """Read the choice off the averaged gates of a search that has ended, and leave what was learned."""
    from graftwork.stages.pictures.pictures import loss_curve  # matplotlib, which the workers do not need
    from graftwork.stages.pictures.search import course_of_the_cost, course_of_the_gates, keeping

    params: SearchParams = context.params
    state, curve = final_state(context.partial)
    gated, edits = build(context)
    average = {name.removeprefix("ema/"): value for name, value in state.items() if name.startswith("ema/")}
    gated.load_state_dict(average, strict=False)
    learned = outcome(gated, params, skipped=int(state["counts"][1]))
    (context.out / "search.json").write_text(learned.model_dump_json(indent=1, exclude_none=True))
    for warning in learned.warnings:
        context.note(warning)

    course = [tuple(row) for row in state["course"].tolist()]
    names = {
        f"blocks {one.blocks[0]}-{one.blocks[-1]}": [keeping(mask) for mask in one.masks] for one in learned.groups
    }
    names |= {f"block {one.block}": list(one.options) for one in learned.sites}
    course_of_the_gates(course, names, context.out / "course")
    if gated.budget is not None and learned.share is not None:
        each = [torch.tensor(row).split(gated.gates.sizes) for _, *row in course]
        costs = [(row[0], gated.budget.expected_share(own).item()) for row, own in zip(course, each, strict=True)]
        course_of_the_cost(costs, gated.budget.share, learned.share, context.out / "cost")
    loss_curve(curve, "loss of the search", context.out / "loss")

    made = [edit for edit in params.candidates if learned.replaces(edit.site.block, edit.option)]
    folder = context.out / "hybrid"
    folder.mkdir()
    checkpoints.save(gated.merge(), all_edits(edits, made), folder)


def build(context: Context) -> tuple[GatedRootstock, Sequence[Edit]]:
    """The rootstock with the distilled scions beside its operators, and the edits that it carries already."""
    params: SearchParams = context.params
    recipe = params.recipe
    model, edits = load_model(context.inputs, "base")
    scions: dict[Site, list[nn.Module]] = {}
    for edit in params.candidates:
        scion = new_scion(model, edit, params.seed)
        scion.load_state_dict(load_file(context.input(f"scions/{edit.name}") / "scion.safetensors"))
        scions.setdefault(edit.site, []).append(scion)
    budget, gates = None, [Gate.of_group(group) for group in params.groups]
    if params.budget is not None:
        budget = budget_of(params.budget, model.config, edits, params.candidates)
        gates = [Gate.of_site(site.block, len(beside)) for site, beside in scions.items()]
    gated = GatedRootstock(
        model,
        scions,
        gates,
        budget,
        logit_start=recipe.logit_start,
        lora_rank=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        seed=params.seed,
    )
    return gated, edits


class SearchEngine(PlainEngine):
    """A gated model in training. It draws each step's gates, skips steps that are no numbers, and keeps the course."""

    def __init__(
        self, gated: GatedRootstock, recipe: SearchSpec, seed: int, state: Mapping[str, Tensor] | None
    ) -> None:
        self.gated, self.recipe, self.seed = gated, recipe, seed
        self.passed = 0  # samples of this worker's share, in the step under way
        self.done = self.skipped = self.skipped_in_a_row = 0
        self.course: Course = []
        super().__init__(
            gated,
            betas=recipe.betas,
            clip=recipe.clip,
            ema=recipe.ema,
            rates={GATES: recipe.gate_lr},
            precision=recipe.precision,
            state=state,
        )
        if state is None:
            self._note_course()
        else:
            self.done, self.skipped, self.skipped_in_a_row = state["counts"].tolist()
            self.course = [tuple(row) for row in state["course"].tolist()]

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Pass the next part of this worker's share of the step's batch, under its part of the step's gates."""
        recipe, step = self.recipe, self.done
        noise = gumbel(recipe.batch, len(self.gated.gates.logits), generator(self.seed, "search", "gates", step))
        rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share, samples = share_of(recipe.batch, rank, workers), len(x)
        # A pass that does not count repeats the last sample; one on trial may be of a sample more than the share has.
        begin = max(0, min(share.start + self.passed, share.stop - samples))
        self.passed += samples
        self.gated.draw(
            noise[begin : begin + samples].to(x.device),
            at(recipe.temperature, step, recipe.steps),
            at(recipe.logit_scale, step, recipe.steps),
        )
        return super().__call__(x, t, condition)

    def step(self, loss: Tensor, lr: float) -> bool:
        made = super().step(loss + self.penalty(), lr)
        self.passed = 0
        self.done += 1
        if self.done % max(1, self.recipe.steps // POINTS) == 0 or self.done == self.recipe.steps:
            self._note_course()
        return made

    def penalty(self) -> Tensor | float:
        """What the step's loss has on top of the diffusion loss, under a budget; the same on every worker."""
        if self.gated.budget is None:
            return 0.0
        scale = at(self.recipe.logit_scale, self.done, self.recipe.steps)
        return self.recipe.budget_weight * self.gated.budget.miss(self.gated.gates.probabilities(scale))

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

    def stand_in(self) -> Self:
        copied = super().stand_in()
        assert isinstance(copied.model, GatedRootstock)
        copied.gated = copied.model
        return copied

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        if not state:
            return {}
        return state | {
            "counts": torch.tensor([self.done, self.skipped, self.skipped_in_a_row]),
            "course": torch.tensor(self.course, dtype=torch.float64),
        }

    def _note_course(self) -> None:
        """What the averaged gates find of each choice, at the scale of the step that was done."""
        scale = at(self.recipe.logit_scale, max(0, self.done - 1), self.recipe.steps)
        logits = self.ema[self.names.index(GATES)]
        self.course.append((self.done, *torch.cat(self.gated.gates.probabilities(scale, logits)).tolist()))


def at(ends: tuple[float, float], step: int, steps: int) -> float:
    """Where a schedule from the first to the last step's value is at `step`, 0 .. steps - 1; linear."""
    share = step / max(1, steps - 1)
    return (1 - share) * ends[0] + share * ends[1]


def outcome(gated: GatedRootstock, params: SearchParams, skipped: int) -> Learned:
    """The choice of the gates, how sure they are, and a warning of each that is not."""
    scale, sure = params.recipe.logit_scale[1], params.recipe.undecided
    probabilities = [tuple(values.tolist()) for values in gated.gates.probabilities(scale)]
    holds = {site.block: holding for site, holding in gated.choice().items()}
    replaced = tuple(sorted(block for block, holding in holds.items() if holding))
    if gated.budget is None:
        groups = tuple(
            _group(group, values, replaced, sure) for group, values in zip(params.groups, probabilities, strict=True)
        )
        lines = tuple(group.warning() for group in groups if not group.decided)
        return Learned(chosen=replaced, groups=groups, skipped_steps=skipped, warnings=lines)
    options = _options(params.candidates)
    sites = tuple(
        _site(block, options[block], values, holds[block], sure)
        for block, values in zip(holds, probabilities, strict=True)
    )
    flops = gated.budget.flops(holds)
    return Learned(
        chosen=replaced,
        options={block: holds[block] - 1 for block in replaced},
        sites=sites,
        budget=gated.budget.share,
        share=flops / gated.budget.rootstock,
        flops=flops,
        skipped_steps=skipped,
        warnings=tuple(site.warning() for site in sites if not site.decided),
    )


def _group(group: Group, probabilities: tuple[float, ...], replaced: tuple[int, ...], sure: float) -> LearnedGroup:
    masks = admissible_masks(group)
    confidence = probabilities[masks.index(tuple(block for block in group.blocks if block not in replaced))]
    return LearnedGroup(
        blocks=group.blocks,
        keep=group.keep,
        pinned=group.pinned,
        masks=masks,
        probabilities=probabilities,
        chosen=tuple(block for block in group.blocks if block in replaced),
        confidence=confidence,
        decided=confidence >= sure,
    )


def _site(
    block: int, options: tuple[str, ...], probabilities: tuple[float, ...], holding: int, sure: float
) -> LearnedSite:
    return LearnedSite(
        block=block,
        options=options,
        probabilities=probabilities,
        chosen=options[holding],
        confidence=probabilities[holding],
        decided=probabilities[holding] >= sure,
    )


def _options(candidates: Sequence[Edit]) -> dict[int, tuple[str, ...]]:
    """By block, what its site may hold: an operator's name, and the settings that are not its defaults."""
    names: dict[int, tuple[str, ...]] = {}
    for edit in candidates:
        settings = edit.operator.model_dump(exclude_defaults=True, exclude={"kind", "backend"})
        name = " ".join([edit.operator.kind, *(f"{field}={value}" for field, value in settings.items())])
        names[edit.site.block] = (*names.get(edit.site.block, ("original",)), name)
    return names
