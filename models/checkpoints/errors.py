"""What is said of a file that is no checkpoint, or one of another model."""

from __future__ import annotations

from collections.abc import Sequence

from graftwork.specs.problems import first_few

MAX_NAMED = 10  # problems that an error names


class UnfitCheckpoint(ValueError):
    """A file that is no checkpoint, or one of another model; the message is one line.

    problem: the file and what it is. accepted: what would be read instead, if the problem does not say so.
    """

    def __init__(self, problem: str, accepted: str = "") -> None:
        super().__init__(problem, accepted)
        self.problem, self.accepted = problem, accepted

    def __str__(self) -> str:
        return f"{self.problem}; accepted: {self.accepted}" if self.accepted else self.problem


def named(problems: Sequence[str], most: int = MAX_NAMED, between: str = "; ") -> str:
    """Join the first problems, and count the others."""
    return first_few(problems, most, between, f"{between}and ")
