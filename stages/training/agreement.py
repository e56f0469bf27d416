"""How the workers of one training agree at which step to save or stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist

from graftwork.models.numerics.torch_internals import group_store

MAX_LEAD_STEPS = 2  # how far the fastest worker can be ahead of where all workers are known to be


Action = Literal["stop", "save"]


class Agreement:
    """Has all workers of a training stop, or save a checkpoint, before the same step.

    The first worker announces a step MAX_LEAD_STEPS after its next one, before it takes part in that. The others find
    the announcement in time: none begins a step before its device has ended the one MAX_LEAD_STEPS earlier, which it
    cannot without the first worker. With a GPU that is a wait, but one that leaves it work to do.
    """

    KEY = "graftwork/action"  # and its number: one at a time is announced, and taken by all before the next

    def __init__(self, stopping: Callable[[], bool], saving: Callable[[], bool], device: torch.device) -> None:
        """stopping, saving: whether it is time for that; asked of the first worker."""
        self.stopping, self.saving, self.device = stopping, saving, device
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        self.store = None if alone else group_store()
        self.num_actions = 0
        self.announced: tuple[Action, int] | None = None  # and before which step it is due
        self.queued: deque[torch.cuda.Event] = deque()  # the ends of steps that a GPU may not have reached

    def before(self, step: int) -> Action | None:
        """Return what all workers do before this step."""
        if self.store is None:
            return self._wanted()
        self._keep_pace()
        if self.announced is None:
            self.announced = self._announce(step + MAX_LEAD_STEPS) if dist.get_rank() == 0 else self._hear()
        if self.announced is None or self.announced[1] != step:
            return None
        action, self.announced = self.announced[0], None
        self.num_actions += 1
        return action

    def forget(self) -> None:
        """Leave no announcement to another training of the same group; every worker must be past the last step."""
        if self.store is not None and dist.get_rank() == 0:
            for number in range(self.num_actions + 1):
                self.store.delete_key(f"{self.KEY}/{number}")

    def _wanted(self) -> Action | None:
        return "stop" if self.stopping() else "save" if self.saving() else None

    def _announce(self, step: int) -> tuple[Action, int] | None:
        assert self.store is not None
        action = self._wanted()
        if action is None:
            return None
        key = f"{self.KEY}/{self.num_actions}"
        self.store.set(key, f"{action} {step}")
        self.store.get(key)  # only its answer says that the others can see it
        return action, step

    def _hear(self) -> tuple[Action, int] | None:
        assert self.store is not None
        key = f"{self.KEY}/{self.num_actions}"
        if not self.store.check([key]):
            return None
        action, step = self.store.get(key).decode().split()
        return ("stop" if action == "stop" else "save"), int(step)

    def _keep_pace(self) -> None:
        """Wait until the step before the last one is over. On a CPU it is: its collectives wait by themselves."""
        if self.device.type == "cpu":
            return
        event = torch.cuda.Event()
        event.record()
        self.queued.append(event)
        if len(self.queued) == MAX_LEAD_STEPS:
            self.queued.popleft().synchronize()
