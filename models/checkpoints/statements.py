"""What a file says of itself, and whether that is a model of ours: a DiT or a SiT, with the published objective.

Other models have a DiT's tensors, by name and shape, and mean something else by them, as a SiT does. What
was written beside the tensors tells: a training script's arguments, a config, a scheduler's settings, file metadata.
Whatever says nothing is taken as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from graftwork.models.checkpoints.errors import UnfitCheckpoint, named
from graftwork.models.objectives.gaussian import STEPS
from graftwork.specs.problems import shown
from graftwork.specs.reading.load import SpecError
from graftwork.specs.reading.safe_yaml import parsed

BESIDE = ("config.json", "args.json", "model_index.json", "hparams.yaml", "config.yaml", "config.yml")
MAX_BYTES = 2**20  # of a file beside the weights
MAX_DEPTH, MAX_STATEMENTS = 12, 100_000
ACCEPTED = f"a DiT that predicts noise (epsilon), of {STEPS} steps with linear betas; or a SiT: velocity, linear path"

NOISE = re.compile(r"(pred_|predict_)?(e|eps|epsilons?|noise)|modelmeantype\.epsilon")
PREDICTION = re.compile(
    r"(model_|net_|network_|training_)?(prediction|pred|predicts?|parameteri[sz]ation|prediction_type|pred_type|"
    r"predict_type|mean_type|prediction_target)"
)
# Settings that only other objectives have, and values that name one.
OTHER_SETTING = re.compile(
    r"path_type|interpolants?|interpolant_type|transport|transport_type|"
    r"(use_|is_)?(flow|flow_matching|rectified_flow|reflow|velocity|v_pred|v_prediction|v_parameterization)|"
    r"(predict|pred|prediction)_(x_?0|x_?start|v|velocity|flow|sample)|velocity_prediction|rescale_betas_zero_snr"
)
OBJECTIVE = re.compile(r"(training_|diffusion_|loss_)?(objective|target|formulation|framework)|(diffusion|loss)_type")
OTHER_OBJECTIVE = re.compile(
    r"(.*[^a-z0-9])?(v|velocity|v_?pred\w*|x|x_?0|x_?start|x_?pred\w*|start_x|(flow|rectified)[^a-z0-9]?\w*|"
    r"(stochastic_)?interpolants?|edm|sample|consistency)([^a-z0-9].*)?"
)
SCHEDULE = {
    "beta_schedule": ("linear",),
    "noise_schedule": ("linear", ""),
    "beta_start": (1e-4,),
    "beta_end": (0.02,),
    "num_train_timesteps": (STEPS,),
    "diffusion_steps": (STEPS,),
}
# Models by name, as `DiT-XL/2` or `SiT-XL-2-256x256`, and classes of them.
MODEL = re.compile(r"model|model_?name|model_?type|arch|architecture|backbone|net|network|_class_name|_target_|target")
SIZED = re.compile(r"(?P<family>[A-Za-z][\w+-]*?)[-_](?:XS|S|B|L|XL|XXL|H|G)[-_/]\d+([-_].*)?")
OURS = re.compile(r"(?P<kind>[ds]it)([-_].*)?")
FAMILIES = re.compile(
    r"(?<![a-z])(SiT|REPA|LightningDiT|MDT|MDTv2|MaskDiT|MicroDiT|U-?DiT|U-?ViT|FiT|FiTv2|PixArt|SD3|Flux|DDT|DiffiT|"
    r"FlowDCN|HunyuanDiT|Lumina|CogVideoX|Sana|FlowMatch)(?![a-z])"
)


def statements(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the plain values in a file, or in a document beside it, with their dotted names; tensors are none."""
    yield from _within(value, path, 0)


