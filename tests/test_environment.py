"""A Ray of our own in the environments that users have, and a RAY_ADDRESS of every kind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from typer.testing import CliRunner

from graftwork.cluster import machine
from graftwork.cluster.session import local, runtime, scratch
from graftwork.cluster.session.address import check_cluster, cluster_address, head_of
from graftwork.pipeline.cli.app import app
from graftwork.specs import paths
from graftwork.specs.reading.load import SpecError
from tests.conftest import ROOT, TINY
from tests.shadows import BARE, shadow

TOKEN = "f" * 64
DEAD = "http://127.0.0.1:9"

LOOK = """
import json, os, sys
import psutil, ray
from graftwork.cluster.session.runtime import session

@ray.remote(num_cpus=1)
def look():
    import torch
    import graftwork.stages.distillation.sources
    bare = sorted({*BARE} & {*sys.modules})
    return {"torch": torch.__file__, "bare": bare, "path": sys.path, "home": os.environ["HOME"]}

BARE = __BARE__
with session([], min_parallel=1, warm=("torch",)):
    told = ray.get(look.remote())
    me = psutil.Process()
    family = [me, *me.children(recursive=True)]
    told["commands"] = [one.cmdline() for one in family]
    found = [s.laddr.ip for one in family for s in one.net_connections("tcp") if s.status == psutil.CONN_LISTEN]
    told["listening"] = sorted({*found})
    told["bare here"] = sorted({*BARE} & {*sys.modules})
told["left"] = {name: os.environ.get(name) for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE")}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a checkout of somebody else's code: it has modules of the names of ours, and of libraries. In it is
    another, to be on PYTHONPATH."""
    folder = shadow(tmp_path_factory.mktemp("checkout"), (*BARE, "evaluate", "utils"), ("datasets",))
    (folder / "torch.py").write_text("")  # which whoever warms up the imports would take without an error
    (folder / "on_the_path").mkdir()
    shadow(folder / "on_the_path", ("models", "specs", "utils"), ("cluster", "pipeline", "stages"))
    (folder / "script.py").write_text(LOOK.replace("__BARE__", repr(BARE)))
    (folder / "run").write_text('"$@"\ncode=$?\nexit $code\n')  # for `uv run`, which has the driver as its child
    return folder


@pytest.fixture(scope="module")
def told(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a task of our own Ray sees: the driver is a script in that folder, under `uv run`, with a RAY_ADDRESS that
    is empty, a token file that is not there, dead proxies, a home that cannot be written, and a long TMPDIR."""
    temp = tmp_path_factory.mktemp("temp") / ("x" * 60)
    temp.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_ADDRESS": "",
        "RAY_AUTH_TOKEN_PATH": "/there/is/none",
        "HOME": "/proc/nohome",
        "TMPDIR": str(temp),
    }
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"), DEAD)
    environment |= {"PYTHONPATH": os.pathsep.join([str(place / "on_the_path"), str(ROOT)])}
    done = subprocess.run(
        ["uv", "run", sys.executable, "script.py"],
        executable="/bin/sh",
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    links = [path for path in Path("/tmp").glob("graft-*") if path.is_symlink() and temp in path.readlink().parents]
    return answer | {"temp": list(temp.iterdir()), "links": links}


def test_workers_import_libraries_and_not_what_lies_in_the_current_folder(told: dict[str, Any], place: Path) -> None:
    assert told["torch"].endswith("/site-packages/torch/__init__.py")
    assert str(place) not in told["path"]


def test_nobody_imports_our_packages_by_their_bare_names(told: dict[str, Any]) -> None:
    assert told["bare"] == told["bare here"] == []


def test_workers_are_not_started_by_uv(told: dict[str, Any]) -> None:
    assert not [command for command in told["commands"] if command[:1] == ["uv"]]


def test_with_an_empty_address_it_listens_on_loopback_only(told: dict[str, Any]) -> None:
    assert told["listening"] and {*told["listening"]} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_home_that_cannot_be_written_is_left_as_it_is(told: dict[str, Any]) -> None:
    assert told["home"] == "/proc/nohome"


def test_nothing_is_left_of_it(told: dict[str, Any]) -> None:
    assert told["temp"] == told["links"] == []
    assert told["left"] == {"RAY_ADDRESS": "", "RAY_AUTH_TOKEN": None, "RAY_AUTH_MODE": None}


# -- folders for temporary files


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_that_is_not_there_is_one_line_before_anything_is_made(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "/there/is/none")
    done = CliRunner().invoke(app, ["run", str(TINY)])
    assert done.exit_code == 2 and list(tmp_path.iterdir()) == []
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"graft: {variable}: got '/there/is/none', no such folder; accepted: ")
    assert line in CliRunner().invoke(app, ["plan", str(TINY)]).stderr.splitlines()


