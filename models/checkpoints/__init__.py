"""Models as files.

`read` takes whatever holds a model of a registered family (models/rootstocks) or a graft of one, and finds out by
itself what it is:

    ours            a folder with `model.safetensors` and a `config.json` that rebuilds the model
    published       DiT's `.pt`, or a graft in the same layout: a state dict, or `ema`, `model`, `opt` and `args`
    diffusers       a DiTTransformer2DModel, in a folder of its own or in that of a DiTPipeline
    a hub id        a repository with one of these

What training tools wrap around those comes off (`wrappers`), numbered parts are joined (`folders`, `files`), and what a
file says of itself is obeyed or refused (`statements`). By what its files are known, each family declares itself
(`FamilyFiles`).

`save` and `load` are what the steps of a job use for ours; `export` writes any of the three for other people.

Only tensors are read: safetensors, or torch.load with weights_only. A file is never in memory twice: the model is
made without weights, and takes the file's tensors one by one, as they are mapped or read, to the device they belong on.
(A `.pt` stays mapped while a model on the CPU lives: it may be deleted meanwhile, but not written to.)
"""

from graftwork.models.checkpoints.card import Card, write_card
from graftwork.models.checkpoints.errors import UnfitCheckpoint
from graftwork.models.checkpoints.export import ExportRefused, export
from graftwork.models.checkpoints.fit import fill
from graftwork.models.checkpoints.labels import Labels
from graftwork.models.checkpoints.layouts.native import describe, load, save
from graftwork.models.checkpoints.reading import check, read

__all__ = [
    "Card", "ExportRefused", "Labels", "UnfitCheckpoint", "check", "describe", "export", "fill", "load", "read", "save",
    "write_card",
]  # fmt: skip
