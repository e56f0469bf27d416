"""`distill`: one scion learns to put out what the operator in its site puts out, given the operator's own input.

Stage 1 of the method (arXiv 2506.05340, section 3). The rootstock sees latents noised to uniformly drawn timesteps,
with their labels, up to the site's block; the scion regresses the operator's output. The weights with the lowest
held-out error are kept. Leaves `scion.safetensors`, `distill.json` and the loss curve.

A scion that comes from another graft, or that has no parameters, is only measured.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftwork.models import checkpoints
from graftwork.models.numerics.precision import computing, products
from graftwork.models.numerics.streams import generator
from graftwork.models.rootstocks import RootstockConfig
from graftwork.models.surgery import alike, answer, inheritance, new_scion, scion_at
from graftwork.specs.edits import Edit
from graftwork.specs.training import DistillSpec
from graftwork.stages.artifacts.evidence import Distilled, write_distilled
from graftwork.stages.artifacts.hybrids import with_scions
from graftwork.stages.catalog.distill import DistillParams
from graftwork.stages.contract import Context, Portion, Stopped
from graftwork.stages.distillation.activations import Capture, Pairs, Teacher, capture
from graftwork.stages.distillation.loss import LOSSES, LossFunction, Mimic, error, error_on, loss_for, relative_error
from graftwork.stages.distillation.sources import Source, TaskState, choose_source, recomputed, task_state
from graftwork.stages.distillation.streaming import Learner, is_through, stream
from graftwork.stages.pictures.pictures import loss_curve
from graftwork.stages.training.engine import PlainEngine
from graftwork.stages.training.loop import save_tensors

CHECKPOINT = "distill.safetensors"


def run(context: Context) -> None:
    params: DistillParams = context.params
    with products(params.recipe.precision):  # of backward passes, too
        _distil(context, params)


def record(portion: Portion) -> list[Capture]:
    """Return what the sites of a job have in common, for a part of the samples: their activations. Raises Stopped."""
    return capture(portion)


def _distil(context: Context, params: DistillParams) -> None:
    recipe, edit, device = params.recipe, params.edit, context.device
    task = task_state(context)
    teacher = task.teacher
    is_trained = teacher.trains(edit)
    context.report(0, recipe.epochs if is_trained and not recipe.passes else 0)  # of passes, the batches are counted
    teacher.require_free(edit)
    loss, because = loss_for(recipe, edit.site, context)
    if is_trained and recipe.passes is not None:
        if recipe.workers > 1 and not is_through(task, context):
            from graftwork.cluster.training.launcher import launch  # Ray, which no other distillation needs

            alone = replace(context, task_scope=replace(context.task_scope, state={}, recorded=None))
            launch(_stream_as_worker, alone, recipe, context.resources)
        learned = _stream(task, context)
        scion, relative = learned.scion, learned.history[learned.best_pass - 1].relative
        history = [(float(number), one.training, one.heldout) for number, one in enumerate(learned.history, start=1)]
    else:
        train, heldout = _sources(task, context)
        scion = _new_scion(teacher, params, context).to(device)
        if is_trained:
            history = fit(scion, train, heldout, loss, context)
        else:
            if edit.scions is not None:
                take(scion, edit, edit.scions, teacher.model.config)
            history = []
            best_epoch, heldout_error = 0.0, error_on(mimic_of(scion, recipe, device), heldout, LOSSES[loss])
        relative = relative_error(mimic_of(scion, recipe, device), heldout)
    if history:
        best_epoch, _, heldout_error = min(history, key=lambda point: point[2])
        loss_curve(history, f"distilling {edit.site}", context.out / "loss", ("training", "heldout"))
    save_file({name: value.cpu() for name, value in scion.state_dict().items()}, context.out / "scion.safetensors")
    summary = Distilled(
        loss=loss,
        loss_because=because,
        heldout_error=heldout_error,
        relative_error=relative,
        best_epoch=int(best_epoch),
        inherited=_inherited_names(scion, teacher, context),
    )
    write_distilled(context.out, summary)


def _stream_as_worker(context: Context, device: torch.device) -> None:
    """One worker's part, of a group that shares the passes; what all come to is in the checkpoints of their sites."""
    params: DistillParams = context.params
    here = replace(context, device=device)
    with products(params.recipe.precision):
        _stream(task_state(here), here)


def _stream(task: TaskState, context: Context) -> Learner:
    return stream(task, context, lambda other: _streamed(task.teacher, other, context))


def _sources(task: TaskState, context: Context) -> tuple[Source, Source]:
    """Return the pairs to train on and the held-out ones; where passes are asked for, none of them is kept."""
    teacher = task.teacher
    if teacher.recipe.passes is None:
        return choose_source(task, context)
    return recomputed(task, context, teacher.train), recomputed(task, context, teacher.heldout)


def _new_scion(teacher: Teacher, params: DistillParams, context: Context) -> nn.Module:
    """As it is before it learns; a pair is made of copies of the rootstock's blocks, with the scions in them."""
    model = teacher.model
    if params.edit.site.target == "pair":
        model = with_scions(copy.deepcopy(model), params.within, context, params.seed)
    scion = new_scion(model, params.edit, params.seed)
    if params.recipe.start == "inherited":
        weights = inheritance(scion, params.edit, scion_at(model, params.edit.site))
        scion.load_state_dict(weights, strict=False)
    return scion


