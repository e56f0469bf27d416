"""Models for other people: any checkpoint, in the layout that they want."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from graftwork.models.checkpoints.adapters import kept_adapters, prefixed, write_peft
from graftwork.models.checkpoints.card import Card, write_card
from graftwork.models.checkpoints.errors import UnfitCheckpoint
from graftwork.models.checkpoints.layouts import diffusers, diffusers_pixart, native, published
from graftwork.models.checkpoints.reading import located, read
from graftwork.models.checkpoints.vae import read_vae
from graftwork.models.lora import Adapters as Lora
from graftwork.models.lora import take_out_lora
from graftwork.models.rootstocks import Rootstock
from graftwork.specs.edits import Edit
from graftwork.specs.export import Adapters, Layout
from graftwork.specs.problems import first_few
from graftwork.specs.vae import VaeConfig, vae_folder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

MAX_SITES = 5  # that an error names

# Another way to load a graft as a transformer.
BY_CODE = """

# Or, if graftwork is installed, without its import:
from diffusers import AutoModel

model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)"""

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
        'model = GraftTransformer2DModel.from_pretrained("{folder}")  # for a DiTPipeline' + BY_CODE
    ),
    "PixArtTransformer2DModel": (
        "from diffusers import PixArtTransformer2DModel\n\n"
        'model = PixArtTransformer2DModel.from_pretrained("{folder}")  # for a PixArtSigmaPipeline'
    ),
    "GraftPixArtTransformer2DModel": (
        "from graftwork.models.checkpoints.layouts.pixart_transformer import GraftPixArtTransformer2DModel\n\n"
        'model = GraftPixArtTransformer2DModel.from_pretrained("{folder}")  # for a PixArtSigmaPipeline' + BY_CODE
    ),
    "PixArtSigmaPipeline": (
        'from diffusers import PixArtSigmaPipeline\n\nmodel = PixArtSigmaPipeline.from_pretrained("{folder}")'
    ),
    "GraftPixArtSigmaPipeline": (
        "from diffusers import PixArtSigmaPipeline\n\n"
        "# Runs transformer/graft_model.py, which imports graftwork.\n"
        'model = PixArtSigmaPipeline.from_pretrained("{folder}", trust_remote_code=True)'
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
    pipeline: str | Path | None = None,
    adapters: Adapters | None = None,
) -> None:
    """Write the checkpoint `source` to the folder `out`, new or empty.

    layout: `graftwork`, as the steps of a job write it; `diffusers`, a DiTTransformer2DModel or, of a graft or of other
    classes than ImageNet's, a GraftTransformer2DModel, and of a PixArt the like; `published`, a `model.pt` as DiT's and
    the grafts' sampling scripts read it.
    vae: the folder or hub id of an AutoencoderKL, with which `diffusers` writes a whole DiTPipeline.
    pipeline: the folder or hub id of a PixArtSigmaPipeline: of a PixArt, `diffusers` writes another one, with its text
    encoder, VAE and scheduler.
    heads: see `read`.
    adapters: of a graft finetuned by LoRA, leave them out of the weights, and write them as peft loads them: `beside`
    the model, in `adapters`; or `alone`, if no scion was trained with them.
    """
    _require_sensible(out, layout, vae, adapters, pipeline)
    autoencoder = None if vae is None else _read_vae(vae)
    whole = None if pipeline is None else _find_pipeline(pipeline)
    lora = None if adapters is None else _lora_of(source, adapters)
    model, edits = read(source, heads=heads)
    if lora is not None:
        take_out_lora(model, lora)
    _require_layout(source, model, edits, layout, vae, pipeline)
    out.mkdir(parents=True, exist_ok=True)
    written = _write(model, edits, None if adapters == "alone" else out, layout, autoencoder, whole)
    usage = USAGE[written.loads].format(folder=out.name, use=model.config.files.use)
    if lora is not None:
        folder = out if adapters == "alone" else out / "adapters"
        write_peft(written.named(lora), folder)
        usage = _usage_of_adapters(usage, written.loads, str(folder.relative_to(out.parent)), adapters == "alone")
    if card is not None:
        write_card(out, card, edits, usage, written.note, model.config.files.task)


def _require_sensible(
    out: Path, layout: Layout, vae: str | Path | None, adapters: Adapters | None, pipeline: str | Path | None
) -> None:
    """Raise ExportRefused for what no model can be exported as, or where."""
    if layout not in get_args(Layout):
        raise ExportRefused(f"{layout}: no such layout; accepted: {', '.join(get_args(Layout))}")
    for name, given in (("vae", vae), ("pipeline", pipeline)):
        if given is not None and layout != "diffusers":
            raise ExportRefused(
                f"{name}: got {str(given)!r} with layout {layout}; accepted: with layout diffusers only"
            )
        if given is not None and adapters == "alone":
            raise ExportRefused(f"{name}: got {str(given)!r} with adapters alone; accepted: with a model to write")
    if adapters is not None and adapters not in get_args(Adapters):
        raise ExportRefused(f"adapters: got {adapters!r}; accepted: {', '.join(get_args(Adapters))}")
    if adapters is not None and layout == "published":
        accepted = "accepted: with layout graftwork or diffusers"
        raise ExportRefused(
            f"adapters: got {adapters!r} with layout published, which has no names for them; {accepted}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportRefused(f"{out}: is there already; accepted: a new or empty folder")


def _require_layout(
    source: str | Path,
    model: Rootstock,
    edits: Sequence[Edit],
    layout: Layout,
    vae: str | Path | None,
    pipeline: str | Path | None,
) -> None:
    """Raise ExportRefused for a layout that the model does not have."""
    kind, layouts = model.config.kind, model.config.files.layouts
    if vae is not None and not diffusers.takes(model):
        accepted = "with a DiT only" + ("; of a pixart, give a pipeline" if diffusers_pixart.takes(model) else "")
        raise ExportRefused(f"vae: got {str(vae)!r} with a {kind}; accepted: {accepted}")
    if pipeline is not None and not diffusers_pixart.takes(model):
        accepted = "with a pixart only" + ("; of a dit, give a vae" if diffusers.takes(model) else "")
        raise ExportRefused(f"pipeline: got {str(pipeline)!r} with a {kind}; accepted: {accepted}")
    if layout == "published" and any(edit.site.target == "pair" for edit in edits):
        raise ExportRefused(f"{source}: has parallel blocks, for which the published layout has no names")
    if layout == "diffusers" and layout not in layouts:
        raise ExportRefused(f"{source}: is a {kind}, for which diffusers has no class")
    if layout not in layouts:
        raise ExportRefused(f"{source}: is a {kind}, which has the layout {' and '.join(layouts)} only, not {layout}")


@dataclass(frozen=True)
class Written:
    """A model in a layout: a key of USAGE, what to know of it, and what names adapters by its layers."""

    loads: str
    note: str = ""
    named: Callable[[Lora], Lora] = lambda adapters: adapters


def _write(
    model: Rootstock,
    edits: Sequence[Edit],
    out: Path | None,
    layout: Layout,
    autoencoder: AutoencoderKL | None,
    pipeline: Path | None,
) -> Written:
    """Write the model to a folder, or to none if its adapters are written alone."""
    if layout == "diffusers":
        from graftwork.models.checkpoints.layouts.graft_model import GraftModel  # diffusers loads with it

        theirs = next(one for one in (diffusers, diffusers_pixart) if one.takes(model))
        transformer = theirs.wrapped(model, edits)
        name, depth = type(transformer).__name__, model.config.depth
        ours = isinstance(transformer, GraftModel)
        loads = name
        if pipeline is not None and out is not None:
            diffusers_pixart.write_pipeline(transformer, out, pipeline)
            loads = "GraftPixArtSigmaPipeline" if ours else diffusers_pixart.PIPELINE
        elif out is not None:
            diffusers.write(transformer, out, autoencoder)
            loads = name if autoencoder is None else "DiTPipeline"
        named = prefixed(f"{transformer.attribute}.") if ours else theirs.rootstock_adapters(depth)
        return Written(loads, NOTES.get(name, ""), named)
    if layout == "graftwork" and out is not None:
        native.save(model, edits, out)
    elif layout == "published":
        assert out is not None
        published.write(model, edits, out)
    return Written(layout)


def _lora_of(source: str | Path, place: Adapters) -> Lora:
    """Return the adapters that are in the weights of a model's folder; raise ExportRefused if none can be written."""
    found = kept_adapters(located(source))
    if found is None:
        accepted = "accepted: a graft that was finetuned with train: lora, since adapters are kept"
        raise ExportRefused(f"adapters: got {place!r}, and {source} has none; {accepted}")
    if place == "alone" and found.scions:
        some = first_few(found.scions, MAX_SITES)
        accepted = "accepted: beside, with the model that they were trained with"
        raise ExportRefused(f"adapters: got 'alone', and they belong with scions ({some}); {accepted}")
    return found.adapters


def _usage_of_adapters(usage: str, loads: str, folder: str, alone: bool) -> str:
    """Return Python that loads the adapters into the model, which `usage` loads unless it is the user's rootstock."""
    model = "model.transformer" if loads.endswith("Pipeline") else "model"
    loading = f'from peft import PeftModel\n\nPeftModel.from_pretrained({model}, "{folder}")  # in place'
    if alone:
        return f"{loading}; model: the rootstock, {'of graftwork.load' if loads == 'graftwork' else f'a {loads}'}"
    return f"{usage}\n\n{loading}"


def _find_pipeline(pipeline: str | Path) -> Path:
    try:
        folder = located(pipeline, "the folder or hub id of a PixArtSigmaPipeline", "text_encoder")
        diffusers_pixart.require_pipeline(folder)
    except UnfitCheckpoint as unfit:
        raise ExportRefused(f"pipeline: {unfit}") from None
    return folder


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
