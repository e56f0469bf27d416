"""Where a cluster is that this process joins, by RAY_ADDRESS, and the token that opens one. Ray loads only to ask one.

The token is this user's own, found where Ray looks for it, and goes to a cluster only if that asks for one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from graftwork.cluster.session import ray_internals
from graftwork.cluster.session.variables import environment
from graftwork.specs.reading.load import SpecError

ANSWER_SECONDS = 5.0
HEAD = "the head of a running Ray cluster, as 10.0.0.1:6379, or nothing, for a Ray of the job's own"
WHERE_TOKENS_ARE = "the cluster's token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in {}"
_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[\w.-]+):(\d{1,5})")


def cluster_address() -> str | None:
    """Return what RAY_ADDRESS names, `host:port` or `auto`; None for a Ray of the job's own. Raise SpecError."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address in ("", "local"):
        return None
    if urlsplit(address).scheme in ("http", "https"):
        hint = f"; jobs go to a dashboard by graft submit --address {address}"
        raise SpecError([f"RAY_ADDRESS: got {address!r}, a dashboard's address; accepted: {HEAD}{hint}"])
    found = _HOST_AND_PORT.fullmatch(address)
    if address != "auto" and (found is None or not 0 < int(found[2]) < 2**16):
        raise SpecError([f"RAY_ADDRESS: got {address!r}; accepted: {HEAD}"])
    return address


def check_cluster(address: str) -> bool:
    """Return whether the cluster at `address` wants a token; raise SpecError where it cannot be joined from here.

    It is asked once without a token, unless RAY_AUTH_MODE says so, and once with it.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    secret = token() if mode == "token" else None
    with _Head(address) as head:
        versions = head.versions(secret)
        if versions is None and not mode and (secret := token()):
            versions = head.versions(secret)
        if versions is None:
            kind = "which refuses the token that is here" if secret else "which asks for a token"
            raise head.refused(kind, f"RAY_AUTH_MODE=token and {WHERE_TOKENS_ARE.format(token_path())}")
        _check_versions(head, versions)
        if not head.nodes(secret) & _nodes_here():
            elsewhere = "from elsewhere, graft submit JOB.yaml --address http://HEAD:8265"
            raise head.refused("a cluster that has no node on this machine", f"one that has; {elsewhere}")
    return secret is not None


def head_of(address: str) -> str:
    """Return `host:port`, also for `auto`: the Ray that was started on this machine. Raise SpecError."""
    if address != "auto":
        return address
    try:
        with environment({"RAY_ADDRESS": None}):  # which Ray would read as it is written
            return str(ray_internals.canonicalize_bootstrap_address(address))
    except ConnectionError:
        raise SpecError([f"RAY_ADDRESS: got 'auto', with no Ray on this machine; accepted: {HEAD}"]) from None


class _Head:
    """A cluster's head, asked by what Ray itself asks it."""

    def __init__(self, address: str) -> None:
        import grpc

        self._given, self._grpc = address, grpc
        # Past a proxy, as Ray itself.
        self._channel = grpc.insecure_channel(head_of(address), options=[("grpc.enable_http_proxy", 0)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def versions(self, secret: str | None) -> dict[str, str] | None:
        """Return `ray_version` and `python_version`; None if it wants a token, or another one."""
        request = ray_internals.InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
        answer = self._answer(ray_internals.InternalKVGcsServiceStub(self._channel).InternalKVGet, request, secret)
        return None if answer is None else json.loads(answer.value or b"{}")

    def nodes(self, secret: str | None) -> set[str]:
        """Return the ids of the nodes that are alive."""
        request = ray_internals.GetAllNodeInfoRequest(state_filter=ray_internals.GcsNodeInfo.ALIVE)
        answer = self._answer(ray_internals.NodeInfoGcsServiceStub(self._channel).GetAllNodeInfo, request, secret)
        return set() if answer is None else {node.node_id.hex() for node in answer.node_info_list}

    def refused(self, problem: str, accepted: str = HEAD) -> SpecError:
        return SpecError([f"RAY_ADDRESS: got {self._given!r}, {problem}; accepted: {accepted}"])

    def _answer(self, method: Any, request: Any, secret: str | None) -> Any:
        said, status = [("authorization", f"Bearer {secret}")] if secret else [], self._grpc.StatusCode
        try:
            return method(request, timeout=ANSWER_SECONDS, metadata=said)
        except self._grpc.RpcError as error:
            if error.code() == status.UNAUTHENTICATED:
                return None
            if error.code() in (status.UNAVAILABLE, status.DEADLINE_EXCEEDED):
                reason = " ".join(str(error.details()).split()).rpartition(": ")[2]
                raise self.refused(f"which does not answer as a Ray cluster's head ({reason})") from None
            raise self.refused("not a Ray cluster's head") from None


def _nodes_here() -> set[str]:
    """Return the ids of the nodes that run on this machine: Ray joins a cluster by one of its own."""
    return set(ray_internals.find_node_ids())


def _check_versions(head: _Head, theirs: Mapping[str, str]) -> None:
    """Raise SpecError if the cluster's Ray or Python is not the one here: Ray joins no other."""
    import platform

    import ray

    here = {"Ray": ray.__version__, "Python": platform.python_version()}
    for name, version in here.items():
        there = theirs.get(f"{name.lower()}_version", version)
        if there.split(".")[:2] != version.split(".")[:2] or (name == "Ray" and there != version):
            accepted = f"{name} {version}, the version that is installed here"
            raise head.refused(f"a cluster with {name} {there}", accepted)


def token() -> str | None:
    """Return this user's token; None if there is none, or authentication is switched off."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    value = os.environ.get("RAY_AUTH_TOKEN", "").strip() or _token_in_file()
    if value and not (value.isascii() and value.isprintable() and " " not in value):
        raise SpecError(["the cluster's token: got something with spaces or odd characters; accepted: one word"])
    return value or None


def _token_in_file() -> str:
    path = token_path()
    try:
        return path.read_text(errors="replace").strip()
    except OSError as error:
        if os.environ.get("RAY_AUTH_TOKEN_PATH"):
            line = f"RAY_AUTH_TOKEN_PATH: got {str(path)!r}, which cannot be read: {error.strerror}"
            raise SpecError([f"{line}; accepted: a file with the cluster's token"]) from None
        return ""


def token_path() -> Path:
    """Return where a token lies that is in no variable."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(given or os.path.expanduser("~/.ray/auth_token"))  # noqa: PTH111  # pathlib's fails without a home