def _inherited_names(scion: nn.Module, teacher: Teacher, context: Context) -> tuple[str, ...] | None:
    """Return the tensors of the step's scion that began with the rootstock's weights; None if none were to."""
    params: DistillParams = context.params
    if params.recipe.start == "fresh" or not teacher.trains(params.edit):
        return None
    names = tuple(inheritance(scion, params.edit, scion_at(teacher.model, params.edit.site)))
    if not names and params.edit.site.target != "pair":
        kind = params.edit.operator.kind
        context.note(f"{params.edit.site}: {kind} has no layer of the shape of the rootstock's there; it began fresh")
    return names


def _streamed(teacher: Teacher, params: DistillParams, context: Context) -> tuple[nn.Module, Mimic, str]:
    """Return what a site learns with where nothing is kept: its scion, the function that is distilled, and its loss."""
    scion = _new_scion(teacher, params, context).to(context.device)
    return scion, mimic_of(scion, params.recipe, context.device), loss_for(params.recipe, params.edit.site, context)[0]


def take(scion: nn.Module, edit: Edit, source: str, rootstock: RootstockConfig) -> None:
    """Fill the scion from a graft of such a rootstock, which has one of its kind in the same site."""
    graft, carried = checkpoints.read(source, config=rootstock, any_classes=True)
    for other in carried:
        if other.site == edit.site and not alike(other, edit):
            found, wanted = (one.operator.model_dump(exclude={"backend"}) for one in (other, edit))
            raise checkpoints.UnfitCheckpoint(
                f"{source}: {edit.site}: got {found}; accepted: {wanted}, as the spec says"
            )
    checkpoints.fill(scion, scion_at(graft, edit.site).state_dict(), f"{source}: {edit.site}")


def fit(
    scion: nn.Module, train: Source, heldout: Source, loss: str, context: Context
) -> list[tuple[float, float, float]]:
    """Train to the last epoch, from the last checkpoint if there is one, and leave the best weights in `scion`.

    Returns (epoch, training error, held-out error) of every epoch. Within an epoch nothing waits for the device.
    """
    params: DistillParams = context.params
    recipe, size = params.recipe, len(train)
    mimic, loss_of = mimic_of(scion, recipe, context.device), LOSSES[loss]
    state, history, best = _last_checkpoint(context)
    engine = PlainEngine(scion, clip=recipe.clip, state=state)
    stream = f"distill/{params.edit.site}"
    for epoch in range(len(history), recipe.epochs):
        lr = recipe.lr * 0.5 ** sum(epoch >= milestone for milestone in recipe.milestones)
        order = torch.randperm(size, generator=generator(params.seed, stream, "epoch", epoch)).to(context.device)
        total = torch.zeros((), device=context.device)
        for pairs in train.batches(recipe.batch, order):
            total += learn(engine, mimic, pairs, loss_of, lr) * len(pairs)
        training_error, heldout_error = total.item() / size, error_on(mimic, heldout, loss_of)
        if not math.isfinite(heldout_error):
            raise FloatingPointError(f"the held-out error is {heldout_error} in epoch {epoch + 1}; a lower lr may help")
        if heldout_error < min((point[2] for point in history), default=math.inf):
            best = {name: value.detach().clone() for name, value in scion.state_dict().items()}
        history.append((epoch + 1, training_error, heldout_error))
        context.report(epoch + 1, recipe.epochs, {"training_error": training_error, "heldout_error": heldout_error})
        last = epoch + 1 == recipe.epochs
        stopping = not last and context.stopping()
        if (epoch + 1) % recipe.checkpoint_every == 0 or last or stopping:
            kept = {f"best/{name}": value.cpu() for name, value in best.items()}
            kept["history"] = torch.tensor(history, dtype=torch.float64)
            save_tensors(context.partial, CHECKPOINT, engine.state() | kept)
        if stopping:
            raise Stopped(f"after epoch {epoch + 1}")
    scion.load_state_dict(best)
    return history


def mimic_of(scion: nn.Module, recipe: DistillSpec, device: torch.device) -> Mimic:
    """The function that is distilled, in the recipe's precision."""
    called = torch.compile(answer(scion)) if recipe.compile else answer(scion)

    def mimic(*inputs: Tensor) -> Tensor:
        # Entered anew for each pass: as long as autocast lasts, it keeps the weights that it has rounded, and would
        # not see them change.
        with computing(recipe.precision, device):
            return called(*inputs)

    return mimic


def learn(engine: PlainEngine, mimic: Mimic, pairs: Pairs, loss_of: LossFunction, lr: float) -> Tensor:
    """One step on a batch; returns its mean error."""
    value = error(mimic, pairs, loss_of)
    engine.step(value, lr)
    return value.detach()


def _last_checkpoint(
    context: Context,
) -> tuple[dict[str, Tensor] | None, list[tuple[float, float, float]], dict[str, Tensor]]:
    """Engine state, history and best weights so far."""
    path = context.partial.load(CHECKPOINT)
    if path is None:
        return None, [], {}
    state = load_file(path)
    history = [(float(a), float(b), float(c)) for a, b, c in state.pop("history").tolist()]
    best = {name.removeprefix("best/"): state.pop(name) for name in list(state) if name.startswith("best/")}
    return state, history, best
