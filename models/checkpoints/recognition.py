"""Which model a file holds, by the names and shapes of its tensors, and of which family by those and what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, TypeVar

from pydantic import ValidationError

from graftwork.models.checkpoints.errors import UnfitCheckpoint, named
from graftwork.models.checkpoints.files import Shape, Tensors
from graftwork.models.checkpoints.fit import MAX_NAMED, require_floats, shapes_of, weightless
from graftwork.models.checkpoints.folders import ZERO_TOOL
from graftwork.models.operators import REGISTRY, recognise
from graftwork.models.rootstocks import CONFIGS, RootstockConfig
from graftwork.specs.edits import Edit, Parallel, Site
from graftwork.specs.layers.strategy import MAX_DEPTH
from graftwork.specs.operators import Place, Target
from graftwork.specs.reading.load import shown

MOST = {"depth": MAX_DEPTH, "input_size": 8192}  # what is built before any tensor is compared
TARGETS: tuple[Target, ...] = ("mha", "mlp")
C = TypeVar("C", bound=RootstockConfig)


@dataclass(frozen=True)
class Found:
    """A checkpoint before a model is made of it: its tensors, under its family's names, and what else it says."""

    tensors: Tensors
    heads: int | None = None
    config: RootstockConfig | None = None
    edits: tuple[Edit, ...] | None = None
    kinds: frozenset[str] = frozenset()  # of rootstock, that it can be by what it says; none if it says nothing
    num_classes: int | None = None  # that it says it was trained on
    notes: tuple[str, ...] = ()  # what was chosen, or left out, where the file holds more than one model


def fields_of(config: RootstockConfig) -> dict[str, Any]:
    """Return the fields of a config. One without a kind is a DiT's: files of before there were others stay the same."""
    return ({} if config.kind == "dit" else {"kind": config.kind}) | asdict(config)


def edits_json(edits: Iterable[Edit]) -> list[dict[str, Any]]:
    """Edits as the layouts keep them: what stands where; not where it came from, which is a matter of one machine."""
    return [edit.model_dump(mode="json", exclude={"scions"}) for edit in edits]


def parse_description(source: str, rootstock: Any, listed: Any) -> tuple[RootstockConfig, tuple[Edit, ...]]:
    """Parse the rootstock and the edits that a file describes; raise UnfitCheckpoint if they are malformed."""
    try:
        config = _config_from(rootstock)
        if not isinstance(listed, list | tuple):
            raise ValueError(f"edits: {shown(listed)}, expected a list")
        edits = tuple(_edit_from(position, edit) for position, edit in enumerate(listed))
        if problem := misplaced(edits, config):
            raise ValueError(f"edits: {problem}")
    except ValueError as error:
        line = " ".join(str(error).split())
        raise UnfitCheckpoint(f"{source}: names no rootstock or edits that are known here: {line}") from None
    return config, edits


def _config_from(rootstock: Any) -> RootstockConfig:
    if not isinstance(rootstock, dict):
        raise ValueError(f"rootstock: {shown(rootstock)}, expected a mapping")
    kind = rootstock.get("kind", "dit")  # as all were before there were other families
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ValueError(f"rootstock: kind: {shown(kind)}, expected one of {', '.join(sorted(CONFIGS))}")
    family = CONFIGS[kind]
    rootstock = {name: value for name, value in rootstock.items() if name != "kind"}
    known = {field.name: field.default is MISSING for field in fields(family)}  # and whether it is needed
    absent = [name for name, needed in known.items() if needed and name not in rootstock]
    unknown = [str(name) for name in rootstock if name not in known]
    if absent or unknown:
        problems = [f"{name}: missing" for name in absent] + [f"{name}: expected none of that name" for name in unknown]
        raise ValueError(f"rootstock: {named(problems)}")
    config = family(**rootstock)
    if problem := misfit(config):
        raise ValueError(f"rootstock: {problem}")
    return config


def _edit_from(position: int, edit: Any) -> Edit:
    try:
        return Edit.model_validate(edit)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, ('edits', position, *problem['loc'])))}: {shown(problem['input'])}, {problem['msg']}"
            for problem in error.errors(include_url=False)
        ]
        raise ValueError(named(problems)) from None


def misfit(config: RootstockConfig) -> str | None:
    """Return what is wrong with a rootstock's shape, or None if there can be such a model."""
    if type(config.learn_sigma) is not bool:
        return f"learn_sigma: {shown(config.learn_sigma)}, expected true or false"
    floats = [field.name for field in fields(config) if "float" in str(field.type)]
    for name in floats:
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6):
            return f"{name}: {shown(value)}, expected a number above 0"
    for name in (field.name for field in fields(config) if field.name not in ("learn_sigma", *floats)):
        value, least = getattr(config, name), 0 if name == "num_classes" else 1
        if type(value) is not int or value < least:
            return f"{name}: {shown(value)}, expected an integer of at least {least}"
        if value > MOST.get(name, value):
            return f"{name}: {shown(value)}, expected at most {MOST[name]}"
    return config.shape_misfit()


