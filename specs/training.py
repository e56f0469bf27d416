"""Recipes: pretraining and finetuning share one, distillation has its own. Defaults are the published values."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ByteSize, Field, model_validator

from graftwork.specs.fields import KeyedIfSet, Line, Spec, Unkeyed, refuse

Positive = Annotated[float, Field(gt=0)]
# Of products of matrices and convolutions. tf32 rounds the factors to 10 bits on a GPU; a CPU computes it as fp32.
Precision = Literal["fp32", "tf32", "bf16"]
ADDED_PRECISION = KeyedIfSet("fp32")  # of what had no precision to set, and always computed in fp32
PRECISION = "of the passes; weights and optimizer stay fp32. On a CPU tf32 is fp32"


class SharedBatch(Spec):
    """Batches that workers share."""

    batch: int = Field(256, ge=1, description="samples a step, over all workers")
    workers: int = Field(1, ge=1, description="processes that share a step's batch; any number up to it")
    min_workers: Annotated[int | None, Unkeyed()] = Field(
        None,
        ge=1,
        description="with as few it goes on when nodes are lost and none come; sums then differ in their last bits",
    )

    @model_validator(mode="after")
    def _workers_have_work(self) -> Self:
        if self.workers > self.batch:
            refuse(["workers"], self.workers, f"at most batch, {self.batch}")
        if self.min_workers is not None and self.min_workers > self.workers:
            refuse(["min_workers"], self.min_workers, f"at most workers, {self.workers}")
        return self

    def worker_counts(self) -> tuple[int, ...]:
        """Return the numbers of workers that may share the work, the wanted one first."""
        return tuple(range(self.workers, (self.min_workers or self.workers) - 1, -1))


class TrainingSpec(SharedBatch):
    """The ordinary diffusion training, whatever the weights it starts from."""

    steps: int = Field(50_000, ge=1)
    lr: float = Field(1e-4, gt=0, description="AdamW, no weight decay")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up; cosine ends at 0")
    clip: float = Field(10.0, gt=0, description="largest norm of the gradient")
    ema: float = Field(0.9999, ge=0, lt=1, description="decay of the weight average, a step")
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of labels replaced by the null class")
    caption_dropout: Annotated[float | None, KeyedIfSet()] = Field(
        None,
        ge=0,
        le=1,
        description="in place of label_dropout, of models that are told texts: share of texts replaced by the empty "
        "one, 0.1 unless given",
    )
    precision: Annotated[Precision, ADDED_PRECISION] = Field("fp32", description=PRECISION)
    micro_batch: Annotated[int | None, Unkeyed()] = Field(
        None,
        ge=1,
        description="samples that a worker passes at once, at most: gradients are summed over its passes, and sums "
        "differ in their last bits. Left out: on a GPU what fits, found by trial; on a CPU the worker's whole part",
    )
    checkpoint_minutes: Annotated[float, Unkeyed()] = Field(
        10.0, gt=0, description="minutes of training at most between two checkpoints"
    )
    checkpoint_every: Annotated[int | None, Unkeyed()] = Field(
        None, ge=1, description="steps between two checkpoints, beside checkpoint_minutes"
    )
    compile: Annotated[bool, Unkeyed()] = Field(
        False, description="torch.compile for the blocks: faster on a GPU; sums then differ in their last bits"
    )
    checkpointing: Annotated[bool, Unkeyed()] = Field(
        False, description="keep no activations within a block: less memory, a forward pass more"
    )

    @property
    def dropout(self) -> float:
        """The share of samples whose condition is dropped, label or text."""
        return self.label_dropout if self.caption_dropout is None else self.caption_dropout


class DeepSpeedSpec(Spec):
    """DeepSpeed's engine: which states are split over the workers."""

    zero: Literal[1, 2, 3] = Field(2, description="ZeRO stage")


class LoraSpec(Spec):
    """Updates of low rank (arXiv 2106.09685) to the linear layers of the rootstock, merged into them at the end."""

    rank: int = Field(16, ge=1, le=65_536)
    alpha: float = Field(8.0, gt=0, description="the update is multiplied by alpha / rank")
    targets: tuple[Line, ...] | None = Field(
        None, min_length=1, description="endings of the names of linear layers, as [attn.qkv, mlp.fc1]; by default all"
    )


