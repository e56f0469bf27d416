"""Which layers to replace: every strategy with the same operator, number of blocks, finetune and seeds.

    python benchmarks/strategies.py [examples/digits.yaml] [--seeds 3] [--out examples/strategies]

One job a strategy and seed, sharing rootstock and scions in the store. Writes OUT.json, OUT.md and OUT.png: means over
the seeds, and their standard deviation. `distance` is the job's own Frechet distance on its classifier's features, over
that of the same seed's rootstock.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.command_line import add_job, bare_parser
from graftwork import run
from graftwork.pipeline.cli.plain import PlainView
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.reading.load import load

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEARCH = "{steps: 300, batch: 32, lr: 5e-4, warmup: 10, fraction: 1.0, ema: 0.99, workers: 2, checkpoint_every: 100}"
STRATEGIES = {
    "interleaved": "{kind: interleaved, ratio: 0.5}",
    "first": "{kind: first, ratio: 0.5}",
    "last": "{kind: last, ratio: 0.5}",
    "most_local": "{kind: most_local, ratio: 0.5, band: 8}",
    "least_local": "{kind: least_local, ratio: 0.5, band: 8}",
    "lowest_error": "{kind: lowest_error, ratio: 0.5}",
    "learned": f"{{kind: learned, groups: 2, ratio: 0.5, pinned: [], search: {SEARCH}}}",
}
SETTINGS = ("finetune.control=false", "evaluate.samples=400")

Found = dict[str, list[dict[str, Any]]]  # strategy -> one entry a seed


def main() -> None:
    arguments = bare_parser(__doc__)
    add_job(arguments)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--out", type=Path, default=Path("examples/strategies"))
    chosen = arguments.parse_args()
    found: Found = {}
    for seed in range(chosen.seeds):
        for name, layers in STRATEGIES.items():
            overrides = (f"name=strategies-{name}", f"seed={seed}", f"graft.0.layers={layers}", *SETTINGS)
            found.setdefault(name, []).append(_outcome(chosen.job, overrides))
            chosen.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
        chosen.out.with_suffix(".md").write_text(table(found))
        plot(found, chosen.out.with_suffix(".png"))
        print(table(found), flush=True)


def _outcome(job: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What a run came to, and the blocks that it chose."""
    done = run(job, overrides, PlainView())
    store = Store(load(job, overrides).store)
    plan = json.loads(store.artifact(done.step("select").key).read("plan.json"))
    blocks = [edit["edit"]["site"]["block"] for edit in plan]
    return {"blocks": blocks, "results": done.results}


def ratios(entries: list[dict[str, Any]], row: str) -> list[float]:
    """The row's distance over the rootstock's, seed by seed."""
    return [entry["results"][row]["distance"] / entry["results"]["rootstock"]["distance"] for entry in entries]


def table(found: Found) -> str:
    lines = [
        "| strategy | blocks, seed by seed | after stage 1 | after stage 2 | agreement |",
        "|---|---|---|---|---|",
    ]
    for name, entries in sorted(found.items(), key=lambda item: statistics.mean(ratios(item[1], "stage2"))):
        blocks = "; ".join(",".join(map(str, entry["blocks"])) for entry in entries)
        agreement = statistics.mean(entry["results"]["stage2"]["agreement"] for entry in entries)
        stages = (mean_and_spread(ratios(entries, row)) for row in ("stage1", "stage2"))
        lines.append(f"| `{name}` | {blocks} | {' | '.join(stages)} | {agreement:.1%} |")
    return "\n".join(lines) + "\n"


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} x"


def plot(found: Found, path: Path) -> None:
    """Each seed a dot, the mean a bar, after both stages."""
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for offset, row in ((-0.15, "stage1"), (0.15, "stage2")):
        for place, entries in enumerate(found.values()):
            values = ratios(entries, row)
            colour = "0.6" if row == "stage1" else "C0"
            label = {"stage1": "after distillation", "stage2": "after finetuning"}[row] if place == 0 else None
            axes.plot([place + offset] * len(values), values, "o", color=colour, markersize=4, label=label)
            axes.plot([place + offset - 0.1, place + offset + 0.1], [statistics.mean(values)] * 2, color=colour)
    axes.axhline(1, color="0.8", linestyle="--")
    axes.set_xticks(range(len(found)), list(found), rotation=20)
    axes.set_ylabel("distance over the rootstock's")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
