"""Whatever is done to a rootstock is done by its contract: a family made up here goes all the way.

What it takes is what stands above `registered`: a spec with its formulas and its sampler, a config with what it says of
its files, and the module.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import pytest
import torch
from torch import Tensor, nn

from graftwork.models import checkpoints
from graftwork.models.condition import ClassConditioner, Condition
from graftwork.models.measures.costs import forward_flops, forward_inputs, forward_memory
from graftwork.models.objectives import Objective, objective_of
from graftwork.models.operators import build_operator
from graftwork.models.rootstocks import (
    CONFIGS,
    FAMILIES,
    Rootstock,
    RootstockConfig,
    Slot,
    Stream,
    config_of,
    new_rootstock,
    register,
)
from graftwork.models.rootstocks.dit import DiT, DiTConfig
from graftwork.models.rootstocks.files import FamilyFiles
from graftwork.models.selection.gates import Gate, GatedRootstock
from graftwork.models.surgery import graft, new_scion, observe, scion_at
from graftwork.specs.costs import (
    ORIGINALS,
    Cost,
    Formulas,
    Shape,
    block_cost,
    embedding_cost,
    graft_cost,
    operator_cost,
    rootstock_cost,
)
from graftwork.specs.edits import Edit, Parallel, Site
from graftwork.specs.fields import Spec
from graftwork.specs.job import JobSpec
from graftwork.specs.layers.learned import Group
from graftwork.specs.operators import HyenaY, Mlp, Place, linear_parameters
from graftwork.specs.sampler import AnySampler, DdimSampler, Prediction
from tests.conftest import ROOT
from tests.small import lively


class StripFormulas(Formulas):
    def embedding(self, model: Shape, place: Place, channels: int, num_classes: int) -> Cost:
        pixels = model.patch**2 * channels
        labels = (num_classes + 1) * place.width
        return Cost(linear_parameters(pixels, place.width) + labels, 2 * place.num_tokens * pixels * place.width)

    def block(self, model: Shape, place: Place) -> Cost:
        return sum((operator_cost(one, place) for one in ORIGINALS.values()), Cost(2 * place.width, 0))

    def final(self, model: Shape, place: Place, channels: int) -> Cost:
        pixels = model.patch**2 * channels
        return Cost(pixels * place.width + channels, 2 * place.num_tokens * pixels * place.width)


class StripModel(Spec):
    """What a job would say of it."""

    prediction: ClassVar[Prediction] = "epsilon"
    told: ClassVar[str] = "classes"
    default_sampler: ClassVar[AnySampler] = DdimSampler(steps=7)
    formulas: ClassVar[Formulas] = StripFormulas()
    learn_sigma: ClassVar[bool] = False
    kind: Literal["strip"] = "strip"
    depth: int = 4
    width: int = 16
    heads: int = 2
    patch: int = 2


FILES = FamilyFiles(
    name="Strip",
    prediction=StripModel.prediction,
    accepted="a Strip",
    telling={"into.weight": 4, "label.weight": 2, "positions": 3},
    others={r"blocks\.\d+\.twist\.": "whose strips are twisted, as a Moebius's are"},
    label_table="label.weight",
    layouts=("graftwork", "published"),
)


@dataclass(frozen=True)
class StripConfig(RootstockConfig):
    """Of latents that are no squares; labels are added to the tokens, and nothing else is given to a block."""

    kind: ClassVar[str] = "strip"
    formulas: ClassVar[Formulas] = StripModel.formulas
    files: ClassVar[FamilyFiles] = FILES
    height: int
    length: int
    in_channels: int
    patch: int
    depth: int
    width: int
    heads: int
    num_classes: int
    learn_sigma: bool = False

    @classmethod
    def of(cls, model: StripModel, shape: Sequence[int], num_classes: int) -> Self:
        channels, height, length = shape
        return cls(height, length, channels, model.patch, model.depth, model.width, model.heads, num_classes)

    @classmethod
    def of_tensors(cls, shapes: Mapping[str, Sequence[int]], heads: int | None) -> Self:
        if heads is None:
            raise ValueError("has strips of unknown heads: name their number")
        (width, channels, patch, _), (rows, _) = shapes["into.weight"], shapes["label.weight"]
        depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        height, length = (patch * side for side in shapes["positions"][1:])
        return cls(height, length, channels, patch, depth, width, heads, rows - 1)

    @classmethod
    def heads_of(cls, name: str, shapes: Mapping[str, Sequence[int]]) -> int | None:
        return int(name.removeprefix("Strip-")) if name.startswith("Strip-") else None

    def published_arguments(self) -> dict[str, Any]:
        return {"model": f"Strip-{self.heads}"}

    def shape_misfit(self) -> str | None:
        return f"height: {self.height}, expected a multiple of {self.patch}" if self.height % self.patch else None

    @property
    def grid(self) -> tuple[int, int]:
        return self.height // self.patch, self.length // self.patch

    @property
    def place(self) -> Place:
        return Place(self.width, self.heads, self.grid[0] * self.grid[1])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.in_channels, self.height, self.length

    @property
    def conditioner(self) -> ClassConditioner:
        return ClassConditioner(self.num_classes)

    @property
    def objective(self) -> Objective:
        return objective_of("epsilon")


class StripBlock(nn.Module):
    def __init__(self, place: Place) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(place.width)
        self.mixer: nn.Module = build_operator(ORIGINALS["mha"], place)
        self.feed: nn.Module = build_operator(ORIGINALS["mlp"], place)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        return x + self.feed(self.norm(x))


class Strip(Rootstock):
    config: StripConfig

    def __init__(self, config: StripConfig) -> None:
        super().__init__()
        self.config = config
        self.into = nn.Conv2d(config.in_channels, config.width, config.patch, config.patch)
        self.register_buffer("positions", torch.linspace(0, 1, config.place.num_tokens).view(1, *config.grid))
        self.label = nn.Embedding(config.num_classes + 1, config.width)
        self.blocks = nn.ModuleList(StripBlock(config.place) for _ in range(config.depth))
        self.out = nn.ConvTranspose2d(config.width, config.in_channels, config.patch, config.patch)

    def initialise(self, label_std: float = 0.02) -> None:
        nn.init.normal_(self.label.weight, std=label_std)

    def start(self, x: Tensor, t: Tensor, condition: Condition | Tensor) -> Stream:
        labels = Condition.of(condition).require("labels")
        patches = self.into(x) + self.positions
        return Stream(patches.flatten(2).mT + self.label(labels)[:, None] + t[:, None, None] / 1000, ())

    def finish(self, stream: Stream) -> Tensor:
        return self.out(stream.tokens.mT.unflatten(2, self.config.grid))

    def slots_of(self, block: nn.Module) -> dict[str, Slot]:
        return {"mha": Slot(block, "mixer"), "mlp": Slot(block, "feed")}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(StripConfig)(Strip)
    yield
    del CONFIGS["strip"], FAMILIES["strip"]


@pytest.fixture
def band() -> Iterator[None]:
    """Another family, with the tensors of the first and its objective: only its name is its own."""

    @dataclass(frozen=True)
    class BandConfig(StripConfig):
        kind: ClassVar[str] = "band"
        files: ClassVar[FamilyFiles] = replace(FILES, name="Band")

    register(BandConfig)(Strip)
    yield
    del CONFIGS["band"], FAMILIES["band"]


SHAPE = (3, 4, 12)
EDITS = (
    Edit(site=Site(block=0, target="mha"), operator=HyenaY(kernel=3)),
    Edit(site=Site(block=1, target="mlp"), operator=Mlp(ratio=2)),
    Edit(site=Site(block=2, target="pair"), operator=Parallel()),
)


@pytest.fixture
def model() -> Strip:
    made = new_rootstock(config_of(StripModel(), SHAPE, 5))  # type: ignore[arg-type]  # no kind of `model` yet
    assert isinstance(made, Strip)
    return lively(made)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Condition]:
    draws = torch.Generator().manual_seed(1)
    return torch.randn(2, *SHAPE, generator=draws), torch.tensor([3, 900]), Condition(labels=torch.tensor([0, 4]))


def test_its_sites_are_observed_and_replaced(model: Strip, batch: tuple[Tensor, Tensor, Condition]) -> None:
    sites = [edit.site for edit in EDITS]
    seen = observe(model, sites, *batch)
    block = model.blocks[0]
    assert isinstance(block, StripBlock)
    tokens = model.start(*batch).tokens
    torch.testing.assert_close(seen[sites[0]].inputs, (block.norm(tokens),))
    torch.testing.assert_close(seen[sites[0]].output, block.mixer(block.norm(tokens)))
    assert seen[sites[0]].gate is None and len(seen[sites[2]].inputs) == 1
    before = model(*batch)
    graft(model, EDITS[:2], seed=0)
    assert model.blocks[0].mixer is scion_at(model, sites[0])
    assert model(*batch).shape == before.shape == batch[0].shape and not torch.equal(model(*batch), before)


def test_a_pair_of_its_blocks_is_made(model: Strip, batch: tuple[Tensor, Tensor, Condition]) -> None:
    stream = model.through(1, model.through(0, model.start(*batch)))
    first, second = model.blocks[2], model.blocks[3]
    expected = first(stream.tokens) + second(stream.tokens) - stream.tokens
    graft(model, EDITS[2:], seed=0)
    torch.testing.assert_close(model.through(3, model.through(2, stream)).tokens, expected)


def test_it_is_searched(model: Strip, batch: tuple[Tensor, Tensor, Condition]) -> None:
    sites = [Site(block=index, target="mha") for index in (0, 1)]
    scions = {site: [new_scion(model, Edit(site=site, operator=HyenaY(kernel=3)), 0)] for site in sites}
    gated = GatedRootstock(model, scions, [Gate.of_group(Group(blocks=(0, 1), keep=1, pinned=()))], lora_rank=2)
    gated.draw(torch.zeros(2, 2), 1.0, 1.0)
    assert gated(*batch).shape == batch[0].shape
    assert sorted(gated.choice().values()) == [0, 1]


def test_it_is_measured_with_inputs_of_its_own_shape(model: Strip) -> None:
    assert forward_inputs(model, 2, torch.device("cpu"))[0].shape == (2, *SHAPE)
    assert forward_flops(model) > 0 and forward_memory(model, forward_inputs(model, 2, torch.device("cpu"))) > 0


def test_it_costs_what_its_own_formulas_say(model: Strip) -> None:
    place = model.config.place
    for shape in (StripModel(), model.config):
        cost = rootstock_cost(shape, place, channels=3, num_classes=5)
        assert cost.flops == forward_flops(model)
        assert cost.params == sum(parameter.numel() for parameter in model.parameters())
        blocks = cost - embedding_cost(shape, place, channels=3, num_classes=5) - shape.formulas.final(shape, place, 3)
        assert blocks.flops == 4 * block_cost(place, shape).flops
    graft(model, EDITS, seed=0)
    assert graft_cost(cost, EDITS, place).graft.flops == forward_flops(model)


def test_a_job_of_it_that_names_no_sampler_has_its_own() -> None:
    class StripJob(JobSpec):
        model: StripModel  # type: ignore[assignment]  # of whatever kinds there are

    document = {"name": "strip", "model": {"kind": "strip"}, "graft": [{"kind": "parallel"}]}
    assert StripJob.model_validate(document).evaluate.sampler == DdimSampler(steps=7)
    named = {"evaluate": {"sampler": {"kind": "ddim"}}}
    assert StripJob.model_validate(document | named).evaluate.sampler == DdimSampler()


def test_a_graft_of_it_is_saved_and_loaded_again(
    model: Strip, batch: tuple[Tensor, Tensor, Condition], tmp_path: Path
) -> None:
    graft(model, EDITS, seed=0)
    checkpoints.save(model, EDITS, tmp_path)
    found, edits = checkpoints.load(tmp_path)
    assert isinstance(found, Strip) and found.config == model.config and edits == EDITS
    torch.testing.assert_close(found(*batch), model(*batch), rtol=0, atol=0)


Said = dict[str, Any]


def saved(model: Strip, folder: Path, said: Said | None = None) -> Path:
    """A file as a training script leaves it, of this model and its average."""
    path = folder / "last.pt"
    averages = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "ema": averages, "args": said or {}}, path)
    return path


@pytest.mark.parametrize(
    ("said", "heads"),
    [
        ({"model": "Strip-2"}, None),
        ({"prediction": "epsilon"}, 2),
        ({"model": "Strip-2", "pred": "noise"}, None),
        ({}, 2),
    ],
    ids=str,
)
def test_its_file_is_known_by_its_tensors_and_its_words(
    model: Strip, tmp_path: Path, said: Said, heads: int | None
) -> None:
    graft(model, EDITS[:2], seed=0)
    found, edits = checkpoints.read(saved(model, tmp_path, said), heads=heads)
    assert type(found) is Strip and found.config == model.config and edits == EDITS[:2]
    torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert checkpoints.check(tmp_path / "last.pt", model.config) == (
        f"{tmp_path / 'last.pt'}: ema.module is read, not model",
    )


def test_its_labels_are_exchanged_for_others(model: Strip, tmp_path: Path) -> None:
    labels = checkpoints.Labels(("old", "new"), (3, None), seed=0)
    found, _ = checkpoints.read(saved(model, tmp_path), heads=2, labels=labels)
    assert isinstance(found, Strip) and found.config.num_classes == 2
    torch.testing.assert_close(found.label.weight[[0, 2]], model.label.weight[[3, 5]])


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"model": "DiT-XL/2"}, "has the tensors of a strip, and says that it is a dit"),
        (
            {"model": "Strip-2", "prediction": "velocity"},
            r"as it says: args\.prediction 'velocity', args\.model 'Strip-2'",
        ),
        ({"model": "Strip-2", "prediction": "score"}, "is of another objective or model, as it says: .*'score'"),
        ({}, "has strips of unknown heads: name their number"),
    ],
    ids=str,
)
def test_its_file_is_refused_if_it_says_that_it_is_another(
    model: Strip, tmp_path: Path, said: Said, problem: str
) -> None:
    with pytest.raises(checkpoints.UnfitCheckpoint, match=problem) as caught:
        checkpoints.read(saved(model, tmp_path, said))
    assert "\n" not in str(caught.value)


def test_it_is_not_taken_for_another_that_a_job_expects(model: Strip, tmp_path: Path) -> None:
    dit = DiTConfig(input_size=8, in_channels=3, patch=2, depth=4, width=16, heads=2, num_classes=5)
    for said, problem in (({}, "has the tensors of a strip"), ({"model": "Strip-2"}, "says that it is a strip")):
        path = saved(model, tmp_path, said)
        with pytest.raises(
            checkpoints.UnfitCheckpoint, match=rf"{problem}, expected a dit; accepted: model\.kind strip"
        ):
            checkpoints.check(path, dit)
    torch.save(DiT(dit).state_dict(), tmp_path / "dit.pt")
    with pytest.raises(checkpoints.UnfitCheckpoint, match="has the tensors of a dit or a sit, expected a strip"):
        checkpoints.check(tmp_path / "dit.pt", model.config)


def test_a_file_that_two_families_claim_is_refused(model: Strip, tmp_path: Path, band: None) -> None:
    for said, words in (({}, "does not say which"), ({"prediction": "noise"}, "says that it is a band or a strip")):
        path = saved(model, tmp_path, said)
        with pytest.raises(checkpoints.UnfitCheckpoint, match=f"has the tensors of a band and a strip, and {words}"):
            checkpoints.read(path, heads=2)
        checkpoints.check(path, model.config)  # the job says which
    path = saved(model, tmp_path, {"model": "Band-2"})
    assert checkpoints.read(path, heads=2)[0].config.kind == "band"
    with pytest.raises(checkpoints.UnfitCheckpoint, match="says that it is a band, expected a strip"):
        checkpoints.check(path, model.config)


def test_a_file_that_no_family_claims_is_refused_beside_what_each_has(model: Strip, tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(
        checkpoints.UnfitCheckpoint, match=r"is no DiT, has no .*; is no Strip, has no into\.weight, .*; holds layer"
    ):
        checkpoints.read(tmp_path / "other.pt")
    torch.save(model.state_dict() | {"blocks.0.twist.weight": torch.zeros(2)}, tmp_path / "twisted.pt")
    with pytest.raises(checkpoints.UnfitCheckpoint, match="is no Strip but a model whose strips are twisted"):
        checkpoints.read(tmp_path / "twisted.pt", heads=2)


def test_it_is_exported_in_the_layouts_that_it_has(
    model: Strip, batch: tuple[Tensor, Tensor, Condition], tmp_path: Path
) -> None:
    path = saved(model, tmp_path, {"model": "Strip-2"})
    for layout in ("graftwork", "published"):
        checkpoints.export(path, tmp_path / layout, layout)
        found, _ = checkpoints.read(tmp_path / layout)
        torch.testing.assert_close(found(*batch), model(*batch), rtol=0, atol=0)
    assert torch.load(tmp_path / "published" / "model.pt")["args"]["model"] == "Strip-2"
    with pytest.raises(checkpoints.ExportRefused, match="is a strip, for which diffusers has no class"):
        checkpoints.export(path, tmp_path / "diffusers", "diffusers")


# Where a family is named: what it says of itself, its network, and what diffusers has of it.
ROOMS = {
    "dit": {
        "specs/rootstock.py",
        "models/rootstocks/dit.py",
        "models/rootstocks/sit.py",  # is made of it
        "models/checkpoints/layouts/diffusers.py",
        "models/checkpoints/layouts/transformer.py",
        "models/checkpoints/recognition.py",  # files of before there were other kinds
    },
    "sit": {"specs/rootstock.py", "models/rootstocks/sit.py"},
    "pixart": {
        "specs/rootstock.py",
        "models/rootstocks/pixart.py",
        "models/checkpoints/layouts/diffusers_pixart.py",
        "models/checkpoints/layouts/pixart_transformer.py",
    },
}


@pytest.mark.parametrize("kind", ROOMS)
def test_a_family_takes_two_places_and_a_class_of_diffusers_its_own(kind: str) -> None:
    module, spec = f"graftwork.models.rootstocks.{kind}", f"{kind.capitalize()}Model"

    def is_named_in(node: ast.AST) -> bool:
        if isinstance(node, ast.ImportFrom):
            return node.module == module or spec in [name.name for name in node.names]
        return isinstance(node, ast.Constant) and node.value == kind

    packages = ("specs", "models", "cluster", "stages", "pipeline")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    trees = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in files}
    assert {path for path, tree in trees.items() if any(map(is_named_in, ast.walk(tree)))} == ROOMS[kind]


def test_a_kind_that_is_not_known_is_refused_by_name(model: Strip, tmp_path: Path) -> None:
    checkpoints.save(model, (), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"strip"', '"stripe"'))
    with pytest.raises(
        checkpoints.UnfitCheckpoint, match=r"rootstock: kind: 'stripe', expected one of dit, pixart, sit, strip"
    ):
        checkpoints.load(tmp_path)
