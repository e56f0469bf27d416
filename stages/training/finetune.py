"""`finetune`: stage 2, the whole graft on a small share of the data, on DeepSpeed's engine. Leaves a model folder.

By LoRA it leaves the adapters, too, beside the weights that hold them.

With a teacher the graft learns from its rootstock, too (stages.training.teacher).

The same recipe starts from distilled scions or, as the control, from freshly initialised ones; both see the same
batches, noise and timesteps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from graftwork.cluster.training.launcher import launch
from graftwork.models import checkpoints
from graftwork.models.checkpoints.adapters import keep_adapters
from graftwork.models.lora import adapters_of, add_lora, merge_lora
from graftwork.models.numerics.streams import initialising
from graftwork.models.rootstocks import Rootstock
from graftwork.models.surgery import scion_at
from graftwork.specs.edits import Edit
from graftwork.specs.training import FinetuneSpec, LoraSpec
from graftwork.stages.artifacts.hybrids import load_model, with_distilled_scions, with_fresh_scions
from graftwork.stages.artifacts.latents import read
from graftwork.stages.artifacts.plan import read_plan
from graftwork.stages.catalog.finetune import FinetuneParams
from graftwork.stages.contract import Context
from graftwork.stages.training.batches import TrainingSet
from graftwork.stages.training.loop import final_weights, set_up_blocks, train
from graftwork.stages.training.teacher import TeacherLoss


def run(context: Context) -> None:
    from graftwork.stages.pictures.pictures import loss_curve  # matplotlib, which the workers do not need

    params: FinetuneParams = context.params
    # DeepSpeed counts modules and parameters by process, and all workers of ZeRO 3 must have counted alike.
    launch(finetune, context, params.recipe, context.resources, last=True)
    weights, curve = final_weights(context.partial)
    model, edits = _start(context)
    model.load_state_dict(weights, strict=False)
    if params.recipe.train == "lora":
        keep_adapters(adapters_of(model), [edit.site for edit in _plan(context)], context.out)
        merge_lora(model)
    checkpoints.save(model, edits, context.out)
    loss_curve(curve, "finetuning loss", context.out / "loss")


def finetune(context: Context, device: torch.device) -> None:
    """One worker's part."""
    from graftwork.cluster.training.deepspeed_engine import ShardedEngine  # DeepSpeed, which only the workers need

    params: FinetuneParams = context.params
    recipe = params.recipe
    model, _ = _start(context)
    set_up_blocks(model, recipe)
    latents = read(context.input("features"), "training").share(recipe.fraction)
    loss_of = None
    if recipe.teacher is not None:
        rootstock, _ = load_model(context.inputs, "base")
        objective = model.config.objective
        loss_of = TeacherLoss(objective, recipe.teacher, rootstock, model, recipe.precision, device)
    train(
        lambda state: ShardedEngine(model.to(device), recipe, state),
        TrainingSet.of(latents, model.config, device, model.texts),
        recipe,
        loss_of=loss_of,
        seed=params.seed,
        stream="finetune",
        partial=context.partial,
        report=context.report,
        stopping=context.stopping,
    )


def _start(context: Context) -> tuple[Rootstock, Sequence[Edit]]:
    params: FinetuneParams = context.params
    build = with_distilled_scions if params.scions == "distilled" else with_fresh_scions
    plan = _plan(context)
    model, edits = build(context, params.seed, plan)
    freeze(model, plan, params.recipe, params.seed)
    return model, edits


def _plan(context: Context) -> Sequence[Edit]:
    params: FinetuneParams = context.params
    return read_plan(context.input("select"), params.plan)


def freeze(model: Rootstock, plan: Iterable[Edit], recipe: FinetuneSpec, seed: int) -> None:
    """Leave trainable what the recipe trains: all, the plan's scions, or these and LoRA on all else.

    The scion of a pair is its two blocks. Raise ValueError with a line for LoRA on layers that are not there, and for
    scions that have nothing to train.
    """
    scions = [scion_at(model, edit.site) for edit in plan]
    if recipe.train == "scions":
        model.requires_grad_(False)
        for scion in scions:
            scion.requires_grad_()
        if not any(value.requires_grad for value in model.parameters()):
            raise ValueError(
                "finetune.train: got 'scions', and no scion of the plan has parameters; accepted: all, lora"
            )
    elif recipe.train == "lora":
        lora = recipe.lora or LoraSpec()
        with initialising(seed, "finetune", "lora"):
            add_lora(model, lora.rank, lora.alpha, lora.targets, apart=scions)
