"""Where a cluster is that this process joins, by RAY_ADDRESS, and the token that opens one. Ray loads only to ask one.

The token is this user's own, found where Ray looks for it, and goes to a cluster only if that asks for one.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from graftwork.specs.load import SpecError

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
    given, address = address, _found(address)
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    secret = token() if mode == "token" else None
    answer = _ask(given, address, secret)
    if answer is None and not mode and (secret := token()):
        answer = _ask(given, address, secret)
    if answer is None:
        kind = "refuses the token that is here" if secret else "asks for a token"
        accepted = f"RAY_AUTH_MODE=token and {WHERE_TOKENS_ARE.format(token_path())}"
        raise SpecError([f"RAY_ADDRESS: got {given!r}, which {kind}; accepted: {accepted}"])
    _check_version(given, answer)
    return secret is not None


def _found(address: str) -> str:
    if address != "auto":
        return address
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return str(canonicalize_bootstrap_address(address))
    except ConnectionError:
        raise SpecError([f"RAY_ADDRESS: got 'auto', with no Ray on this machine; accepted: {HEAD}"]) from None


def _ask(given: str, address: str, secret: str | None) -> bytes | None:
    """Return what a cluster's head says of its versions; None if it wants a token, or another one."""
    import grpc
    from ray.core.generated.gcs_service_pb2 import InternalKVGetRequest
    from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub

    said = [("authorization", f"Bearer {secret}")] if secret else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:  # as Ray itself
        try:
            question = InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
            answer = InternalKVGcsServiceStub(channel).InternalKVGet(question, timeout=ANSWER_SECONDS, metadata=said)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return None
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                reason = " ".join(str(error.details()).split()).rpartition(": ")[2]
                line = f"RAY_ADDRESS: got {given!r}, which does not answer as a Ray cluster's head ({reason})"
                raise SpecError([f"{line}; accepted: {HEAD}"]) from None
            raise SpecError([f"RAY_ADDRESS: got {given!r}, not a Ray cluster's head; accepted: {HEAD}"]) from None
    return bytes(answer.value)


def _check_version(given: str, answer: bytes) -> None:
    """Raise SpecError if the cluster's Ray or Python is not the one here: Ray joins no other."""
    import platform

    import ray

    theirs = json.loads(answer or b"{}")
    here = {"Ray": ray.__version__, "Python": platform.python_version()}
    for name, version in here.items():
        there = theirs.get(f"{name.lower()}_version", version)
        if there.split(".")[:2] != version.split(".")[:2] or (name == "Ray" and there != version):
            line = f"RAY_ADDRESS: got {given!r}, a cluster with {name} {there}"
            raise SpecError([f"{line}; accepted: {name} {version}, the version that is installed here"])


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
