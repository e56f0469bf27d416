"""DeepSpeed's engine behind the trainer's `Engine`: ZeRO 1 to 3, fp32 or bf16, with an EMA of the fp32 weights.

DeepSpeed keeps the fp32 weights as flat tensors, each worker a part. The EMA and AdamW's two moments are flat tensors
of the same shape, so all four are read and written the same way: put the flat tensor where the weights are, and have
DeepSpeed gather (or scatter) it by parameter. Checkpoints are thus whole tensors with the model's names, readable
without DeepSpeed and by any number of workers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from graftwork.cluster.session.imports import without
from graftwork.models.condition import Condition
from graftwork.models.numerics.torch_internals import move_towards
from graftwork.models.outlines import outline
from graftwork.specs.training import FinetuneSpec

with without("mlflow"):  # its autotuner, which we do not use, logs there if it can: a second of imports
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param

    from graftwork.cluster.training.deepspeed_internals import flat_weights, part_size, skip_probes

MOMENTS = ("exp_avg", "exp_avg_sq")

skip_probes()


def named(kind: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return values, by parameter, under their names in a state."""
    return {f"{kind}/{name}": value for name, value in values.items()}


def _sums_in_fp32(recipe: FinetuneSpec, device: torch.device) -> bool:
    """Return whether gradients in bf16 are summed over a step's passes in fp32: where there may be several passes."""
    return recipe.precision == "bf16" and (recipe.micro_batch is not None or device.type != "cpu")


def _stage(recipe: FinetuneSpec, device: torch.device) -> int:
    """Return the ZeRO stage to run. Stage 1 has another optimizer for sums in fp32; stage 2 then does its work."""
    return 2 if recipe.deepspeed.zero == 1 and _sums_in_fp32(recipe, device) else recipe.deepspeed.zero


def _clipped_by_deepspeed(recipe: FinetuneSpec) -> bool:
    """ZeRO 3 updates the weights part by part, so that only DeepSpeed sees the whole gradient before."""
    return recipe.deepspeed.zero == 3


