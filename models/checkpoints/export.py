"""Models for other people: any checkpoint, in the layout that they want."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

from graftwork.models.checkpoints.card import Card, write_card
from graftwork.models.checkpoints.errors import UnfitCheckpoint
from graftwork.models.checkpoints.layouts import diffusers, diffusers_pixart, native, published
from graftwork.models.checkpoints.reading import located, read
from graftwork.models.checkpoints.vae import read_vae
from graftwork.specs.export import Layout
from graftwork.specs.vae import VaeConfig, vae_folder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Python that loads what was written, by layout or by the class that diffusers loads.
USAGE = {
    "graftwork": 'import graftwork\n\nmodel = graftwork.load("{folder}")  # {use}',
    "published": 'import graftwork\n\nmodel = graftwork.load("{folder}")  # {use}',
    "DiTPipeline": (
        "import graftwork.models.checkpoints.layouts.transformer  # lets diffusers load a graft\n"
        "from diffusers import DiTPipeline\n\n"
        'model = DiTPipeline.from_pretrained("{folder}")'
    ),
    "DiTTransformer2DModel": (
        "from diffusers import DiTTransformer2DModel\n\n"
        'model = DiTTransformer2DModel.from_pretrained("{folder}")  # for a DiTPipeline'
    ),
    "GraftTransformer2DModel": (
        "from graftwork.models.checkpoints.layouts.transformer import GraftTransformer2DModel\n\n"
        'model = GraftTransformer2DModel.from_pretrained("{folder}")  # for a DiTPipeline'
    ),
    "PixArtTransformer2DModel": (
        "from diffusers import PixArtTransformer2DModel\n\n"
        'model = PixArtTransformer2DModel.from_pretrained("{folder}")  # for a PixArtSigmaPipeline'
    ),
    "GraftPixArtTransformer2DModel": (
        "from graftwork.models.checkpoints.layouts.pixart_transformer import GraftPixArtTransformer2DModel\n\n"
        'model = GraftPixArtTransformer2DModel.from_pretrained("{folder}")  # for a PixArtSigmaPipeline'
    ),
}

# What a card says beside that, by the class of the transformer.
NOTES = {
    "DiTTransformer2DModel": (
        "diffusers' DiTTransformer2DModel describes a timestep by sinusoids whose frequencies differ slightly from "
        "DiT's (its `downscale_freq_shift` is 1, DiT's is 0), and so does its output. Those of the "
        "GraftTransformer2DModel that a graft is exported as do not."
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

    layout: `graftwork`, as the steps of a job write it; `diffusers`, a DiTTransformer2DModel or, of a graft or of other
    classes than ImageNet's, a GraftTransformer2DModel, and of a PixArt the like; `published`, a `model.pt` as DiT's and
    the grafts' sampling scripts read it.
    vae: the folder or hub id of an AutoencoderKL, with which `diffusers` writes a whole DiTPipeline.
    heads: see `read`.
    """
    if layout not in get_args(Layout):
        raise ExportRefused(f"{layout}: no such layout; accepted: {', '.join(get_args(Layout))}")
    if vae is not None and layout != "diffusers":
        raise ExportRefused(f"vae: got {str(vae)!r} with layout {layout}; accepted: with layout diffusers only")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportRefused(f"{out}: is there already; accepted: a new or empty folder")
    autoencoder = None if vae is None else _read_vae(vae)
    model, edits = read(source, heads=heads)
    theirs = next((one for one in (diffusers, diffusers_pixart) if one.takes(model)), None)
    if vae is not None and theirs is not diffusers:
        accepted = f"accepted: with a DiT only; a {model.config.kind} goes into a pipeline by itself"
        raise ExportRefused(f"vae: got {str(vae)!r} with a {model.config.kind}; {accepted}")
    if layout == "published" and any(edit.site.target == "pair" for edit in edits):
        raise ExportRefused(f"{source}: has parallel blocks, for which the published layout has no names")
    kind, layouts = model.config.kind, model.config.files.layouts
    if layout == "diffusers" and layout not in layouts:
        raise ExportRefused(f"{source}: is a {kind}, for which diffusers has no class")
    if layout not in layouts:
        raise ExportRefused(f"{source}: is a {kind}, which has the layout {' and '.join(layouts)} only, not {layout}")
    out.mkdir(parents=True, exist_ok=True)
    loads, note = str(layout), ""
    if layout == "graftwork":
        native.save(model, edits, out)
    elif layout == "diffusers":
        assert theirs is not None
        transformer = theirs.wrapped(model, edits)
        diffusers.write(transformer, out, autoencoder)
        name = type(transformer).__name__
        loads, note = name if autoencoder is None else "DiTPipeline", NOTES.get(name, "")
    else:
        published.write(model, edits, out)
    if card is not None:
        files = model.config.files
        write_card(out, card, edits, USAGE[loads].format(folder=out.name, use=files.use), note, files.task)


def _read_vae(vae: str | Path) -> AutoencoderKL:
    try:
        folder = vae_folder(located(vae, "the folder or hub id of an AutoencoderKL", "vae"))
        config, autoencoder = VaeConfig.of(folder), read_vae(folder)
    except UnfitCheckpoint as unfit:
        raise ExportRefused(f"vae: {unfit}") from None
    except ValueError as error:
        raise ExportRefused(f"vae: {vae}: a folder {error}") from None
    if not config.is_scaled_only:
        accepted = "accepted: one with a scaling_factor only"
        raise ExportRefused(f"vae: {vae}: shifts its latents, which DiTPipeline would not undo; {accepted}")
    return autoencoder