def misplaced(edits: Iterable[Edit], config: RootstockConfig) -> str | None:
    """Which edit cannot be made on such a rootstock beside the others; None if all can."""
    sites: set[Site] = set()
    paired: set[int] = set()
    for edit in edits:
        site, pair = edit.site, edit.site.target == "pair"
        blocks = {site.block, site.block + pair}
        if max(blocks) >= config.depth:
            return f"{site}: {'a pair' if pair else 'a site'} past the last block, {config.depth - 1}"
        if problem := _unsuited(edit, config.place):
            return f"{site}: {problem}"
        if site in sites:
            return f"{site}: edited twice, expected one operator in a site"
        if pair and blocks & paired:
            return f"{site}: shares a block with another pair, expected each block in one pair only"
        sites.add(site)
        paired |= blocks if pair else set()
    return None


def edits_from(listed: Iterable[Any]) -> tuple[Edit, ...]:
    return tuple(Edit.model_validate(edit) for edit in listed)


def _unsuited(edit: Edit, place: Place) -> str | None:
    """Why the operator cannot stand in its site; a parallel block stands in pairs, and in nothing else."""
    target, operator = edit.site.target, edit.operator
    if isinstance(operator, Parallel):
        return None if target == "pair" else f"{operator.kind}, expected an operator for {target}"
    if target not in operator.targets:
        return f"{operator.kind}, expected {'parallel' if target == 'pair' else f'an operator for {target}'}"
    if wrong := operator.misfit(place):
        field, given, accepted = wrong
        return f"{field}: {shown(given)}, expected {accepted}"
    return None


def recognised(
    checkpoint: Found, config: RootstockConfig | None, heads: int | None
) -> tuple[RootstockConfig, tuple[Edit, ...]]:
    """The rootstock and the edits: as the file says, else as its shapes do.

    config: the rootstock expected, if any; heads: of a file that does not tell.
    """
    tensors, wanted = checkpoint.tensors, config.heads if config else heads
    require_floats(tensors)
    kinds = _kinds_by_tensors(tensors)
    if checkpoint.heads is not None and wanted is not None and checkpoint.heads != wanted:
        raise UnfitCheckpoint(f"{tensors.source}: has {checkpoint.heads} attention heads, expected {wanted}")
    rootstock = checkpoint.config if config is None else _expected(config, checkpoint, kinds)
    if rootstock is None:
        family = CONFIGS[_kind(checkpoint, kinds)]
        rootstock = rootstock_of(family, tensors, wanted if checkpoint.heads is None else checkpoint.heads)
    edits = edits_of(tensors, rootstock) if checkpoint.edits is None else checkpoint.edits
    if problem := misplaced(edits, rootstock):  # possible where another rootstock is expected than the file says
        raise UnfitCheckpoint(f"{tensors.source}: does not fit the model: {problem}")
    return rootstock, edits


def _kinds_by_tensors(tensors: Tensors) -> list[str]:
    """Return the kinds of rootstock that have such tensors: all by which one is told, else some.

    Raise UnfitCheckpoint if there are none, if tensors are those by which a family is known that is not ours, or if all
    are empty.
    """
    if tensors.shapes and not any(map(math.prod, tensors.shapes.values())):
        raise UnfitCheckpoint(
            f"{tensors.source}: its tensors are empty, as those are that DeepSpeed's ZeRO 3 keeps in parts elsewhere",
            f"the file that {ZERO_TOOL} joins them in",
        )
    having = {kind: one.files.telling.keys() & tensors.shapes.keys() for kind, one in CONFIGS.items()}
    whole = [kind for kind, telling in having.items() if telling == CONFIGS[kind].files.telling.keys()]
    kinds = whole or [kind for kind, telling in having.items() if telling]
    if not kinds:
        own = [one.files for one in CONFIGS.values() if one.files.network is None]
        raise _is_none(tensors, {files.name: files.telling for files in own})
    for kind in kinds:
        files = CONFIGS[kind].files
        for pattern, others in files.others.items():
            if telling := sorted(name for name in tensors.shapes if re.match(pattern, name)):
                raise UnfitCheckpoint(
                    f"{tensors.source}: is no {files.name} but a model {others}: has {named(telling, MAX_NAMED, ', ')}"
                )
    return kinds


