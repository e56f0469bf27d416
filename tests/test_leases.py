"""Leases: one holder at a time, given up by the dead, and never by who is only slow."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from graftwork.pipeline.store import leases
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.leases import Lease, LeaseOwner, LeaseSnapshot, LeaseWatch, look, take

spawn = multiprocessing.get_context("spawn")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(leases, "EXPIRES_SECONDS", 0.5)


def me(task: str) -> LeaseOwner:
    return LeaseOwner.me("some-run", task)


def taken(store: Store, task: str, **how: Any) -> Lease:
    lease = take(store, "a", me(task), **how)
    assert isinstance(lease, Lease)
    return lease


def hold(folder: str, ready: Any, elsewhere: bool) -> None:
    """Hold the lease in a process of its own until it is killed."""
    leases.BEAT_SECONDS = 0.05
    holder = me("theirs").model_copy(update={"machine": "another machine"} if elsewhere else {})
    assert isinstance(take(Store(folder), "a", holder), Lease)
    ready.set()
    time.sleep(60)


@pytest.fixture
def holder(store: Store, request: pytest.FixtureRequest) -> Iterator[Any]:
    ready = spawn.Event()
    process = spawn.Process(target=hold, args=(store.url, ready, request.param == "another machine"))
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_lease_has_one_holder_until_it_is_released(store: Store) -> None:
    ours = taken(store, "ours")
    found = take(store, "a", me("theirs"))
    assert isinstance(found, LeaseSnapshot) and found.holder.process == os.getpid() and "some-run" in str(found.holder)
    assert leases.active_leases(store) == {"a"}
    ours.release()
    assert look(store, "a") is None and leases.active_leases(store) == set() and store.names("leases") == []
    taken(store, "theirs").release()


class Interrupted(Store):
    """A store on which others do something before one of its operations."""

    def __init__(self, url: str, moment: int, others: Callable[[], object]) -> None:
        super().__init__(url)
        self.before, self.others = moment, others

    def names(self, folder: str) -> list[str]:
        self._count()
        return super().names(folder)

    def read(self, name: str) -> str | None:
        self._count()
        return super().read(name)

    def create(self, name: str, text: str) -> bool:
        self._count()
        return super().create(name, text)

    def _count(self) -> None:
        self.before -= 1
        if self.before == -1:
            self.others()


@pytest.mark.parametrize("was_held", [False, True])
@pytest.mark.parametrize("moment", range(4))
def test_a_lease_that_changes_hands_while_it_is_taken_has_one_holder(store: Store, moment: int, was_held: bool) -> None:
    holders: list[Lease | LeaseSnapshot] = []
    earlier = [taken(store, "lost"), taken(store, "found", over=look(store, "a"))] if was_held else []

    def others() -> None:
        for lease in earlier:
            lease.release()
        holders.append(take(store, "a", me("theirs")))

    holders.append(take(Interrupted(store.url, moment, others), "a", me("ours")))
    having = [one for one in holders if isinstance(one, Lease)]
    assert len(having) == (1 if len(holders) == 2 or not was_held else 0)
    for lease in having:
        lease.release()


def test_no_sign_of_life_is_written_after_a_lease_is_released(store: Store, quick: None) -> None:
    for number in range(20):
        lease = taken(store, "ours")
        time.sleep(0.045 + number / 2000)  # about when it beats
        lease.release()
        assert store.names("leases") == []
    time.sleep(0.1)
    assert store.names("leases") == []


def test_leases_of_other_names_are_free(store: Store) -> None:
    ours = taken(store, "ours")
    other = take(store, "b", me("theirs"))
    assert isinstance(other, Lease)
    assert leases.active_leases(store) == {"a", "b"}
    ours.release()
    other.release()


def race(folder: str, start: Any, won: Any) -> None:
    start.wait()  # for all, or a slow one would find the lease of one that has ended
    if isinstance(take(Store(folder), "a", me(f"{os.getpid()}")), Lease):
        won.put(os.getpid())
    time.sleep(1)


def test_of_many_who_want_it_at_once_one_gets_it(store: Store) -> None:
    start, won = spawn.Barrier(4), spawn.Queue()
    racers = [spawn.Process(target=race, args=(store.url, start, won)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert won.qsize() == 1


@pytest.mark.parametrize("holder", ["this machine"], indirect=True)
def test_what_a_dead_process_of_this_machine_held_is_free_at_once(store: Store, holder: Any) -> None:
    assert isinstance(take(store, "a", me("ours")), LeaseSnapshot)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    taken(store, "ours").release()


@pytest.mark.timeout(60, func_only=True)  # it would wait for ever
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("holder", ["another machine"], indirect=True)
def test_a_holder_elsewhere_is_waited_for_while_it_gives_signs_and_no_longer(store: Store, holder: Any) -> None:
    found = take(store, "a", me("ours"))
    assert isinstance(found, LeaseSnapshot)
    waiter = LeaseWatch(found)
    for _ in range(20):  # twice as long as a silent holder is waited for
        assert not waiter.expired(store)
        time.sleep(0.05)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    while not waiter.expired(store):
        time.sleep(0.05)
    assert isinstance(take(store, "a", me("ours")), LeaseSnapshot)  # nobody else's patience has ended
    taken(store, "ours", over=waiter.last).release()


@pytest.mark.usefixtures("quick")
def test_patience_with_one_holder_is_no_right_over_the_next(store: Store) -> None:
    first = taken(store, "first")
    found = take(store, "a", me("ours"))
    assert isinstance(found, LeaseSnapshot)
    first.release()
    second = taken(store, "second")
    assert isinstance(take(store, "a", me("ours"), over=found), LeaseSnapshot)
    second.release()


def test_another_attempt_at_a_task_takes_over_from_the_first(store: Store) -> None:
    first, again = taken(store, "same"), taken(store, "same")
    assert isinstance(take(store, "a", me("other")), LeaseSnapshot)
    first.release()  # the first was only slow, and leaves: the lease is the second's still
    assert isinstance(take(store, "a", me("other")), LeaseSnapshot)
    again.release()
    assert look(store, "a") is None


def test_a_lease_that_cannot_be_read_is_free(store: Store) -> None:
    store.write("leases/a.000003.json", "{")
    assert look(store, "a") is None
    taken(store, "ours").release()


def test_a_process_that_has_the_number_of_a_dead_one_does_not_hold_its_lease() -> None:
    assert not me("x").gone()
    assert me("x").model_copy(update={"born": 1}).gone()
    assert not me("x").model_copy(update={"born": 1, "machine": "another"}).gone()
