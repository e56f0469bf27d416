"""Paths as people write them, and what they come to: `~`, `$VAR` and `${VAR}`, and paths from the current folder.

A URI keeps its `${VAR}` (see `specs.secrets`) until it is used.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path

from graftwork.specs.hub import is_hub_id

_VARIABLE = re.compile(r"\$(?:(?P<bare>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)\})", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_FILE_URI = re.compile(r"(?P<scheme>(?:file|local)://|sqlite(?:\+\w+)?:///)(?P<path>[^/].*)", re.DOTALL)


class UnknownInPath(ValueError):
    """A path names a variable or a user that this machine does not know; the text says what is accepted."""


def expand(path: str) -> str:
    """Return the path with the home folders and variables that it names; raise UnknownInPath.

    A dollar sign in the path of a file that exists as it is written stays. A URI is as `expand_uri` leaves it.
    """
    if "://" in path or "::" in path:
        return expand_uri(path)
    if "$" in path and not os.path.lexists(path):
        path = _VARIABLE.sub(_value, path)
    return _with_home(path)


def expand_uri(uri: str) -> str:
    """Return a URI of a file, as `sqlite:///~/mlflow.db`, with the home folder and each `$VAR` that it names.

    Raise UnknownInPath for these, and for a `$VAR` without braces in any other URI.
    """
    found = _FILE_URI.fullmatch(uri)
    if found is not None:
        return found["scheme"] + _with_home(_VARIABLE.sub(_unless_braced, found["path"]))
    bare = next((one["bare"] for one in _VARIABLE.finditer(uri) if one["bare"]), None)
    if bare is not None:
        raise UnknownInPath(f"${{{bare}}} in a URI, which the environment fills in where it is used, not ${bare}")
    return uri


def expand_absolute(path: str) -> str:
    """Return the expanded path from the root on, whatever the current folder will be; raise UnknownInPath.

    A URI, which no file is read from, stays for its error to show.
    """
    path = expand(path)
    return path if "://" in path else str(Path(path).absolute())


def expand_weights(path: str) -> str:
    """Return the expanded path from the root on; a hub id stays. Raise UnknownInPath."""
    path = expand(path)
    return path if is_hub_id(path) else expand_absolute(path)


def _value(match: re.Match[str]) -> str:
    name = match["bare"] or match["braced"]
    if not _NAME.fullmatch(name):
        raise UnknownInPath(f"a variable's name in braces, not {match[0]}")
    value = os.environ.get(name)
    if not value:  # $DATA/train is not meant to be /train
        state = "is not set" if value is None else "is empty"
        raise UnknownInPath(f"variables that are set in the environment; {name} {state}")
    return value


def _unless_braced(match: re.Match[str]) -> str:
    return _value(match) if match["bare"] else match[0]


def home_folder() -> str | None:
    """Return this user's home folder; None if HOME is not set and the user has no entry in the passwd file."""
    if os.environ.get("HOME"):
        return os.environ["HOME"]
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return None


def settle_home() -> None:
    """Set HOME for the libraries that look for it: to a folder that goes with this process, for a user without one."""
    if os.environ.get("HOME"):
        return
    home = home_folder()
    if home is None:
        home = tempfile.mkdtemp(prefix="graft-home-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ["HOME"] = home


def _with_home(path: str) -> str:
    if not path.startswith("~"):
        return path
    user, _, below = path[1:].partition("/")
    home = os.path.expanduser(f"~{user}") if user else home_folder()  # noqa: PTH111  # leaves ~ for an unknown user
    if home is None or home.startswith("~"):
        known = f"users of this machine; {user} is not one" if user else "HOME set, or a user with a home folder"
        raise UnknownInPath(f"~ for {known}")
    return str(Path(home, below))