class TeacherSpec(Spec):
    """The rootstock as a teacher while the graft is finetuned; by default as TinyFusion's masked distillation
    (arXiv 2412.01199)."""

    task: float = Field(0.1, ge=0, description="weight of the ordinary loss")
    output: float = Field(
        0.9, ge=0, description="weight of the error to what the rootstock puts out: noise and variance, or velocity"
    )
    features: float = Field(
        0.01, ge=0, description="weight, at the first step, of the error to the rootstock's tokens behind each block"
    )
    features_decay: Literal["linear", "none"] = Field("linear", description="of that weight; linear: to 0 at the end")
    outliers: float | None = Field(
        2.0,
        gt=0,
        description="standard deviations from the mean of a sample's tokens beyond which they count as 0 in that "
        "error; null: none do",
    )
    precision: Precision | None = Field(None, description="of the rootstock's passes; the finetune's unless given")
    compile: Annotated[bool, Unkeyed()] = Field(
        False, description="torch.compile for the rootstock's blocks; sums then differ in their last bits"
    )

    @model_validator(mode="after")
    def _teaches(self) -> Self:
        if not self.output and not self.features:
            refuse(["output"], self.output, "above 0, or features above 0: no teacher is the default")
        return self


class FinetuneSpec(TrainingSpec):
    """Stage 2 (arXiv 2506.05340): the grafted model on a small share of the data; by default all of its parameters."""

    train: Annotated[Literal["all", "scions", "lora"], KeyedIfSet("all")] = Field(
        "all",
        description="all parameters; or the scions of the job's plan alone; or these whole, and all else by LoRA",
    )
    lora: Annotated[LoraSpec | None, KeyedIfSet()] = Field(None, description="for train: lora, other than its defaults")
    teacher: Annotated[TeacherSpec | None, KeyedIfSet()] = Field(
        None, description="learn from the rootstock too, as in {}; the published recipe has no teacher"
    )
    fraction: float = Field(0.1, gt=0, le=1, description="share of the training data, the same of each class")
    warmup: int = Field(500, ge=0, description="steps of linear warm-up")
    precision: Precision = Field("fp32", description=PRECISION)
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    control: bool = Field(True, description="also finetune the same plan from randomly initialised scions")

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        if self.lora is not None and self.train != "lora":
            refuse(["lora"], self.lora.model_dump(mode="json"), "nothing, or train: lora beside it")
        if self.compile and self.deepspeed.zero == 3:
            refuse(["compile"], True, "false where deepspeed.zero is 3, whose gathering of weights breaks the code up")
        return self


class SearchSpec(TrainingSpec):
    """Learned layer selection (arXiv 2506.05340): gates, LoRA on the frozen rootstock, scions trained whole."""

    steps: int = Field(12_000, ge=1)
    batch: int = Field(64, ge=1, description="samples a step, over all workers")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the weight average, of the gates too, a step")
    fraction: float = Field(0.1, gt=0, le=1, description="share of the training data, the same of each class")
    gate_lr: float = Field(10.0, gt=0, description="learning rate of the gates, over lr")
    logit_start: float = Field(0.02, description="what every logit starts at")
    logit_scale: tuple[Positive, Positive] = Field((100.0, 100.0), description="at the first and the last step")
    temperature: tuple[Positive, Positive] = Field((4.0, 0.1), description="at the first and the last step")
    lora_rank: int = Field(8, ge=1)
    lora_alpha: float = Field(16.0, gt=0)
    nan_patience: int = Field(10, ge=1, description="steps in a row whose loss may be no number: they are skipped")
    undecided: float = Field(0.5, ge=0, le=1, description="a choice of less probability is warned of")
    budget_weight: float = Field(
        10.0, gt=0, description="under a budget: what the squared relative miss of the expected FLOPs adds to the loss"
    )


