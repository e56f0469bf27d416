"""The rootstock as a teacher in stage 2: the graft also learns from what it puts out, and from its blocks' outputs.

The teacher sees the same noised latents, timesteps and conditions, dropped ones too, without gradients. The loss is
that of TinyFusion's masked distillation (arXiv 2412.01199, section 3.4, and its code):

    task L + output L_output + features(along) L_features

L is the ordinary loss of the objective. L_output is the objective's `mimicry` of the teacher's output. L_features is,
over the blocks, the mean squared difference of their outputs (B,N,D), in each of which values far from the mean of
their sample count as 0. A block is paired with itself; a parallel pair with its second block; behind an operator that
was dropped the stream is what it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graftwork.models.condition import Condition
from graftwork.models.numerics.precision import computing
from graftwork.models.objectives import Network, Objective
from graftwork.models.rootstocks import Rootstock
from graftwork.models.rootstocks.parallel import ParallelBlock
from graftwork.specs.training import Precision, TeacherSpec
from graftwork.stages.training.batches import Batch


@dataclass
class BlockOutputs:
    """What leaves the blocks of a model in a pass, (B,N,D) each by its number."""

    tokens: dict[int, Tensor] = field(default_factory=dict)

    def watch(self, model: Rootstock, blocks: Iterable[int]) -> None:
        """Have the model say what leaves these blocks, in every pass from now on."""
        wanted = frozenset(blocks)

        # A function, which copies of the model share, as a bound method would not be.
        def note(index: int, tokens: Tensor) -> None:
            if index in wanted:
                self.tokens[index] = tokens

        model.on_block = note

    def take(self) -> dict[int, Tensor]:
        """Return what was noted since it was last taken."""
        taken, self.tokens = self.tokens, {}
        return taken


class TeacherLoss:
    """The loss of a graft in training, and of what its rootstock would have put out."""

    def __init__(
        self,
        objective: Objective,
        spec: TeacherSpec,
        teacher: Rootstock,
        student: Rootstock,
        precision: Precision,
        device: torch.device,
    ) -> None:
        """precision: of the training, and of the teacher's passes unless the spec says otherwise."""
        self.objective, self.spec = objective.on(device), spec
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        self.precision: Precision = spec.precision or precision
        self.device = device
        self.blocks = [
            index for index, block in enumerate(student.blocks) if not isinstance(block, ParallelBlock)
        ]  # the second of a pair, which its block has taken in, says what leaves the pair
        self.student_outputs, self.teacher_outputs = BlockOutputs(), BlockOutputs()
        if spec.features:
            self.student_outputs.watch(student, self.blocks)
            self.teacher_outputs.watch(self.teacher, self.blocks)
        if spec.compile:
            for block in self.teacher.blocks:
                block.compile()

    def __call__(self, network: Network, batch: Batch, along: float) -> Tensor:
        """Return the loss of each sample, (B,) float32. along: the share of the training that is done, 0 .. 1."""
        pairs: list[tuple[Tensor, Tensor]] = []  # of noised latents, and what the network put out

        def noting(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            output = network(x, t, condition)
            pairs.append((x, output))
            return output

        loss = self.spec.task * self.objective.loss(noting, batch.x, batch.t, batch.condition, batch.noise)
        ((x, output),) = pairs
        with torch.no_grad(), computing(self.precision, self.device):
            target = self.teacher(x, batch.t, batch.condition)
        if self.spec.output:
            mimicry = self.objective.mimicry(x, batch.t, output.float(), target.float())
            loss = loss + self.spec.output * mimicry
        if self.spec.features:
            students, teachers = self.student_outputs.take(), self.teacher_outputs.take()
            errors = [self.feature_error(students[index], teachers[index]) for index in self.blocks]
            loss = loss + self.features_weight(along) * torch.stack(errors).mean(0)
        return loss

    def features_weight(self, along: float) -> float:
        """Return the weight of the features' error at a share of the training."""
        return self.spec.features * (1.0 if self.spec.features_decay == "none" else 1 - along)

    def feature_error(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean squared difference (B,) of what leaves a block (B,N,D), without outliers on either side."""
        difference = self._without_outliers(student.float()) - self._without_outliers(teacher.float())
        return difference.square().flatten(1).mean(1)

    def _without_outliers(self, tokens: Tensor) -> Tensor:
        """Return tokens (B,N,D) with 0 where they are further from their sample's mean than the spec says."""
        if self.spec.outliers is None:
            return tokens
        values = tokens.detach()
        mean, std = values.mean((1, 2), keepdim=True), values.std((1, 2), keepdim=True)
        return tokens * ((values - mean).abs() < self.spec.outliers * std)