def test_a_temporary_folder_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))
    assert scratch.scratch_problem() == (
        "TMPDIR: got '/proc', which cannot be written; accepted: a folder that can be written, or nothing, for the "
        "system's own"
    )


def test_a_long_temporary_folder_has_a_short_name_or_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with scratch.scratch() as folder:
        assert len(f"{folder}{scratch.SOCKET}") <= scratch.MAX_SOCKET_BYTES and folder.resolve().parent == long
    assert list(long.iterdir()) == [] and not folder.is_symlink()
    monkeypatch.setattr(scratch, "SHORT_PLACES", ("/there/is/none",))
    problem = scratch.scratch_problem()
    assert problem is not None and problem.startswith(f"TMPDIR: got '{long}', too long a path for sockets; accepted: ")


def test_where_ray_does_not_start_its_logs_stay_and_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    begun = []

    def init(_temp_dir: str, **_: Any) -> None:
        begun.append(_temp_dir)
        (Path(_temp_dir) / "session" / "logs").mkdir(parents=True, exist_ok=True)
        raise RuntimeError("The current node timed out\nduring startup.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(scratch.RayDidNotStart) as failed, runtime.session([], min_parallel=1):
        pass
    reason, _, folder = str(failed.value).partition("; its logs are below ")
    assert reason == "The current node timed out during startup." and len(begun) == 3
    assert folder.startswith(str(long)) and (Path(folder) / "session" / "logs").is_dir()


# -- nobody's home


KILLED = """
import os, signal
from graftwork.cluster.session.scratch import scratch
with scratch() as folder:
    print(os.path.realpath(folder), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_driver_left_goes_with_the_next_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)  # so that there is a link to it, too
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with scratch.scratch() as alive, pytest.raises(scratch.RayDidNotStart):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED], capture_output=True, text=True, check=False, timeout=120
        )
        left = Path(killed.stdout.strip())
        assert left.is_dir() and left.parent == long
        (other := long / "graft-users-own").mkdir()
        with scratch.scratch() as logs:
            assert alive.is_dir() and not left.exists() and other.is_dir()
            assert not [link for link in Path("/tmp").glob("graft-*") if link.is_symlink() and link.readlink() == left]
            raise scratch.RayDidNotStart
    with scratch.scratch():
        assert logs.parent == Path("/tmp")
    assert sorted(path.name for path in long.iterdir()) == sorted(["graft-users-own", logs.name.rpartition("-")[0]])


def test_a_user_without_a_home_gets_one_for_as_long_as_the_command_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    paths.settle_home()
    assert os.environ["HOME"] == paths.home_folder() != ""  # that of the passwd file
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: dict[str, None]()["no entry"])
    assert paths.home_folder() is None
    paths.settle_home()
    made = Path(os.environ["HOME"])
    assert made.is_dir() and made.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(made)


NOBODY = f"""
import os
from graftwork.pipeline import api
from graftwork.pipeline.planning import preflight
from graftwork.pipeline.execution import run
from graftwork.stages.features import codec
import sklearn.datasets, scipy.ndimage, pwd, tempfile, shutil, atexit
for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME"):
    os.environ.pop(name, None)
os.setuid(12345)
made = api.plan({str(TINY)!r})
print(len(made.steps), preflight.absent(made.job), os.environ["HOME"])
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be somebody else")
def test_a_plan_is_made_for_a_user_whom_nobody_knows() -> None:
    done = subprocess.run([sys.executable, "-c", NOBODY], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    steps, absent, home = done.stdout.split()
    assert (steps, absent) == ("16", "[]") and not Path(home).exists()


# -- RAY_ADDRESS


@pytest.mark.parametrize("given", [None, "", " ", "local", "\tlocal "])
def test_no_address_is_a_ray_of_our_own(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if given is not None:
        monkeypatch.setenv("RAY_ADDRESS", given)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", asked.update)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(runtime, "num_cpus", lambda: 7)
    with runtime.session([], min_parallel=1):
        assert asked["num_cpus"] == 7  # that this process may use
        assert asked["address"] == "local" and "RAY_ADDRESS" not in os.environ
        assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ.get("RAY_ADDRESS") == given


@pytest.mark.parametrize("given", ["10.0.0.1:6379", " head:6379 ", "[::1]:6379", "auto"])
def test_an_address_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    assert cluster_address() == given.strip()


@pytest.mark.timeout(120)  # Ray would wait for a head that does not answer
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("http://127.0.0.1:8265", "a dashboard's address; accepted: "),
        ("https://head/ray", "graft submit --address https://head/ray"),
        ("ray://head:10001", "accepted: the head of a running Ray cluster, as 10.0.0.1:6379"),
        ("head", "accepted: "),
        ("head:port", "accepted: "),
        ("head:99999", "accepted: "),
        ("head:6379,other:6379", "accepted: "),
        ("127.0.0.1:1", "which does not answer as a Ray cluster's head ("),
        ("nobody.invalid:6379", "which does not answer as a Ray cluster's head ("),
    ],
)
def test_an_address_of_no_use_is_one_line_before_anything_is_made(
    given: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", given)
    done = CliRunner().invoke(app, ["run", str(TINY)])
    assert done.exit_code == 2 and list(tmp_path.iterdir()) == []
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"graft: RAY_ADDRESS: got '{given}'") and said in line


def test_a_plan_says_what_is_wrong_with_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    done = CliRunner().invoke(app, ["plan", str(TINY)])
    assert done.exit_code == 0 and "RAY_ADDRESS: got 'http://127.0.0.1:8265', a dashboard's" in done.stderr


NODE = "ab" * 28


class Nodes(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):  # type: ignore[misc]
    """The nodes of a cluster: one."""

    def GetAllNodeInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        return gcs_service_pb2.GetAllNodeInfoReply(node_info_list=[GcsNodeInfo(node_id=bytes.fromhex(NODE))])


class Head(gcs_service_pb2_grpc.InternalKVGcsServiceServicer):  # type: ignore[misc]
    """What a cluster's head answers when it is asked for its versions."""

    def __init__(self, versions: dict[str, str], token: str | None) -> None:
        self.versions, self.token, self.tokens_seen = versions, token, list[str | None]()

    def InternalKVGet(self, request: Any, context: Any) -> Any:  # noqa: N802
        given = dict(context.invocation_metadata()).get("authorization")
        self.tokens_seen.append(given)
        if self.token is not None and given != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return gcs_service_pb2.InternalKVGetReply(value=json.dumps(self.versions).encode())


@contextmanager
def head(token: str | None = None, **other: str) -> Iterator[tuple[str, Head]]:
    """The address of such a head on loopback."""
    versions = {"ray_version": ray.__version__, "python_version": sys.version.split()[0], **other}
    server, answering = grpc.server(ThreadPoolExecutor(2)), Head(versions, token)
    gcs_service_pb2_grpc.add_InternalKVGcsServiceServicer_to_server(answering, server)
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Nodes(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", answering
    finally:
        server.stop(None)


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("ray._private.services.find_node_ids", lambda: {NODE})


def line_about(address: str) -> str:
    with pytest.raises(SpecError) as refused:
        check_cluster(address)
    (line,) = refused.value.lines
    return line


def test_auto_is_the_ray_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", " auto ")
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: {"10.1.2.3:6399"})
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _: "10.1.2.3:6399")
    address = cluster_address()
    assert address is not None and head_of(address) == "10.1.2.3:6399"
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _: None)
    assert line_about("auto").startswith("RAY_ADDRESS: got 'auto', with no Ray on this machine; accepted: ")