class ProfileSpec(Spec):
    """Statistics of the rootstock's operators."""

    precision: Annotated[Precision, ADDED_PRECISION] = Field(
        "fp32", description="of the rootstock's passes. On a CPU tf32 is fp32"
    )


class DistillSpec(SharedBatch):
    """Stage 1 (arXiv 2506.05340): regress each scion on the operator that it replaces."""

    samples: int = Field(8_000, ge=1, description="training samples, of each class its share")
    heldout: int | None = Field(
        None,
        ge=1,
        description="held-out samples; as many as `samples`, or an eighth of them with `passes`, or all there are",
    )
    draws: int = Field(1, ge=1, description="timesteps drawn a sample")
    epochs: int = Field(200, ge=1)
    passes: Annotated[int | None, KeyedIfSet()] = Field(
        None,
        ge=1,
        description="in place of epochs, for models whose activations fit nowhere: passes of the rootstock over the "
        "samples, each with noise of its own, from which all sites of a task learn at once and nothing is kept; the "
        "published budget is about 2 at 16,384 tokens",
    )
    batch: int = Field(64, ge=1)
    workers: Annotated[int, KeyedIfSet(1)] = Field(
        1,
        ge=1,
        description="with passes: processes that share each pass, a part of every batch each, for all sites of a task; "
        "any number up to the batch",
    )
    micro_batch: Annotated[int | None, Unkeyed()] = Field(
        None,
        ge=1,
        description="with passes: samples that pass the rootstock at once, at most; gradients are summed, and sums "
        "differ in their last bits. Left out: on a GPU by its memory; on a CPU a worker's whole part of the batch",
    )
    start: Annotated[Literal["fresh", "inherited"], KeyedIfSet("fresh")] = Field(
        "fresh",
        description="what a scion begins with: weights that are drawn, or those of the operator that it replaces where "
        "shapes allow (arXiv 2412.16112)",
    )
    lr: float = Field(5e-4, gt=0, description="AdamW, no weight decay")
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (50, 100, 150),
        description="epochs at whose start the learning rate halves; with passes the same shares of all steps",
    )
    clip: float = Field(10.0, gt=0, description="largest norm of the gradient")
    precision: Precision = Field("fp32", description=PRECISION)
    loss: Literal["auto", "l1", "l2", "huber"] = Field(
        "auto", description="auto: by the profile of the operator's outputs, l1 where their tails are heavy, else l2"
    )
    # The published advice is L1 for attention and L2 for MLPs. On the digits' rootstock attention has 13 to 63, MLPs
    # have 5 to 27, 10 in the median.
    heavy_tails: float = Field(12.0, description="for auto: excess kurtosis beyond which tails are heavy")
    gate_weighted: bool = Field(False, description="weight the error by the block's adaLN gate")
    compile: Annotated[bool, Unkeyed()] = Field(False, description="torch.compile the scion: pays on a GPU")
    activations: Annotated[ByteSize | None, Unkeyed()] = Field(
        None,
        gt=0,
        description="bytes of activations that a task holds at once, also as in 40GiB: what does not fit is computed "
        "again; by default half of the memory that is free",
    )
    checkpoint_every: Annotated[int, Unkeyed()] = Field(
        10, ge=1, description="epochs; with passes it is every 10 minutes, and after each pass"
    )

    @model_validator(mode="after")
    def _has_one_budget(self) -> Self:
        if self.passes is not None and "epochs" in self.model_fields_set:
            refuse(["epochs"], self.epochs, "either epochs, of activations that are kept, or passes")
        if self.passes is not None and self.draws > 1:
            refuse(["draws"], self.draws, "1 with passes, each of which draws timesteps anew")
        if self.passes is None and self.micro_batch is not None:
            refuse(["micro_batch"], self.micro_batch, "with passes only; other distillations have batch")
        if self.passes is None and self.workers > 1:
            refuse(["workers"], self.workers, "1 without passes; the sites of other distillations share the machine")
        return self

    @property
    def num_heldout(self) -> int:
        """The held-out samples that are asked for."""
        return self.heldout or (self.samples if self.passes is None else max(1, self.samples // 8))
