"""A Ray of our own: what it is started with, so that neither this user's folders nor their settings for other clusters
come into it.

- It has a token of its own, in its environment, and a folder of its own for its files, which goes when it ends.
- Its workers search for modules where the driver found graftwork, not in the current folder or the script's: a
  `torch.py` there is not meant for them.
- It may use the CPUs and memory that the driver may.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
from ray.job_config import JobConfig

from graftwork.cluster import machine
from graftwork.cluster.session import ray_internals
from graftwork.cluster.session.imports import code_folders
from graftwork.cluster.session.scratch import scratch
from graftwork.cluster.session.variables import environment


@contextmanager
def local_settings() -> Iterator[dict[str, Any]]:
    """Yield what `ray.init` takes for a Ray of our own, whose processes inherit the environment of this context."""
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        stack.enter_context(_environment_of_its_own())
        # It listens on loopback only; by itself, Ray does so where it knows that no other machine can join.
        stack.enter_context(_constant("ENABLE_RAY_CLUSTER", False))
        # Under `uv run`, Ray would send the current folder to the workers, and start each by `uv run`.
        stack.enter_context(_constant("RAY_ENABLE_UV_RUN_RUNTIME_ENV", False))
        # By itself, Ray would join whatever cluster it finds on this machine.
        yield {"address": "local", "include_dashboard": False, "_temp_dir": str(folder), **_memory()}


def job_config() -> JobConfig:
    """Return settings by which workers search for modules where graftwork was found, and not where the driver began."""
    config = JobConfig(_py_driver_sys_path=code_folders())
    config._runtime_env_has_working_dir = lambda: True  # by which Ray leaves out the current folder and the script's
    return config


def _memory() -> dict[str, int]:
    """Memory for tasks and for objects, if a control group allows less than Ray believes to have."""
    available = machine.available_memory()
    if available >= psutil.virtual_memory().available:
        return {}
    store = max(
        ray_internals.resolve_object_store_memory(available), ray_internals.constants.OBJECT_STORE_MINIMUM_MEMORY_BYTES
    )
    return {"object_store_memory": store, "_memory": max(available - store, 0)}


@contextmanager
def _environment_of_its_own() -> Iterator[None]:
    """Leave out what is meant for other clusters. Ray would write a new token into the home folder."""
    unset = ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_RUNTIME_ENV_HOOK")
    opened = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        with environment(dict.fromkeys(unset) | opened):
            read_authentication()
            yield
    finally:
        read_authentication()


def read_authentication() -> None:
    """Have Ray read anew from the environment whether there is a token, and which."""
    ray_internals.Config.initialize("")
    ray_internals.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _constant(name: str, value: object) -> Iterator[None]:
    """Set a constant of Ray's, which it read from the environment when it was imported."""
    constants = ray_internals.constants
    before = getattr(constants, name)
    setattr(constants, name, value)
    try:
        yield
    finally:
        setattr(constants, name, before)
