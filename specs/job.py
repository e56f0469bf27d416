"""A job: everything that one `graft run` is asked to do, in one file."""

from __future__ import annotations

from typing import Annotated, Self, get_args

from pydantic import Field, StringConstraints, model_validator

from graftwork.specs.codec import Codec, PixelCodec, VaeCodec
from graftwork.specs.conditioning import conditioning_misfit, dropout_field, trainings
from graftwork.specs.costs import BUDGET_TOLERANCE, ORIGINALS, operator_cost, reachable, rootstock_cost
from graftwork.specs.data import Data, DigitsData, SyntheticData
from graftwork.specs.edits import Edit, EditSpec, OperatorEdits, ParallelEdits, numbered
from graftwork.specs.evaluate import FINALISTS, EvaluateSpec, Row
from graftwork.specs.fields import Line, Location, Spec, refuse
from graftwork.specs.layers.learned import LearnedLayers
from graftwork.specs.layers.solved import SolvedLayers
from graftwork.specs.layers.static import ExplicitLayers
from graftwork.specs.metrics import METRICS
from graftwork.specs.operators import Place
from graftwork.specs.resources import ResourcesSpec
from graftwork.specs.rootstock import Model, PretrainWeights, Weights
from graftwork.specs.sampler import PREDICTED, SAMPLERS, AnySampler, SchedulerSampler
from graftwork.specs.solve import ScoreSpec, SolveSpec
from graftwork.specs.solving import solving_misfit
from graftwork.specs.store import DEFAULT_STORE
from graftwork.specs.text import T5Text
from graftwork.specs.training import DistillSpec, FinetuneSpec, Precision, ProfileSpec


