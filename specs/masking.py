"""Passwords and tokens of URIs, masked: no line that is shown or kept has one."""

from __future__ import annotations

import re

PLACEHOLDER = re.compile(r"\$\{([A-Za-z_]\w*)\}")

# A user without a password is a token to a web server; elsewhere it may be a user, or a container. A number and a
# slash after the colon are a port and a path.
_USER = re.compile(
    r"\b(https?://)([^\s'\"/?#@:]+)@|\b([a-z][a-z\d+.-]*://[^\s'\"/?#@:]*:)(?!\d+/)([^\s'\"]+)@", re.IGNORECASE
)
_QUERY = re.compile(
    r"([?&;][^=&;?\s'\"]*(?:sig|token|secret|passw|pwd|key|credential|auth)[^=&;?\s'\"]*=)([^&;\s'\"]+)", re.IGNORECASE
)


def secret_in(uri: str) -> bool:
    """Whether a password or a token stands in it."""
    return masked(uri) != uri


def masked(text: str) -> str:
    """Text with *** for the passwords and tokens of the URIs in it; placeholders stay."""
    if "://" not in text:
        return text
    return _QUERY.sub(_without_value, _USER.sub(_without_password, text))


def _without_password(match: re.Match[str]) -> str:
    before, held = (match[1], match[2]) if match[1] else (match[3], match[4])
    return match[0] if PLACEHOLDER.fullmatch(held) else f"{before}***@"


def _without_value(match: re.Match[str]) -> str:
    return match[0] if PLACEHOLDER.fullmatch(match[2]) else f"{match[1]}***"
