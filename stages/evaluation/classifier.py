"""`classifier`: the judge of the classifier metric, trained on the training images. Leaves `classifier.safetensors`."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from graftwork.models.measures.classifier import EPOCHS, LR, Classifier, augmented
from graftwork.models.numerics.streams import generator, initialising
from graftwork.stages.artifacts.latents import read, read_meta
from graftwork.stages.catalog.classifier import ClassifierParams
from graftwork.stages.contract import Context
from graftwork.stages.training.batches import shuffled

BATCH = 64


def run(context: Context) -> None:
    params: ClassifierParams = context.params
    folder = context.input("features")
    meta, training, heldout = read_meta(folder), read(folder, "training"), read(folder, "heldout")
    with initialising(params.seed, "classifier"):
        model = Classifier(meta.channels, meta.side, len(meta.classes))
    adam = torch.optim.AdamW(model.parameters(), lr=LR)
    steps = max(1, EPOCHS * len(training.x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps):
        chosen = shuffled(len(training.x), step * BATCH, BATCH, params.seed, "classifier")
        images = augmented(training.x[chosen], generator(params.seed, "classifier", "augment", step))
        loss = F.cross_entropy(model(images), training.labels[chosen])
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            context.report(step + 1, steps, {"loss": loss.item()})
            context.stop_if_asked()
    model.eval()
    with torch.no_grad():
        accuracy = (model(heldout.tensor()).argmax(1) == heldout.labels).float().mean().item()
    context.report(steps, steps, {"heldout_accuracy": accuracy})
    save_file(model.state_dict(), context.out / "classifier.safetensors")
    (context.out / "classifier.json").write_text(json.dumps({"heldout_accuracy": accuracy}))
