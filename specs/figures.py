"""Figures as people read them: counts with their thousands marked, FLOPs, times and bytes with a unit; one way for all.

The names of the figures are MLflow's: `params`, `flops`, `ms_per_sample`, `latency_ms`, `peak_memory`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

BYTES = ("bytes", "kB", "MB", "GB", "TB", "PB")
FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")
MODEL_FIGURES = ("params", "flops", "ms_per_sample", "latency_ms", "peak_memory")  # 0 for what has no model


def figure(name: str, value: object) -> str:
    """A figure of that name, as `stage1.flops`; other values as they are, nothing for what there is none of."""
    column = name.rpartition(".")[2].removeprefix("predicted_").removeprefix("measured_")
    if value is None or (column in MODEL_FIGURES and value == 0):
        return ""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    match column:
        case "flops":
            return flops(value)
        case "ms_per_sample" | "latency_ms":
            return f"{number(value)} ms"
        case "peak_memory":
            return amount(value)
    return number(value)


def column_word(name: str) -> str:
    """Return the name of a network, as it stands in the names of its figures: as columns and MLflow take it."""
    return re.sub(r"[^\w -]", "-", name)


def counted(count: int, thing: str) -> str:
    """Return "1 step", "2 steps"."""
    return f"{count} {thing}{'s' * (count != 1)}"


def number(value: float) -> str:
    """Four digits, or all of a whole number and all before the point: no exponent for what can be counted."""
    countable = abs(value) < 1e15 and (value == int(value) or abs(value) >= 1e4)
    return f"{value:,.0f}" if countable else f"{value:.4g}"


def flops(value: float) -> str:
    return _scaled(value, FLOPS, 4)


def amount(size: float) -> str:
    """Bytes."""
    return _scaled(size, BYTES, 3)


def _scaled(value: float, units: Sequence[str], digits: int) -> str:
    """The value in the largest unit of which there is one, as it is rounded."""
    for unit in units[:-1]:
        if float(f"{value:.{digits}g}") < 1000:
            return f"{value:.{digits}g} {unit}"
        value /= 1000
    return f"{value:.{digits}g} {units[-1]}"