def _config(recipe: FinetuneSpec, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's settings.

    The size and number of passes before a step is not known here: each pass says whether it is the last. By default
    DeepSpeed waits for the device at each step: to time it, and to skip it if its gradient is no number, where the
    training would end anyway. Only in ZeRO 3 no setting keeps it from asking whether the gradient is one.
    """
    theirs = _clipped_by_deepspeed(recipe)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "data_types": {"grad_accum_dtype": "fp32"} if _sums_in_fp32(recipe, device) else {},
        "gradient_clipping": recipe.clip if theirs else 0.0,
        "bf16": {"enabled": recipe.precision == "bf16", "check_grad_overflow": False},
        "zero_optimization": {"stage": _stage(recipe, device), "compute_grad_norm": theirs},
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}},
    }


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are not frozen."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


class ShardedEngine:
    """One worker's share of a model in training; `state` is what an earlier engine's `state()` returned.

    Parameters that are frozen are in no state, and have no EMA.
    """

    def __init__(self, model: nn.Module, recipe: FinetuneSpec, state: Mapping[str, Tensor] | None) -> None:
        trained = _trained(model)
        if state is not None:
            model.load_state_dict({name: state[f"weights/{name}"] for name in trained}, strict=False)
        start = {name: value.detach().clone() for name, value in trained.items()}
        device = next(model.parameters()).device
        self.outline = outline(model, torch.device("meta"))  # before DeepSpeed takes the model apart
        optimizer = torch.optim.AdamW(trained.values(), lr=recipe.lr, betas=recipe.betas, weight_decay=0.0, fused=True)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            dist_init_required=False,
            config=_config(recipe, device),
        )
        if not _clipped_by_deepspeed(recipe):
            optimizer.register_step_pre_hook(self._clip)
        self.recipe = recipe
        self.dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self.parameters = _trained(self.engine.module)
        if state is None:
            # bf16 rounded the weights on their way in; the fp32 ones start from what was given.
            self._scatter(start)
            self.ema = self._copies()
        else:
            self._resume(state)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        # By name: of what it is given by position, DeepSpeed warns where it knows the type of none.
        return self.engine(x.to(self.dtype), t, condition=condition.to(dtype=self.dtype))

    def stand_in(self) -> Self:
        copied = copy.copy(self)
        copied.engine = outline(self.outline, self.engine.device).to(self.dtype)
        return copied

    def accumulate(self, loss: Tensor) -> None:
        self.engine.set_gradient_accumulation_boundary(False)
        self.engine.backward(loss)
        self.engine.step()  # counts the pass, and no more

    def step(self, loss: Tensor, lr: float) -> None:
        """Backward of the last pass, clip, one AdamW step at `lr`, then the EMA."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(loss)
        self.engine.step()
        with torch.no_grad():
            move_towards(self.ema, self._flats(), 1 - self.recipe.ema)

    def state(self) -> dict[str, Tensor]:
        """Weights, EMA, moments and step count as whole fp32 tensors, on the first worker alone; all must call it."""
        flats, moments = self._flats(), self._moments()
        state = named("weights", self._gather())
        moments, flats = self._moments(), self._flats()
        with self._standing_in() as stand_in:
            stand_in(self.ema)
            state |= named("ema", self._gather())
            for kind in MOMENTS:
                stand_in([moments[flat][kind] for flat in flats])
                state |= named(kind, self._gather())
        if state:
            state["adam_steps"] = moments[flats[0]]["step"].to("cpu", copy=True)
        return state

    def _resume(self, state: Mapping[str, Tensor]) -> None:
        def whole(kind: str) -> dict[str, Tensor]:
            return {name: state[f"{kind}/{name}"] for name in self.parameters}

        self._scatter(whole("ema"))
        self.ema = self._copies()
        moments = self._moments()
        for kind in MOMENTS:
            self._scatter(whole(kind))
            for flat, values in zip(self._flats(), self._copies(), strict=True):
                moments[flat] |= {kind: values, "step": state["adam_steps"].to(flat.device, copy=True)}
        self._scatter(whole("weights"))

    @contextmanager
    def _standing_in(self) -> Iterator[Callable[[list[Tensor]], None]]:
        """Yield what puts other values where the flat weights are, the only tensors that DeepSpeed gathers whole.

        The weights are there again when the context ends.
        """
        weights = self._copies()
        try:
            yield self._fill
        finally:
            self._fill(weights)

    @torch.no_grad()
    def _clip(self, *_: object) -> None:
        """Scale the gradients of the flat weights, so that over all workers they are no longer than `clip`."""
        flats = self._flats()
        squares = get_total_norm([flat.grad for flat in flats if flat.grad is not None]).square()
        torch.distributed.all_reduce(squares)
        clip_grads_with_norm_(flats, self.recipe.clip, squares.sqrt())

    def _moments(self) -> dict[Tensor, dict[str, Tensor]]:
        """AdamW's state, by flat tensor."""
        return self.engine.optimizer.optimizer.state

    def _flats(self) -> list[Tensor]:
        """This worker's flat fp32 weights."""
        return flat_weights(self.engine.optimizer, self.recipe.deepspeed.zero)

    def _copies(self) -> list[Tensor]:
        return [flat.detach().clone() for flat in self._flats()]

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for flat, value in zip(self._flats(), values, strict=True):
            flat.copy_(value)

    @torch.no_grad()
    def _gather(self) -> dict[str, Tensor]:
        """The flat tensors as whole ones, by parameter; {} on all workers but the first."""
        whole = {}
        for name, parameter in self.parameters.items():
            value = safe_get_full_fp32_param(parameter)
            if torch.distributed.get_rank() == 0:
                whole[name] = value.to("cpu", torch.float32, copy=True)
        return whole

    @torch.no_grad()
    def _scatter(self, values: Mapping[str, Tensor]) -> None:
        """Put each worker's part of the values into its flat tensors."""
        for name, parameter in self.parameters.items():
            value = values[name].to(self.engine.device, torch.float32)
            if self.recipe.deepspeed.zero < 3:
                safe_set_full_fp32_param(parameter, value)
                continue
            # ZeRO 3 pads a parameter to equal parts; its own setter of whole values does not.
            part = part_size(parameter)
            rank = torch.distributed.get_rank()
            padded = F.pad(value.flatten(), (0, part * torch.distributed.get_world_size() - value.numel()))
            safe_set_local_fp32_param(parameter, padded[rank * part : (rank + 1) * part])
