"""What a file says of itself, and of which of the registered families that makes it.

Models share tensors, by name and shape, and mean something else by them, as a SiT and a DiT do. What was written
beside the tensors tells: a training script's arguments, a config, a scheduler's settings, file metadata. Each family
declares its words (`FamilyFiles`). Whatever says nothing is taken as it is.
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
from graftwork.models.rootstocks import CONFIGS
from graftwork.models.rootstocks.files import FamilyFiles
from graftwork.specs.problems import shown
from graftwork.specs.reading.load import SpecError
from graftwork.specs.reading.safe_yaml import parsed

BESIDE = ("config.json", "args.json", "model_index.json", "hparams.yaml", "config.yaml", "config.yml")
MAX_BYTES = 2**20  # of a file beside the weights
MAX_DEPTH, MAX_STATEMENTS = 12, 100_000

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
# Families that there are none of here.
OTHER_FAMILIES = (
    r"REPA|LightningDiT|MDT|MDTv2|MaskDiT|MicroDiT|U-?DiT|U-?ViT|FiT|FiTv2|PixArt-?(alpha|Alpha)|SD3|Flux|DDT|DiffiT|"
    r"FlowDCN|HunyuanDiT|Lumina|CogVideoX|Sana|FlowMatch"
)


def families() -> dict[str, FamilyFiles]:
    """Return what the registered families say of their files, by kind."""
    return {kind: config.files for kind, config in CONFIGS.items()}


def accepted() -> str:
    """Return a few words for all that is read."""
    return "; or ".join(files.accepted for files in families().values())


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


def kinds_of(source: str, entries: Iterator[tuple[str, Any]]) -> frozenset[str]:
    """Return the kinds of rootstock that a file can be by what it says: none if it says nothing.

    They are those of the families that claim some of its words and accept all that any family claims. Raise
    UnfitCheckpoint, with the file's own words, if they are those of another model or objective, or of no one family.
    """
    ours = families()
    claimed, strange, foreign = [], [], False
    for path, value in islice(entries, MAX_STATEMENTS):
        name = _name(path)
        is_claimed, is_strange = any(_claims(files, name, value) for files in ours.values()), _of_another(name, value)
        claimed += [(name, path, value)] if is_claimed else []
        strange += [f"{path} {shown(value)}"] if is_strange else []
        foreign |= is_strange and not is_claimed
    kinds = frozenset(
        kind
        for kind, files in ours.items()
        if any(_claims(files, name, value) for name, _, value in claimed)
        and all(_accepts(files, name, value) for name, _, value in claimed)
    )
    # SiT's training script also trains networks that predict noise on the linear path: they are neither of ours.
    contradicting = [f"{path} {shown(value)}" for _, path, value in claimed] if claimed and not kinds else []
    if foreign or contradicting:
        words = named(list(dict.fromkeys((*strange, *contradicting))), 4, ", ")
        raise UnfitCheckpoint(f"{source}: is of another objective or model, as it says: {words}", accepted())
    return kinds


def is_named_as_ours(model: str) -> bool:
    """Return whether a model's name is that of some family of ours."""
    return any(_is_called(model.lower(), files) for files in families().values())


def _claims(files: FamilyFiles, name: str, value: Any) -> bool:
    """Return whether a statement is in the family's words: its objective, an argument of its own, or its name."""
    text = value.strip().lower() if isinstance(value, str) else ""
    if PREDICTION.fullmatch(name):
        return text == files.prediction or (files.prediction == "epsilon" and NOISE.fullmatch(text) is not None)
    if any(name == argument and text == own.lower() for argument, own in files.arguments.items()):
        return True
    return MODEL.fullmatch(name) is not None and _is_called(text, files)


def _accepts(files: FamilyFiles, name: str, value: Any) -> bool:
    """Return whether a statement can be one of the family's: a network of another objective may keep its name."""
    if files.network is not None and isinstance(value, str) and MODEL.fullmatch(name):
        network = next(one for one in families().values() if one.name == files.network)
        return _claims(files, name, value) or _is_called(value.strip().lower(), network)
    return _claims(files, name, value)


def _is_called(text: str, files: FamilyFiles) -> bool:
    """Return whether text, in lower case, is the name of a model of that family, as `dit-xl/2` is."""
    return re.fullmatch(rf"({files.called or re.escape(files.name.lower())})([-_].*)?", text) is not None


def _name(path: str) -> str:
    """Return the last part of a statement's dotted name, as scripts differ in its spelling."""
    return re.split(r"[.: ]", path)[-1].lower().replace("-", "_").removeprefix("ss_")


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
    """Return whether a model's name is that of a known other family, or of a size, as DiT-XL/2 is, of another.

    Names that contain that of a family which shares another's tensors, and are not its own, mean a third.
    """
    names = {files.name: files.network for files in families().values()}
    sharing = [re.escape(name) for name, network in names.items() if network is not None]
    if re.search(rf"(?<![a-z])({'|'.join((*sharing, OTHER_FAMILIES))})(?![a-z])", model):
        return True
    sized = SIZED.fullmatch(model)
    return sized is not None and not any(
        name.lower() in sized["family"].lower() for name, network in names.items() if network is None
    )
