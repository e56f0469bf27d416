"""Models for other people: any checkpoint, in the layout that they want."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from models.checkpoints import diffusers, native, published
from models.checkpoints.card import Card, write_card
from models.checkpoints.reading import read

Layout = Literal["graftwork", "diffusers", "published"]

USAGE = {
    "graftwork": 'import models\n\nmodel = models.load("{folder}")  # model(x, t, y)',
    "published": 'import models\n\nmodel = models.load("{folder}")',
    "diffusers": (
        "import models.checkpoints.transformer  # lets diffusers load a graft\n"
        "from diffusers import DiTPipeline\n\n"
        'pipeline = DiTPipeline.from_pretrained("{folder}")  # of a transformer alone: its class.from_pretrained'
    ),
}


class ExportRefused(ValueError):
    """What cannot be written there, or in that layout; the message is one line."""


def export(
    source: str | Path,
    out: Path,
    layout: Layout,
    *,
    card: Card | None = None,
    heads: int | None = None,
    vae: str | Path | None = None,
) -> None:
    """Write the checkpoint `source` to the folder `out`, new or empty.

    layout: `graftwork`, as the steps of a job write it; `diffusers`, a DiTTransformer2DModel or, of a graft, a
    GraftTransformer2DModel; `published`, a `model.pt` as DiT's and the grafts' sampling scripts read it.
    vae: the folder or hub id of an AutoencoderKL, with which `diffusers` writes a whole DiTPipeline.
    heads: see `read`.
    """
    if layout not in get_args(Layout):
        raise ExportRefused(f"{layout}: no such layout; accepted: {', '.join(get_args(Layout))}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportRefused(f"{out}: is there already; accepted: a new or empty folder")
    model, edits = read(source, heads=heads)
    if layout == "published" and any(edit.site.target == "pair" for edit in edits):
        raise ExportRefused(f"{source}: has parallel blocks, for which the published layout has no names")
    out.mkdir(parents=True, exist_ok=True)
    if layout == "graftwork":
        native.save(model, edits, out)
    elif layout == "diffusers":
        diffusers.write(model, edits, out, vae)
    else:
        published.write(model, edits, out)
    if card is not None:
        write_card(out, card, edits, USAGE[layout].format(folder=out.name))
