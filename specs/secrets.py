"""Secrets: none is written into a job. A URI has a placeholder in its place, `${DB_PASSWORD}`, and stays as it is
written wherever the job is kept or shown; the environment fills it in only where the URI is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import quote

from graftwork.specs.masking import PLACEHOLDER, masked
from graftwork.specs.problems import SpecError

PLACEHOLDER_HINT = (
    "a placeholder in its place, as in ${DB_PASSWORD}, which the environment fills in where the URI is used"
)
SECRET_NAMES = ("SECRET", "TOKEN", "PASSWORD", "PASSWD", "KEY", "CREDENTIAL")  # in those of environment variables
SHORTEST = 8  # characters of a value in the environment that is taken for a secret

_filled: set[str] = set()  # variables that some URI of this process was filled in from


def missing(uri: str) -> str | None:
    """The first variable that a placeholder names and the environment lacks."""
    return next((name for name in PLACEHOLDER.findall(uri) if name not in os.environ), None)


def filled(uri: str, field: str) -> str:
    """The URI to use, with the environment's values for its placeholders; raises SpecError for one that is not set.

    What stands before the host or in the query is percent-encoded, as a URI wants it. Keep no copy of the result.
    """
    if name := missing(uri):
        accepted = f"a variable that is set in the environment of whoever uses the {field}"
        raise SpecError([f"{field}: got ${{{name}}}, which is not set; accepted: {accepted}"])
    _filled.update(PLACEHOLDER.findall(uri))

    def value(match: re.Match[str]) -> str:
        before, after = uri[: match.start()], uri[match.end() :]
        encoded = "://" in before and ("?" in before or "@" in after)
        return quote(os.environ[match[1]], safe="") if encoded else os.environ[match[1]]

    return PLACEHOLDER.sub(value, uri)


def redacted(text: str) -> str:
    """Text with `${NAME}` for each value of the environment that looks secret, or that a URI was filled in from."""
    for value, name in sorted(_secrets(), key=lambda pair: -len(pair[0])):
        text = text.replace(value, f"${{{name}}}")
    return masked(text)


def _secrets() -> Iterator[tuple[str, str]]:
    """The secret values of the environment, as they are and as URIs have them, each with its variable's name."""
    for name, value in os.environ.items():
        secret = any(part in name.upper() for part in SECRET_NAMES)
        if (secret and len(value) >= SHORTEST) or (name in _filled and value):
            yield value, name
            yield quote(value, safe=""), name
