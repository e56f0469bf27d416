"""Every operator at 50%, and depth to width, on one job's rootstock with one budget and seed: quality against cost.

    python benchmarks/every_operator.py [examples/digits.yaml] [--json FILE]

The jobs share what they can in the store; the table is printed in Markdown, after each job anew. `distance` is the
job's own Frechet distance on its classifier's features; params and FLOPs are of the whole model, in a forward pass of
one sample. Latency and peak memory are those of a forward pass of a batch, over the rootstock's in the same process.
"""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks.command_line import add_job, parser
from graftwork import run
from graftwork.pipeline.cli.plain import PlainView

HALF = "{kind: interleaved, ratio: 0.5}"
EDITS = {
    name: f"[{{target: {target}, operator: {operator}, layers: {HALF}}}]"
    for name, target, operator in (
        ("mha (self)", "mha", "{kind: mha}"),
        ("swa", "mha", "{kind: swa}"),
        ("hyena_se", "mha", "{kind: hyena_se}"),
        ("hyena_x", "mha", "{kind: hyena_x}"),
        ("hyena_y", "mha", "{kind: hyena_y}"),
        ("mamba2", "mha", "{kind: mamba2}"),
        ("mlp r=4 (self)", "mlp", "{kind: mlp, ratio: 4}"),
        ("mlp r=3", "mlp", "{kind: mlp, ratio: 3}"),
        ("mlp r=6", "mlp", "{kind: mlp, ratio: 6}"),
        ("mlp_hyena_x r=2", "mlp", "{kind: mlp_hyena_x}"),
    )
} | {"depth to width": "[{kind: parallel}]"}


def main() -> None:
    arguments = parser(__doc__)
    add_job(arguments)
    chosen = arguments.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name, edits in EDITS.items():
        job = "operators-" + re.sub("[^a-z0-9]+", "-", name).strip("-")
        results[name] = run(
            chosen.job, (f"graft={edits}", f"name={job}", "finetune.control=false"), PlainView()
        ).results
        print(table(results), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1))


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| graft | distance after stage 1 | distance | agreement | params | MFLOP | latency | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rootstock = next(iter(results.values()))["rootstock"]
    lines.append(_line("none: the rootstock", "", rootstock, rootstock))
    for name, rows in results.items():
        lines.append(_line(name, f"{rows['stage1']['distance']:.2f}", rows["stage2"], rows["rootstock"]))
    return "\n".join(lines)


def _line(name: str, stage1: str, row: dict[str, float], rootstock: dict[str, float]) -> str:
    return (
        f"| {name} | {stage1} | {row['distance']:.2f} | {row['agreement']:.1%} | {row['params']:,.0f} "
        f"| {row['flops'] / 1e6:.1f} | {row['latency_ms'] / rootstock['latency_ms']:.2f} x "
        f"| {row['peak_memory'] / rootstock['peak_memory']:.2f} x |"
    )


if __name__ == "__main__":
    main()
