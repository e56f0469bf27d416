"""`base`: the rootstock, pretrained here or read from a checkpoint, with the edits that it carries.

Leaves a model folder.
"""

from __future__ import annotations

import torch

from graftwork.cluster.training.launcher import launch
from graftwork.models import checkpoints
from graftwork.models.numerics.streams import initialising
from graftwork.models.rootstocks import Rootstock, new_rootstock
from graftwork.specs.edits import Edit
from graftwork.specs.rootstock import CheckpointWeights, PretrainWeights
from graftwork.stages.artifacts.latents import read, read_meta
from graftwork.stages.artifacts.texts import told
from graftwork.stages.catalog.base import BaseParams
from graftwork.stages.contract import Context
from graftwork.stages.training.batches import TrainingSet
from graftwork.stages.training.engine import PlainEngine
from graftwork.stages.training.loop import final_weights, set_up_blocks, train


def run(context: Context) -> None:
    from graftwork.stages.pictures.pictures import loss_curve  # matplotlib, which the workers do not need

    params: BaseParams = context.params
    edits: tuple[Edit, ...] = ()
    if isinstance(params.weights, CheckpointWeights):
        meta = read_meta(context.input("features"))
        rows = params.weights.rows(meta.classes)
        labels = None if rows is None else checkpoints.Labels(meta.classes, rows, params.seed)
        try:
            config = meta.rootstock_config(params.model)
            model, edits = checkpoints.read(params.weights.path, config=config, labels=labels)
        except checkpoints.UnfitCheckpoint as error:
            raise checkpoints.UnfitCheckpoint(f"weights.path: {error}") from None
    else:
        model = _new_model(context)
        launch(pretrain, context, params.weights, context.resources)
        weights, curve = final_weights(context.partial)
        model.load_state_dict(weights, strict=False)
        loss_curve(curve, "pretraining loss", context.out / "loss")
    checkpoints.save(model, edits, context.out)


def pretrain(context: Context, device: torch.device) -> None:
    """One worker's part."""
    params: BaseParams = context.params
    assert params.weights.kind == "pretrain"
    recipe = params.weights
    latents = read(context.input("features"), "training")
    model = told(_new_model(context), context.inputs).to(device)
    set_up_blocks(model, recipe)
    train(
        lambda state: PlainEngine(
            model, betas=recipe.betas, clip=recipe.clip, ema=recipe.ema, precision=recipe.precision, state=state
        ),
        TrainingSet.of(latents, model.config, device, model.texts),
        recipe,
        seed=params.seed,
        stream="base",
        partial=context.partial,
        report=context.report,
        stopping=context.stopping,
    )


def _new_model(context: Context) -> Rootstock:
    params: BaseParams = context.params
    assert isinstance(params.weights, PretrainWeights)
    with initialising(params.seed, "base"):
        model = new_rootstock(read_meta(context.input("features")).rootstock_config(params.model))
        model.initialise(params.weights.label_std)
    return model