class TrackingSpec(Spec):
    """The MLflow server or database that records the job."""

    uri: Location | None = Field(
        None,
        description="http://host:5000 or sqlite:///file; by default MLFLOW_TRACKING_URI, or a SQLite file in the store",
    )
    experiment: Line | None = Field(None, max_length=250, description="by default MLFLOW_EXPERIMENT_NAME, or graftwork")


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class JobSpec(Spec):
    """One job, end to end."""

    name: Name
    seed: int = Field(0, ge=0, lt=2**31)
    data: Data = DigitsData()
    codec: Codec = PixelCodec()
    model: Model
    text: T5Text | None = Field(None, description="of a model that is told texts: the encoder of them")
    weights: Weights = PretrainWeights()
    graft: tuple[EditSpec, ...] = Field(min_length=1)
    profile: ProfileSpec = ProfileSpec()
    distill: DistillSpec = DistillSpec()
    score: ScoreSpec = ScoreSpec()
    solve: SolveSpec | None = Field(None, description="of edits whose layers are solved: what they are chosen by")
    finetune: FinetuneSpec = FinetuneSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    resources: ResourcesSpec = ResourcesSpec()
    store: Location = Field(DEFAULT_STORE, description="a folder, or any fsspec URI")
    tracking: TrackingSpec = TrackingSpec()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self._choose_sampler()
        self._check_condition()
        side = self.latent_side()
        if self.data.image_size % self.codec.factor or side % self.model.patch:
            factor = f" times the codec's factor, {self.codec.factor}" if self.codec.factor > 1 else ""
            refuse(["data", "image_size"], self.data.image_size, f"a multiple of the patch, {self.model.patch}{factor}")
        for metric in self.evaluate.metrics:
            METRICS[metric].check_job(self)
        for number, edit in enumerate(self.graft):
            self._check_blocks(number, edit)
        self._check_sites()
        if (misfit := solving_misfit(self)) is not None:
            refuse(*misfit)
        self._check_sampler()
        self._check_guidance()
        self._check_gpus()
        self._check_rows()
        return self

    def _choose_sampler(self) -> None:
        """Sample as the model's family does, if the job names no sampler."""
        if "sampler" not in self.evaluate.model_fields_set:
            evaluate = self.evaluate.model_copy(update={"sampler": self.model.default_sampler})
            object.__setattr__(self, "evaluate", evaluate)

    def _check_condition(self) -> None:
        """Refuse what is about another condition than the model's."""
        if (misfit := conditioning_misfit(self)) is not None:
            refuse(*misfit)

    def _check_gpus(self) -> None:
        """Refuse workers of a training that share a GPU, which NCCL does not allow, or have several, of which each
        would use one."""
        workers = {
            "base": getattr(self.weights, "workers", 1),
            "search": max((layers.search.workers for layers in self.learned().values()), default=1),
            "distill": self.distill.workers,
            "finetune": self.finetune.workers,
        }
        for stage, count in workers.items():
            gpu = getattr(self.resources, stage).gpu
            if count > 1 and gpu not in (0, 1):
                refuse(["resources", stage, "gpu"], gpu, f"0 or 1 a worker, since {count} workers train together")

    def _check_rows(self) -> None:
        """Refuse a row of the table that the job makes no model for."""
        rows = self.evaluate.rows or ()
        if "random_init" in rows and not self.finetune.control:
            accepted = "rootstock, stage1 or stage2; random_init needs finetune.control: true"
            refuse(["evaluate", "rows", rows.index("random_init")], "random_init", accepted)
        for number, row in enumerate(rows):
            if row in FINALISTS and row not in self.finalists():
                made = ", ".join(self.finalists()) or "no finalist, without solve.finalists"
                refuse(["evaluate", "rows", number], row, f"a row of a model that the job makes: {made}")

    def _check_sampler(self) -> None:
        """Refuse a sampler for models that predict another thing."""
        prediction = self.model.prediction
        for section, sampler in self.samplers().items():
            if prediction not in sampler.serves:
                fitting = [one for one in SAMPLERS if prediction in one.serves]
                kinds = [get_args(one.model_fields["kind"].annotation)[0] for one in fitting]
                accepted = f"{', '.join(kinds)}: a {self.model.kind} predicts {PREDICTED[prediction]}"
                refuse([section, "sampler", "kind"], sampler.kind, accepted)
            if isinstance(sampler, SchedulerSampler) and (accepted_names := sampler.misfit(prediction)):
                refuse([section, "sampler", "name"], sampler.name, accepted_names)

    def _check_guidance(self) -> None:
        """That every training of a sampled model teaches the null condition, which guidance samples from."""
        guidance, field = self.evaluate.sampler.guidance, dropout_field(self)
        null = "null class" if self.model.told == "classes" else "empty text"
        for section in ("weights", "finetune"):
            recipe = trainings(self).get((section,))
            if guidance != 1 and recipe is not None and recipe.dropout == 0:
                needs = f"evaluate.sampler.guidance {guidance:g} samples from"
                accepted = f"more than 0, which trains the {null} that {needs}; or guidance 1"
                refuse([section, field], recipe.dropout, accepted)

    def _check_blocks(self, number: int, edit: EditSpec) -> None:
        """That an edit's blocks are there, and its operator can stand in them."""
        depth = self.model.depth
        if isinstance(edit, ParallelEdits):
            if edit.pairs == "all" and depth % 2:
                refuse(
                    ["graft", number, "pairs"], "all", f"a list of pairs: the model has {depth} blocks, an odd number"
                )
            for position, pair in enumerate(() if isinstance(edit.pairs, str) else edit.pairs):
                if pair[1] >= depth:
                    refuse(["graft", number, "pairs", position], list(pair), f"blocks of this model, 0 .. {depth - 1}")
            return
        if isinstance(edit.layers, ExplicitLayers):
            for position, block in enumerate(edit.layers.blocks):
                if block >= depth:
                    accepted = f"a block of this model, 0 .. {depth - 1}"
                    refuse(["graft", number, "layers", "blocks", position], block, accepted)
        misfits: list[tuple[list[str | int], tuple[str, object, str] | None]] = [
            (["layers"], edit.layers.misfit(depth)),
            (["operator"], edit.operator.misfit(self.place())),
        ]
        for position, operator in enumerate(edit.operators()[1:]):
            misfits.append((["layers", "operators", position], operator.misfit(self.place())))
        for section, misfit in misfits:
            if misfit is not None:
                field, given, accepted = misfit
                refuse(["graft", number, *section, field], given, accepted)
        if isinstance(edit.layers, LearnedLayers) and edit.layers.budget is not None:
            self._check_budget(number, edit, edit.layers.budget)

    def _check_budget(self, number: int, edit: OperatorEdits, budget: float) -> None:
        """That some choice of operators meets it; no other edit changes the cost behind its back."""
        if len(self.graft) > 1:
            refuse(["graft", number, "layers", "budget"], budget, "no budget, or no other edit in the job")
        place = self.place()
        # Neither parameters nor classes matter to FLOPs.
        rootstock = rootstock_cost(self.model, place, self.codec.latent_channels(self.data), num_classes=1)
        options = [operator_cost(operator, place) for operator in edit.operators()]
        original = operator_cost(ORIGINALS[edit.target], place)
        sites = len(edit.layers.candidates(self.model.depth))
        found = reachable(rootstock, original, options, sites, budget * rootstock.flops)
        least, most, nearest = (total / rootstock.flops for total in found)
        if abs(nearest - budget) > BUDGET_TOLERANCE * budget:
            accepted = f"what these operators can reach, {least:.3f} .. {most:.3f}; nearest is {nearest:.3f}"
            refuse(["graft", number, "layers", "budget"], budget, accepted)

    def _check_sites(self) -> None:
        """Refuse a site that is edited twice, and a block that is paired twice, unless they are solved for."""
        owners: dict[str, int] = {}
        solved = self.solved()
        for number, edits in enumerate(self.graft):
            for edit in edits.edits(self.model.depth):
                pair = edit.site.target == "pair"
                blocks = (edit.site.block, edit.site.block + 1) if pair else (edit.site.block,)
                for site in (f"{block:02d}.{edit.site.target}" for block in blocks):
                    both_solved = number in solved and owners.get(site, number) in solved
                    if not both_solved and (owners.get(site, number) != number or (pair and site in owners)):
                        field = "pairs" if pair else "layers"
                        refuse(["graft", number, field], site, f"sites that graft.{owners[site]} has not taken")
                    owners[site] = number
        if any(isinstance(edit, ParallelEdits) for edit in self.graft):
            self._check_pairs()

    def _check_pairs(self) -> None:
        """That a pair takes in only what is certain: its scions are those of its blocks."""
        paired = {
            edit.site.block + offset
            for spec in self.graft
            if isinstance(spec, ParallelEdits) and spec.layers is None
            for edit in spec.edits(self.model.depth)
            for offset in (0, 1)
        }
        for number, spec in enumerate(self.graft):
            if isinstance(spec, OperatorEdits) and spec.layers.evidence != "none":
                for block in spec.layers.candidates(self.model.depth):
                    if block in paired:
                        accepted = f"a strategy that knows its blocks beforehand, since block {block} is in a pair"
                        refuse(["graft", number, "layers", "kind"], spec.layers.kind, accepted)

    def samplers(self) -> dict[str, AnySampler]:
        """Return what samples are drawn with, by the section that says so."""
        samplers: dict[str, AnySampler] = {"evaluate": self.evaluate.sampler}
        if isinstance(self.data, SyntheticData):
            samplers["data"] = self.data.sampler or self.model.default_sampler
        return samplers

    def rows(self) -> tuple[Row, ...]:
        """Return the models of the table: those that were chosen, or all that the job makes; and all finalists."""
        others = (row for row in get_args(Row) if row not in FINALISTS)
        rows = self.evaluate.rows or tuple(row for row in others if row != "random_init" or self.finetune.control)
        return (*rows, *(row for row in self.finalists() if row not in rows))

    def finalists(self) -> tuple[Row, ...]:
        """Return the plans that are finetuned shortly, as rows of the table."""
        solve = self.solve
        return FINALISTS[: solve.plans] if solve is not None and solve.finalists is not None else ()

    def precisions(self) -> dict[str, tuple[Precision, float]]:
        """Return, by field, each precision that steps compute in, and the GPUs that each of their tasks takes."""
        by_field = dict[str, tuple[Precision, float]]()

        def gpus(stage: str) -> float:
            return self.resources.of(stage).gpu

        if isinstance(self.codec, VaeCodec):  # features are encoded, samples decoded
            by_field["codec.precision"] = (
                self.codec.precision,
                max(gpus("features"), gpus("evaluate")),
            )
        if isinstance(self.weights, PretrainWeights):
            by_field["weights.precision"] = self.weights.precision, gpus("base")
        if isinstance(self.data, SyntheticData):
            by_field["data.precision"] = self.data.precision, gpus("synthesis")
        by_field["profile.precision"] = self.profile.precision, gpus("profile")
        by_field["distill.precision"] = self.distill.precision, gpus("distill")
        if self.scored():
            by_field["score.precision"] = self.score.precision, gpus("score")
        for number, layers in self.learned().items():
            by_field[f"graft.{number}.layers.search.precision"] = layers.search.precision, gpus("search")
        by_field["finetune.precision"] = self.finetune.precision, gpus("finetune")
        by_field["evaluate.precision"] = self.evaluate.precision, gpus("evaluate")
        return by_field

    def learned(self) -> dict[int, LearnedLayers]:
        """The strategies that search, by the place of their edit in the list."""
        layers = {number: spec.layers for number, spec in enumerate(self.graft)}
        return {number: one for number, one in layers.items() if isinstance(one, LearnedLayers)}

    def solved(self) -> dict[int, SolvedLayers]:
        """The strategies that are solved together, by the place of their edit in the list."""
        layers = {number: spec.layers for number, spec in enumerate(self.graft)}
        return {number: one for number, one in layers.items() if isinstance(one, SolvedLayers)}

    def budget(self) -> float | None:
        """The share of the rootstock's FLOPs that a search is to bring the model to."""
        return next((one.budget for one in self.learned().values() if one.budget is not None), None)

    def latent_side(self) -> int:
        """Latent pixels a side."""
        return self.data.image_size // self.codec.factor

    def place(self) -> Place:
        """The shape of the model's blocks."""
        num_tokens = (self.latent_side() // self.model.patch) ** 2
        return Place(width=self.model.width, heads=self.model.heads, num_tokens=num_tokens)

    def scored(self) -> tuple[Edit, ...]:
        """The edits whose strategies go by scores."""
        rules = zip(self.graft, self.rules(), strict=True)
        return tuple(
            edit
            for spec, rule in rules
            if spec.layers is not None and spec.layers.evidence == "scores"
            for edit in rule
        )

    def rules(self) -> tuple[tuple[Edit, ...], ...]:
        """The edits that each entry of `graft` may make, the operators that may stand in one site numbered."""
        return numbered(spec.edits(self.model.depth) for spec in self.graft)

    def candidates(self) -> tuple[Edit, ...]:
        """The edits that are solved for, in the order of `graft`."""
        solved = self.solved()
        return tuple(edit for number, rule in enumerate(self.rules()) if number in solved for edit in rule)

    def edits(self) -> tuple[Edit, ...]:
        """Every edit that the job may make, site by site, in the order in which they are made."""
        return tuple(sorted((edit for rule in self.rules() for edit in rule), key=Edit.sort_key))