def _within(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH or isinstance(value, Tensor):
        return
    fields = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
    if isinstance(fields, Mapping) and not isinstance(value, type):
        for name, item in fields.items():
            yield from _within(item, f"{path}.{name}" if path else str(name), depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            if isinstance(item, Mapping):
                yield from _within(item, path, depth + 1)
    elif path:
        yield path, value


def beside(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield what documents beside a file say, with the document's name; those that cannot be read say nothing."""
    for name in BESIDE:
        for one, value in statements(document(path.parent / name)):
            yield f"{name}: {one}", value


def document(path: Path) -> Any:
    """Return a small JSON or YAML file as plain values; None if there is none that can be read."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return None
        text = path.read_text()
        return json.loads(text) if path.suffix == ".json" else parsed(text)
    except (OSError, ValueError, RecursionError, SpecError):
        return None


def of_metadata(metadata: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield what the text in a safetensors file's header says, part of which may be JSON."""
    for name, text in metadata.items():
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        yield from statements(value, name)


def kind_of(source: str, said: Iterator[tuple[str, Any]]) -> str | None:
    """Return the kind of rootstock that a file says it is, `dit` or `sit`; None if it says nothing.

    A SiT says so by its name, or by the linear path and the velocity of its training's arguments. Raise
    UnfitCheckpoint, with the file's own words, if they are those of another model or objective.
    """
    stated = [(_name(path), path, value) for path, value in islice(said, MAX_STATEMENTS)]
    kinds = {kind for name, _, value in stated if (kind := _kind(name, value)) is not None}
    strange = [(name, path, value) for name, path, value in stated if _of_another(name, value)]
    # SiT's training script also trains networks that predict noise on the linear path: they are neither of ours.
    noise = [one for one in stated if PREDICTION.fullmatch(one[0]) and _kind(one[0], one[2]) == "dit"]
    contradiction = noise if "sit" in kinds else []
    if contradiction or any(_kind(name, value) != "sit" for name, _, value in strange):
        others = [f"{path} {shown(value)}" for _, path, value in (*strange, *contradiction)]
        words = named(others, 4, ", ")
        raise UnfitCheckpoint(f"{source}: is of another objective or model, as it says: {words}", ACCEPTED)
    return "sit" if "sit" in kinds else next(iter(kinds), None)


def _name(path: str) -> str:
    """Return the last part of a statement's dotted name, as scripts differ in its spelling."""
    return re.split(r"[.: ]", path)[-1].lower().replace("-", "_").removeprefix("ss_")


def _kind(name: str, value: Any) -> str | None:
    """Return the kind of rootstock that a statement is of; None if it is of any, or of another."""
    text = value.strip().lower() if isinstance(value, str) else ""
    if (name == "path_type" and text == "linear") or (PREDICTION.fullmatch(name) and text == "velocity"):
        return "sit"
    if PREDICTION.fullmatch(name) and NOISE.fullmatch(text):
        return "dit"
    family = MODEL.fullmatch(name) and OURS.fullmatch(text)
    return family["kind"] if family else None


def _of_another(name: str, value: Any) -> bool:
    """Return whether a setting and its value are those of another model or objective than ours."""
    text = str(value).strip().lower() if isinstance(value, str | int | float) else ""
    if name in SCHEDULE and value is not None:
        return text not in map(str, SCHEDULE[name]) and _number(text) not in SCHEDULE[name]
    if OTHER_SETTING.fullmatch(name):
        return text not in ("", "none", "false", "0", "no")
    if PREDICTION.fullmatch(name) and isinstance(value, str):
        return text not in ("", "none") and NOISE.fullmatch(text) is None
    if OBJECTIVE.fullmatch(name) and isinstance(value, str) and OTHER_OBJECTIVE.fullmatch(text):
        return True
    return MODEL.fullmatch(name) is not None and isinstance(value, str) and is_of_another_family(value)


def _number(text: str) -> float | None:
    """Return the number that text stands for, as 1e-4 in YAML is text; None if it stands for none."""
    try:
        return float(text)
    except ValueError:
        return None


def is_of_another_family(model: str) -> bool:
    """Return whether a model's name is that of a known other family, or of a size, as DiT-XL/2 is, of another."""
    if FAMILIES.search(model):
        return True
    sized = SIZED.fullmatch(model)
    return sized is not None and not re.search("dit", sized["family"], re.IGNORECASE)
