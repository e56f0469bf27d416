"""`graft verify`: every artifact is read; what is damaged is named, set aside and computed again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from graftwork.pipeline.cli.app import app
from graftwork.pipeline.store.artifacts import Store
from graftwork.pipeline.store.manifest import MANIFEST
from graftwork.pipeline.store.verify import verify
from tests.stores import DAMAGE, FILES, KEY, ORIGIN, OTHER, commit, overwrite, remove, stored


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store with two artifacts."""
    found: Store = request.getfixturevalue("s3") if request.param == "s3" else Store(str(tmp_path / "store"))
    commit(found)
    commit(found, OTHER, {"meta.json": b"{}"})
    return found


def graft(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_a_store_that_is_whole_is_said_to_be(store: Store) -> None:
    done = graft("verify", "--store", store.url)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("2 artifacts, ") and done.stdout.endswith(": none damaged\n")


@pytest.mark.parametrize("damage", [*DAMAGE, "a cut manifest"])
def test_what_is_damaged_is_named_and_set_aside(store: Store, damage: str) -> None:
    if damage == "a cut manifest":
        file = MANIFEST
        overwrite(store, f"artifacts/{KEY}/{file}", stored(store)[f"artifacts/{KEY}/{file}"][:-20])
    else:
        file = "model.safetensors"
        DAMAGE[damage](store, f"artifacts/{KEY}/{file}")
    done = graft("verify", "--store", store.url)
    assert done.exit_code == 1
    line, last = done.stdout.splitlines()
    assert line.startswith(f"damaged: {KEY[:12]} (") and f": {file}: " in line and f"set aside in rotten/{KEY}-" in line
    assert damage == "a cut manifest" or f"({ORIGIN.step} of {ORIGIN.run})" in line
    assert last.endswith(": 1 damaged")
    assert (store.state(KEY), store.state(OTHER)) == ("pending", "cached")
    assert not [name for name in stored(store) if name.startswith(f"artifacts/{KEY}")]
    assert graft("verify", "--store", store.url).exit_code == 0


def test_a_dry_run_only_tells(store: Store) -> None:
    overwrite(store, f"artifacts/{KEY}/empty.json", b"no more")
    before = stored(store)
    done = graft("verify", "--store", store.url, "--dry-run", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1 and told["artifacts"] == 2
    (damaged,) = told["damaged"]
    assert (damaged["key"], damaged["file"], damaged["aside"]) == (KEY, "empty.json", None)
    assert stored(store) == before


def test_a_commit_that_has_not_ended_is_left_alone(store: Store) -> None:
    remove(store, f"artifacts/{KEY}/{MANIFEST}")
    before = stored(store)
    assert [one.key for one in verify(store)] == [OTHER]
    assert stored(store) == before


def test_verify_reads_the_store_and_not_the_copies_of_this_machine(store: Store) -> None:
    store.artifact(KEY).path()
    overwrite(store, f"artifacts/{KEY}/model.safetensors", FILES["model.safetensors"][::-1])
    assert [one.key for one in verify(store) if not one.whole] == [KEY]


def test_a_store_that_is_not_there_is_one_line() -> None:
    done = graft("verify", "--store", "nonsense://place")
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("graft: store: got 'nonsense://place'")