def _expected(config: RootstockConfig, checkpoint: Found, kinds: Collection[str]) -> RootstockConfig:
    """Return the rootstock expected. Raise UnfitCheckpoint if the file is of another kind by its words or tensors."""
    said = _said(checkpoint, kinds)
    for others, words in ((said, "says that it is"), (kinds, "has the tensors of")):
        if others and config.kind not in others:
            names = " or ".join(f"a {kind}" for kind in sorted(others))
            problem = f"{checkpoint.tensors.source}: {words} {names}, expected a {config.kind}"
            raise UnfitCheckpoint(problem, f"model.kind {' or '.join(sorted(others))}")
    return config


def _said(checkpoint: Found, kinds: Collection[str]) -> Collection[str]:
    """Return the kinds that a file says it can be: of its tensors' `kinds`, if some of those are among them."""
    said = checkpoint.kinds if checkpoint.config is None else {checkpoint.config.kind}
    return said.intersection(kinds) or said


def _kind(checkpoint: Found, kinds: Collection[str]) -> str:
    """Return the kind that a file's words and its tensors allow. Raise UnfitCheckpoint unless there is just one."""
    # A file that says nothing is of the family whose network it is, not of one that shares it.
    silent = [kind for kind in kinds if CONFIGS[kind].files.network is None]
    claims = _said(checkpoint, kinds)
    possible = [kind for kind in kinds if kind in claims] if claims else silent
    if len(possible) == 1:
        return possible[0]
    has = f"has the tensors of {' and '.join(f'a {kind}' for kind in sorted(possible or kinds))}"
    says = f"says that it is {' or '.join(f'a {kind}' for kind in sorted(claims))}" if claims else "does not say which"
    raise UnfitCheckpoint(f"{checkpoint.tensors.source}: {has}, and {says}", "a file of one family, by both")


def _is_none(tensors: Tensors, absent: Mapping[str, Iterable[str]]) -> UnfitCheckpoint:
    """Return the error for tensors of no family: it shows some of their names, and the names that each family needs."""
    examples = named(sorted(tensors.shapes), MAX_NAMED, ", ") or "no tensor"
    of_diffusers = any(name.startswith("transformer_blocks.") for name in tensors.shapes)
    accepted = "the folder of a diffusers model, with its config.json" if of_diffusers else ""
    problems = "; ".join(f"is no {name}, has no {', '.join(names)}" for name, names in absent.items())
    return UnfitCheckpoint(f"{tensors.source}: {problems}; holds {examples}", accepted)


def rootstock_of(family: type[C], tensors: Tensors, heads: int | None) -> C:
    """Return the rootstock's config, as the family reads it from the shapes. heads: if they are known."""
    shapes, files = tensors.shapes, family.files
    absent = [name for name, rank in files.telling.items() if len(shapes.get(name, ())) != rank]
    if absent:
        raise _is_none(tensors, {files.name: absent})
    try:
        config = family.of_tensors(shapes, heads)
    except ValueError as error:
        raise UnfitCheckpoint(f"{tensors.source}: {error}") from None
    if problem := misfit(config):
        raise UnfitCheckpoint(f"{tensors.source}: {problem}")
    return config


def edits_of(tensors: Tensors, config: RootstockConfig) -> tuple[Edit, ...]:
    """The scions, site by site. What has the rootstock's tensors is no edit; `swa` gets its default window.

    A site without tensors is no edit either: they are missing, unless the file itself says that nothing stands there.
    """
    model = weightless(replace(config, depth=1), ())
    slots = model.slots_of(model.blocks[0])
    edits = []
    for index in range(config.depth):
        for target in TARGETS:
            slot = slots[target]
            own = shapes_of(slot.operator.state_dict())
            prefix = f"blocks.{index}.{slot.attribute}."
            shapes = {name.removeprefix(prefix): s for name, s in tensors.shapes.items() if name.startswith(prefix)}
            # Rootstock's names with other shapes may still be a scion, as an mlp of another ratio is.
            operator = None if shapes == own else recognise(shapes, target, config.place)
            if operator is not None:
                edits.append(Edit(site=Site(block=index, target=target), operator=operator))
            elif shapes.keys() - own.keys():
                raise UnfitCheckpoint(_unknown(tensors.source, prefix, shapes, target, config.place))
    return tuple(sorted(edits, key=Edit.sort_key))


def _unknown(source: str, prefix: str, shapes: dict[str, Shape], target: Target, place: Place) -> str:
    specs = [kind.model_validate({}) for kind in REGISTRY if target in kind.targets]
    known = ", ".join(spec.kind for spec in specs if spec.num_parameters(place))
    tensors = named([f"{prefix}{name}: {shape}" for name, shape in sorted(shapes.items())], 4)
    return f"{source}: no known operator: {tensors}; expected the tensors of one of {known}"
