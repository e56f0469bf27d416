"""The command lines of the benchmarks. It needs nothing installed: `gpu` says what is missing."""

from __future__ import annotations

import argparse
from pathlib import Path


def bare_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a command line whose help is the module's text, as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a command line with `--json FILE`."""
    made = bare_parser(description)
    made.add_argument("--json", type=Path, help="also write what was measured to this file")
    return made


def add_job(made: argparse.ArgumentParser) -> None:
    """Have the command take a job's spec; the example's by default."""
    made.add_argument("job", nargs="?", default="examples/digits.yaml")
