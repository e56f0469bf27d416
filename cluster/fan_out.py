"""The same work on many items, wherever the cluster has room: tasks on CPUs, processes that stay on GPUs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ray

from graftwork.cluster.session.runtime import options, room_for, settle
from graftwork.specs.resources import StepResources

if TYPE_CHECKING:
    import torch

POLL_SECONDS = 0.25
RETRIES = 3  # of what a lost worker was at
AHEAD = 4  # items begun and not yet handed on, for each that there is room for

Doing = Callable[[Any, Any, "torch.device"], Any]


def fan_out(work: Doing, shared: Any, items: Sequence[Any], resources: StepResources) -> Iterator[Any]:
    """Run `work(shared, item, device)` for each item, each where the cluster has room; yields in the items' order.

    Of what is not yielded yet no more is begun than AHEAD times what the cluster has room for: memory does not grow
    with the items, and an autoscaler sees that more room is wanted. What a lost worker was at is begun again.
    """
    hands = (_ActorPool if resources.gpu else _Tasks)(work, ray.put(shared), resources)
    waiting, begun, results = deque(items), deque[Any](), dict[Any, Any]()
    try:
        while waiting or begun:
            limit = AHEAD * max(1, room_for(resources))
            while waiting and len(begun) < limit and hands.free(len(waiting)):
                begun.append(hands.begin(waiting.popleft()))
            if not waiting:
                hands.release_idle()
            for ref in _finished([ref for ref in begun if ref not in results]):
                results[ref] = hands.result(ref)  # here it is safe from the loss of a node
            while begun and begun[0] in results:
                yield results.pop(begun.popleft())
    finally:
        hands.release()


def _finished(refs: list[Any]) -> list[Any]:
    """Those that are ready; waits a little for the first."""
    if not refs:
        time.sleep(POLL_SECONDS)
        return []
    ready, _ = ray.wait(refs, num_returns=1, timeout=POLL_SECONDS)
    return ready


class _Tasks:
    """A Ray task an item, in whatever process is there already: Ray keeps those of tasks that take no GPU."""

    def __init__(self, work: Doing, shared: Any, resources: StepResources) -> None:
        @ray.remote(max_retries=RETRIES, **options(resources))
        def task(common: Any, item: Any) -> Any:
            return work(common, item, settle())

        self._task, self._shared = task, shared

    def free(self, _: int) -> bool:
        return True

    def begin(self, item: Any) -> Any:
        return self._task.remote(self._shared, item)

    def result(self, ref: Any) -> Any:
        return ray.get(ref)

    def release_idle(self) -> None: ...
    def release(self) -> None: ...


class _ActorPool:
    """Processes that stay for many items, with what they have loaded and compiled: on a GPU Ray would end them after
    each task, to have its memory back. Each goes when no item is left for it, so that others get its GPU."""

    def __init__(self, work: Doing, shared: Any, resources: StepResources) -> None:
        class Actor:
            def stand_by(self) -> None: ...

            def do(self, common: Any, item: Any) -> Any:
                from graftwork.models.operators.kernels import DECISIONS

                return work(common, item, settle()), DECISIONS

        told = {"max_restarts": RETRIES, "max_task_retries": RETRIES, **options(resources)}
        self._actor, self._shared, self._resources = ray.remote(**told)(Actor), shared, resources
        self._workers: list[_Worker] = []

    def free(self, left: int) -> bool:
        """Whether somebody can take an item now; hires where more could be had for the items left."""
        # More than there is room for: an autoscaler makes room for those who wait.
        wanted = min(left, 2 * room_for(self._resources) + 1)
        while len(self._workers) < wanted:
            self._workers.append(_Worker(self._actor.remote()))
        return any(worker.free() for worker in self._workers)

    def begin(self, item: Any) -> Any:
        least = min((worker for worker in self._workers if worker.free()), key=lambda worker: len(worker.refs))
        return least.begin(self._shared, item)

    def result(self, ref: Any) -> Any:
        """Return what the work did; which kernels it ran is added to this process's decisions."""
        from graftwork.models.operators.kernels import DECISIONS

        result, decisions = ray.get(ref)
        DECISIONS.update(decisions)
        return result

    def release_idle(self) -> None:
        idle = [worker for worker in self._workers if not worker.busy()]
        self._workers = [worker for worker in self._workers if worker not in idle]
        for worker in idle:
            ray.kill(worker.actor)

    def release(self) -> None:
        for worker in self._workers:
            ray.kill(worker.actor)


class _Worker:
    """An actor, and what it is at: at most two items, so that the next is there when one is done."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.coming = [actor.stand_by.remote()]  # until the cluster has placed it
        self.refs: list[Any] = []

    def free(self) -> bool:
        self.coming = _unfinished(self.coming)
        return not self.coming and self.busy() < 2

    def busy(self) -> int:
        self.refs = _unfinished(self.refs)
        return len(self.refs)

    def begin(self, shared: Any, item: Any) -> Any:
        ref = self.actor.do.remote(shared, item)
        self.refs.append(ref)
        return ref


def _unfinished(refs: list[Any]) -> list[Any]:
    if not refs:
        return []
    _, left = ray.wait(refs, num_returns=len(refs), timeout=0)
    return list(left)
