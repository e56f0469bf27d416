"""The engine of a training: what takes a step with the gradients; the plain one is a torch optimizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graftwork.models.condition import Condition
from graftwork.models.numerics.precision import computing
from graftwork.models.numerics.torch_internals import move_towards
from graftwork.models.outlines import outline
from graftwork.specs.training import Precision
from graftwork.stages.training.microbatches import Trainable


class Engine(Trainable, Protocol):
    """A network in training, and all that changes in it."""

    def accumulate(self, loss: Tensor) -> None:
        """Backward, of a pass that another one of the same step follows."""
        ...

    def step(self, loss: Tensor, lr: float) -> bool | None:
        """Backward of a step's last pass, clip, one optimizer step at `lr`, then the EMA; False: it was skipped."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return, on the first worker, copies of all that is needed to go on: `weights/*`, `ema/*`, the optimizer's.

        Every worker must call it; the others get {} and keep nothing.
        """
        ...


def is_first_worker() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def sum_over_workers(value: Tensor) -> Tensor:
    """Return the sum of what each worker has; all of them must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


class PlainEngine:
    """AdamW and an EMA on each worker, with gradients averaged over the workers: for models that fit one device.

    Only what requires a gradient is trained, averaged and kept.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float,
        ema: float = 0.0,
        rates: Mapping[str, float] | None = None,
        precision: Precision = "fp32",
        state: Mapping[str, Tensor] | None,
    ) -> None:
        """rates: factors on the learning rate, by name of the weight; 1 for all others. precision: of passes."""
        self.model, self.clip, self.decay, self.precision = model, clip, ema, precision
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.names, self.weights = list(trained), list[Tensor](trained.values())
        self.ema = [value.detach().clone() for value in self.weights]
        groups: dict[float, list[Tensor]] = {}
        for name, value in trained.items():
            groups.setdefault((rates or {}).get(name, 1.0), []).append(value)
        self.adam = torch.optim.AdamW(
            [{"params": values, "rate": rate} for rate, values in groups.items()],
            betas=betas,
            weight_decay=0.0,
            fused=True,
        )
        self.accumulated: Tensor | None = None  # loss of the passes of a step that has more of them
        self.reserve: list[Tensor] = []
        if state is not None:
            self._resume(state)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with computing(self.precision, x.device):
            output: Tensor = self.model(x, t, condition)
        return output

    def stand_in(self) -> Self:
        copied = copy.copy(self)
        copied.model = outline(self.model, self.weights[0].device)
        if not self.adam.state:  # the moments that the first step makes
            copied.reserve = [torch.zeros_like(value) for value in self.weights for _ in range(2)]
        return copied

    def accumulate(self, loss: Tensor) -> None:
        loss.backward()
        self.accumulated = loss.detach() + (0.0 if self.accumulated is None else self.accumulated)

    def step(self, loss: Tensor, lr: float) -> bool:
        loss.backward()
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.clip)
        whole = loss.detach() if self.accumulated is None else loss.detach() + self.accumulated
        self.accumulated = None
        makes_step = self.takes(whole, norm)
        if makes_step:
            for group in self.adam.param_groups:
                group["lr"] = lr * group["rate"]
            self.adam.step()
            with torch.no_grad():
                move_towards(self.ema, self.weights, 1 - self.decay)
        self.adam.zero_grad()
        return makes_step

    def takes(self, loss: Tensor, norm: Tensor) -> bool:
        """Return whether to make a step. loss: this worker's, of all passes; norm: the gradient's, over all workers."""
        return True

    def state(self) -> dict[str, Tensor]:
        if not is_first_worker():
            return {}
        kinds: dict[str, list[Tensor]] = {"weights": self.weights, "ema": self.ema}
        steps: dict[str, Tensor] = {}
        if self.adam.state:  # empty as long as all steps were skipped
            moments = ("exp_avg", "exp_avg_sq")
            kinds |= {kind: [self.adam.state[value][kind] for value in self.weights] for kind in moments}
            steps["adam_steps"] = self.adam.state[self.weights[0]]["step"].detach().to("cpu", copy=True)
        state = {
            f"{kind}/{name}": value.detach().to("cpu", copy=True)
            for kind, values in kinds.items()
            for name, value in zip(self.names, values, strict=True)
        }
        return state | steps

    @torch.no_grad()
    def _resume(self, state: Mapping[str, Tensor]) -> None:
        for name, value, ema in zip(self.names, self.weights, self.ema, strict=True):
            value.copy_(state[f"weights/{name}"])
            ema.copy_(state[f"ema/{name}"])
            if "adam_steps" not in state:
                continue
            self.adam.state[value] = {
                "step": state["adam_steps"].to(value.device, copy=True),
                "exp_avg": state[f"exp_avg/{name}"].to(value.device),
                "exp_avg_sq": state[f"exp_avg_sq/{name}"].to(value.device),
            }

    def _average_gradients(self) -> None:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        gradients = [value.grad for value in self.weights if value.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