@pytest.mark.usefixtures("no_token")
class TestACluster:
    def test_of_our_versions_is_joined(self) -> None:
        with head() as (address, _):
            assert check_cluster(address) is False

    def test_that_wants_a_token_says_where_it_may_be(self) -> None:
        with head(TOKEN) as (address, _):
            line = line_about(address)
        assert f"got '{address}', which asks for a token; accepted: RAY_AUTH_MODE=token and the cluster's token" in line

    def test_that_wants_a_token_gets_the_one_that_is_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
        with head(TOKEN) as (address, answering):
            assert check_cluster(address) is True
            assert answering.tokens_seen == [None, f"Bearer {TOKEN}"]

    def test_that_wants_none_is_never_told_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
        with head() as (address, answering):
            assert check_cluster(address) is False
            assert answering.tokens_seen == [None]

    def test_that_wants_another_token_refuses_this_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        with head(TOKEN) as (address, _):
            line = line_about(address)
        assert "which refuses the token that is here" in line and "0" * 64 not in line

    def test_is_asked_without_a_token_where_that_is_switched_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        with head(TOKEN) as (address, _):
            assert "which asks for a token; accepted: RAY_AUTH_MODE=token" in line_about(address)

    @pytest.mark.parametrize(
        ("other", "said"),
        [({"ray_version": "2.44.1"}, "Ray 2.44.1; accepted: Ray"), ({"python_version": "3.9.2"}, "Python 3.9.2")],
    )
    def test_of_another_version_is_refused(self, other: dict[str, str], said: str) -> None:
        with head(**other) as (address, _):
            assert f"got '{address}', a cluster with {said}" in line_about(address)

    def test_without_a_node_on_this_machine_is_joined_by_submitting_to_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ray._private.services.find_node_ids", lambda: {"another" * 8})
        with head() as (address, _):
            line = line_about(address)
        assert (
            "a cluster that has no node on this machine; accepted: one that has; from elsewhere, graft submit" in line
        )

    def test_is_asked_past_a_proxy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("http_proxy", "grpc_proxy", "https_proxy"):
            monkeypatch.setenv(name, DEAD)
        with head() as (address, _):
            assert check_cluster(address) is False

    def test_that_never_answers_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import socket

        monkeypatch.setattr("graftwork.cluster.session.address.ANSWER_SECONDS", 0.5)
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            assert f"got '{address}', which does not answer as a Ray cluster's head (" in line_about(address)


def test_a_token_is_switched_on_for_a_cluster_that_wants_one_and_off_again(
    monkeypatch: pytest.MonkeyPatch, no_token: None
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with head(TOKEN) as (address, _):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with runtime.session([], min_parallel=1):
            assert os.environ["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_MODE" not in os.environ


def test_the_memory_of_a_control_group_is_what_ray_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 2**30)
    had = local._memory()
    assert sum(had.values()) == 2**30 and 2**26 < had["object_store_memory"] < 2**29
    monkeypatch.setattr(machine, "available_memory", lambda: 2**60)
    assert local._memory() == {}


def test_a_dashboard_on_this_machine_is_asked_past_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_cluster import OK, other_server

    monkeypatch.setenv("http_proxy", DEAD)
    monkeypatch.delenv("no_proxy", raising=False)
    from graftwork.pipeline.execution import remote

    with other_server(OK + b'{"ray_version": "1.13.0"}') as address, pytest.raises(SpecError) as refused:
        remote.connect(address)
    assert "a cluster with Ray 1.13.0" in str(refused.value) and "no_proxy" not in os.environ
