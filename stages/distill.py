"""`distill`: one scion learns to put out what the operator in its site puts out, given the operator's own input.

Stage 1 of the method (arXiv 2506.05340, section 3). The rootstock sees latents noised to uniformly drawn timesteps,
with their labels, up to the site's block; the scion regresses the operator's output. The weights with the lowest
held-out error are kept. Leaves `scion.safetensors`, `distill.json` and the loss curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import checkpoints
from models.dit import DiT, DiTConfig
from models.precision import computing
from models.streams import generator
from models.surgery import alike, answer, new_scion, observe, scion_at
from specs.graft import Edit, Site, overlapping
from specs.steps import DistillParams
from specs.training import DistillSpec
from stages import Context, Stopped
from stages.evidence import Distilled, read_profile, write_distilled
from stages.hybrid import with_scions
from stages.latents import Noised, noised, read, require_enough
from stages.pictures import loss_curve
from stages.training import PlainEngine, save_tensors

CHECKPOINT = "distill.safetensors"
BATCH = 64  # of the rootstock's pass, and of held-out evaluation
LossFunction = Callable[..., Tensor]
LOSSES: dict[str, LossFunction] = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}


@dataclass(frozen=True)
class Pairs:
    """What the operator saw and put out, and the weight of its error."""

    inputs: tuple[Tensor, ...]  # each (n,..): an operator's tokens; a pair's tokens and condition
    outputs: Tensor  # (n,N,D)
    weights: Tensor | None  # (n,1,D), or all ones


def run(context: Context) -> None:
    params: DistillParams = context.params
    recipe, edit, device = params.recipe, params.edit, context.device
    model, carried = checkpoints.load(context.input("base"))
    if overlapping(carried, [edit]):
        raise ValueError(f"{edit.site}: one of its blocks is in a parallel block of the rootstock already")
    model = model.to(device)
    features = context.input("features")
    training, heldout = read(features, "training"), read(features, "heldout")
    require_enough("distill.samples", recipe.samples, len(training.x), "training")
    require_enough("distill.heldout", recipe.heldout or 0, len(heldout.x), "held-out")
    context.report(0, recipe.epochs)
    # The same noised latents for every site: sites of one job can share one pass of the rootstock.
    shown = noised(training.first(recipe.samples), recipe.draws, params.seed, "distill")
    unseen = noised(heldout.first(recipe.heldout or recipe.samples), 1, params.seed, "distill/heldout")
    with computing(recipe.precision, device):
        pairs, unseen_pairs = (record(model, edit.site, part, recipe.gate_weighted) for part in (shown, unseen))
    loss, because = loss_for(recipe, edit.site, context)
    with_scions(model, params.within, context, params.seed)
    scion = new_scion(model, edit, params.seed).to(device)
    if edit.scions is None:
        with computing(recipe.precision, device):
            history = fit(scion, pairs, unseen_pairs, loss, context)
        loss_curve(history, f"distilling {edit.site}", context.out / "loss", ("training", "heldout"))
        best_epoch, _, heldout_error = min(history, key=lambda point: point[2])
    else:
        take(scion, edit, edit.scions, model.config)
        best_epoch, heldout_error = 0, error_on(scion, unseen_pairs, LOSSES[loss])
    save_file({name: value.cpu() for name, value in scion.state_dict().items()}, context.out / "scion.safetensors")
    summary = Distilled(
        loss=loss,
        loss_because=because,
        heldout_error=heldout_error,
        relative_error=relative_error(scion, unseen_pairs),
        best_epoch=int(best_epoch),
    )
    write_distilled(context.out, summary)


def record(model: DiT, site: Site, shown: Noised, gate_weighted: bool) -> Pairs:
    """Run the rootstock up to the site and keep the inputs and outputs of what stands there."""
    device = next(model.parameters()).device
    seen = [
        observe(model, [site], *(part.to(device) for part in parts))[site]
        for parts in zip(shown.z.split(BATCH), shown.t.split(BATCH), shown.labels.split(BATCH), strict=True)
    ]
    gates = [one.gate for one in seen if one.gate is not None]
    weights = torch.cat(gates).abs()[:, None] if gate_weighted and gates else None
    inputs = tuple(torch.cat(parts) for parts in zip(*(one.inputs for one in seen), strict=True))
    return Pairs(inputs, torch.cat([one.output for one in seen]), weights)


def take(scion: nn.Module, edit: Edit, source: str, rootstock: DiTConfig) -> None:
    """Fill the scion from a graft of such a rootstock, which has one of its kind in the same site."""
    graft, carried = checkpoints.read(source, config=rootstock)
    for other in carried:
        if other.site == edit.site and not alike(other, edit):
            found, wanted = (one.operator.model_dump(exclude={"backend"}) for one in (other, edit))
            raise checkpoints.UnfitCheckpoint(
                f"{source}: {edit.site}: got {found}; accepted: {wanted}, as the spec says"
            )
    checkpoints.fill(scion, scion_at(graft, edit.site).state_dict(), f"{source}: {edit.site}")


def fit(scion: nn.Module, pairs: Pairs, unseen: Pairs, loss: str, context: Context) -> list[tuple[float, float, float]]:
    """Train to the last epoch, from the last checkpoint if there is one, and leave the best weights in `scion`.

    Returns (epoch, training error, held-out error) of every epoch.
    """
    params: DistillParams = context.params
    recipe, size = params.recipe, len(pairs.outputs)
    loss_of = LOSSES[loss]
    state, history, best = _last_checkpoint(context)
    engine = PlainEngine(scion, clip=recipe.clip, state=state)
    device, stream = pairs.outputs.device, f"distill/{params.edit.site}"
    for epoch in range(len(history), recipe.epochs):
        lr = recipe.lr * 0.5 ** sum(epoch >= milestone for milestone in recipe.milestones)
        order = torch.randperm(size, generator=generator(params.seed, stream, "epoch", epoch)).to(device)
        total = torch.zeros((), device=device)
        for chosen in order.split(recipe.batch):
            value = error(scion, pairs, chosen, loss_of)
            engine.step(value, lr)
            total += value.detach() * len(chosen)
        training_error, heldout_error = total.item() / size, error_on(scion, unseen, loss_of)
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


def error(scion: nn.Module, pairs: Pairs, chosen: Tensor | slice, loss_of: LossFunction) -> Tensor:
    """The scion's mean error on some of the pairs, a scalar."""
    answers = answer(scion)(*(part[chosen] for part in pairs.inputs))
    each = loss_of(answers.float(), pairs.outputs[chosen].float(), reduction="none")
    return (each if pairs.weights is None else each * pairs.weights[chosen]).mean()


