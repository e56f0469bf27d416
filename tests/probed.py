"""Checks that tests have a child process make: such as crash it, hang, or say too much."""

from __future__ import annotations

import os
import signal
import sys
import time

from graftwork.cluster.checks.probes import Check, fine


def crash() -> Check:
    sys.stderr.write("cannot find symbol\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)
    return fine("crash", "survived")


def hang() -> Check:
    time.sleep(600)
    return fine("hang", "woke up")


def leave() -> Check:
    sys.exit(3)


def chatter() -> Check:
    os.write(1, b'[{"name": "not a check"}]\n')
    return fine("chatter", "said")


def betray() -> Check:
    raise RuntimeError(f"no way to https://user:{os.environ['PROBED_TOKEN']}@host\nand more")


def well(argument: dict[str, str]) -> Check:
    return fine("well", argument["what"])
