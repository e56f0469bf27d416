"""What a graft is: the transformer, its operators, surgery on it, diffusion, files and costs. Torch only, and torch
only once it is needed: importing the package is cheap."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from graftwork.models.rootstocks import Rootstock


def load(source: str | Path, *, heads: int | None = None, device: torch.device | str | None = None) -> Rootstock:
    """Return the model in a file or folder, or under a hub id, ready to be called; see `models.checkpoints.read`.

    It is called as `model(x, t, labels)` with latents x (B,C,S,S), timesteps t (B,) in 0 .. 999 and labels (B,), of
    which `num_classes` is the null class; or with a `models.condition.Condition` in place of the labels.
    heads: attention heads, needed where neither the file nor a published size tells them.
    """
    from graftwork.models import checkpoints

    model, _ = checkpoints.read(source, heads=heads, device=device)
    return model.eval()
