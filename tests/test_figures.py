"""Numbers read alike wherever they are shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from graftwork.pipeline.cli.app import app
from graftwork.pipeline.cli.tables import show_costs, show_results
from graftwork.pipeline.runs import record
from graftwork.pipeline.runs.record import RunRecord, StepRecord
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.costs import Cost, GraftCost, nearest_set_bits
from graftwork.specs.figures import amount, figure, flops, number

ROW = {"distance": 8.0912, "params": 479560, "flops": 41.4e6, "ms_per_sample": 35.44, "peak_memory": 2_180_960}
NONE = dict.fromkeys(ROW, 0) | {"distance": 1.95}
STEP = StepRecord(name="base", key="0" * 64, state="done")
SHOWN = ("8.091", "479,560", "41.4 MFLOP", "35.44 ms", "2.18 MB")


def test_a_run_shows_the_figures_that_real_images_lack(capsys: pytest.CaptureFixture[str]) -> None:
    costs = {"params": 0, "flops": 0}
    figures = {"rootstock": {"geneval": 0.5}, "stage2": {"geneval": 0.25, "gain": -0.25}}
    results = {"heldout": costs} | {row: columns | costs for row, columns in figures.items()}
    show_results(RunRecord(run="r", name="r", status="finished", started="", steps=[], results=results, job={}))
    header, heldout, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["row", "geneval", "gain", "params", "flops"] and heldout == "heldout"
    assert [row.split() for row in rows] == [["rootstock", "0.5"], ["stage2", "0.25", "-0.25"]]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        *(("stage2.params", value, "479,560") for value in (479560, 479560.0)),
        ("params", 675_129_632, "675,129,632"),
        ("stage2.flops", 118.64e9, "118.6 GFLOP"),
        ("flops", 999, "999 FLOP"),
        ("flops", 999_999, "1 MFLOP"),
        ("latency_ms", 0.0123456, "0.01235 ms"),
        ("peak_memory", 12e9, "12 GB"),
        ("peak_memory", 999.6, "1 kB"),
        ("agreement", 0.9725, "0.9725"),
        ("fid", 2.7216, "2.722"),
        ("distance", 271.7, "271.7"),
        ("distance", 123456.7, "123,457"),
        ("distance", 1.5e-7, "1.5e-07"),
        ("distance", float("nan"), "nan"),
        ("distance", float("inf"), "inf"),
        ("samples", 50000, "50,000"),
        ("heldout.params", 0, ""),
        ("agreement", 0.0, "0"),
        ("status", "finished", "finished"),
        ("fid", None, ""),
    ],
)
def test_a_figure_has_its_unit_and_no_exponent_where_it_is_counted(name: str, value: object, shown: str) -> None:
    assert figure(name, value) == shown


def test_a_run_and_a_comparison_show_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = RunRecord(
        run="run-1",
        name="run",
        status="finished",
        started="2025",
        job={},
        steps=[STEP],
        results={"a": ROW, "heldout": NONE},
    )
    store = Store(str(tmp_path))
    record.save(store, found)
    show_results(found)
    run = capsys.readouterr().out
    status = CliRunner().invoke(app, ["status", "run-1", "--store", str(tmp_path)]).stdout
    compared = CliRunner().invoke(app, ["compare", "run-1", "--store", str(tmp_path)]).stdout
    assert run in status
    for shown in SHOWN:
        assert shown in run and shown in compared


def test_a_plan_shows_parameters_and_flops_in_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    small, large = Cost(params=479560, flops=41_400_000), Cost(params=675_129_632, flops=118_640_000_000)
    show_costs(GraftCost(rootstock=large, graft=small, replaced=large, scions=small))
    told = capsys.readouterr().out
    assert all(shown in told for shown in ("479,560", "41.4 MFLOP", "675,129,632", "118.6 GFLOP"))


def test_the_basic_forms() -> None:
    assert (number(3), number(2.50001), flops(7.494e6), amount(38e6)) == ("3", "2.5", "7.494 MFLOP", "38 MB")


def test_the_nearest_set_bits_are_on_both_sides_of_a_place_or_at_it() -> None:
    bits = 0b1001001
    found = {place: nearest_set_bits(bits, place) for place in range(7)}
    assert found == {0: (0, 0), 1: (0, 3), 2: (0, 3), 3: (3, 3), 4: (3, 6), 5: (3, 6), 6: (6, 6)}