@torch.no_grad()
def error_on(scion: nn.Module, pairs: Pairs, loss_of: LossFunction) -> float:
    """Mean error over all pairs."""
    size = len(pairs.outputs)
    parts = [slice(start, min(start + BATCH, size)) for start in range(0, size, BATCH)]
    return sum(error(scion, pairs, part, loss_of).item() * (part.stop - part.start) for part in parts) / size


@torch.no_grad()
def relative_error(scion: nn.Module, pairs: Pairs) -> float:
    """Squared error over the outputs' variance: 0 is a perfect mimic, 1 no better than their mean."""
    batches = zip(*(part.split(BATCH) for part in pairs.inputs), strict=True)
    predicted = torch.cat([answer(scion)(*batch) for batch in batches])
    spread = (pairs.outputs - pairs.outputs.mean((0, 1))).square().sum()
    return ((predicted - pairs.outputs).square().sum() / spread).item()


def loss_for(recipe: DistillSpec, site: Site, context: Context) -> tuple[str, str]:
    """The loss to distil with, and why. `auto`: L1 where the outputs' tails are heavy, so that a few outliers do not
    decide what is learned, and L2 elsewhere (section 4.1 of the paper); a pair's output holds that of attention: L1.
    """
    if recipe.loss != "auto":
        return recipe.loss, "set in the spec"
    if site.target == "pair":
        return "l1", "a pair adds what its attention puts out"
    kurtosis = read_profile(context.input("profile")).excess_kurtosis(site)
    heavy = kurtosis > recipe.heavy_tails
    compared = "above" if heavy else "at most"
    return "l1" if heavy else "l2", f"the outputs' excess kurtosis is {kurtosis:.3g}, {compared} {recipe.heavy_tails:g}"


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
