"""Jobs on a Ray cluster somewhere else: the client side of Ray's Jobs API. Whatever goes wrong there is one line here.

The token that opens a cluster travels in a header only: nodes have it from whoever started them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import aiohttp
import ray
from ray.job_submission import JobSubmissionClient

from graftwork.cluster.session import ray_internals
from graftwork.cluster.session.address import WHERE_TOKENS_ARE, token, token_path
from graftwork.cluster.session.variables import environment
from graftwork.specs.reading.load import SpecError

CONNECT_SECONDS = 10.0
POLL_SECONDS = 0.2
RECONNECT_SECONDS = 2.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OVERRIDING = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray prefers these to an address that it is given


@dataclass(frozen=True)
class Submission:
    """A job as the cluster has it. state: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""

    id: str
    state: str
    started: str
    metadata: Mapping[str, str]

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True)
class Answer:
    """What a short job printed, and its exit code."""

    stdout: str
    stderr: str
    code: int


def check_url(address: str) -> None:
    """Raise SpecError for what is not the URL of a dashboard, whether or not something answers there."""
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise SpecError([f"--address: got {address!r}; accepted: a Ray dashboard, as http://head:8265"])
    if "@" in urlsplit(address).netloc:
        raise SpecError(
            ["--address: got a URL with a password; accepted: one without, and a token (see docs/cluster.md)"]
        )


class Cluster:
    """A Ray cluster by the address of its dashboard; raises SpecError where that cannot be worked with."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        check_url(address)
        here = urlsplit(address).hostname in LOOPBACK
        self._no_proxy = dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(LOOPBACK)) if here else {}
        headers = {"Authorization": f"Bearer {secret}"} if (secret := token()) else {}
        self._check_version(headers)
        for logger in (logging.getLogger("ray"), ray_internals.jobs_logger, ray_internals.dashboard_logger):
            logger.setLevel(logging.ERROR)
        with self._problems(), environment(dict.fromkeys(OVERRIDING)):
            self.client = JobSubmissionClient(self.address, headers=headers)

    def submit(
        self, submission: str, command: Sequence[str], folder: Path, metadata: Mapping[str, str], env: Mapping[str, str]
    ) -> None:
        """Have `command` run in a copy of `folder`, on the head node, without any of the cluster's CPUs and GPUs."""
        self._submit(submission, shlex.join(command), folder, metadata, env)

    def ask(self, command: Sequence[str], folder: Path) -> Answer:
        """Run a short command in a copy of `folder` on the head node, and bring back what it prints."""
        name, mark = f"graft-ask-{uuid.uuid4().hex[:12]}", f"graft-answer-{uuid.uuid4().hex}"
        # A job's log has both streams: what the command says on stdout is kept back and told after the mark.
        line = f'out=$({shlex.join(command)}); code=$?; echo; echo {mark}; printf "%s\\n" "$out"; exit $code'
        self._submit(name, line, folder, {}, {})
        try:
            done = self.wait(name)
            with self._problems():
                log = self.client.get_job_logs(name)
                code = self.client.get_job_info(name).driver_exit_code
        finally:
            self._forget(name)
        said, marked, stdout = log.partition(f"\n{mark}\n")
        if not marked or code is None:
            raise SpecError([f"--address: {self.address} could not run a command ({done.state}): {_last_line(log)}"])
        stderr = said.partition(f"{line}\n")[2]
        return Answer(stdout.rstrip("\n"), stderr.strip("\n"), code)

    def submissions(self) -> list[Submission]:
        """All that were submitted, the oldest first."""
        with self._problems():
            jobs = [job for job in self.client.list_jobs() if job.submission_id is not None]
        return [_submission(job) for job in sorted(jobs, key=lambda job: job.start_time or 0)]

    def wait(self, submission: str, seconds: float | None = None) -> Submission:
        """Until the job has ended, or so long; returns it as it is then."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            with self._problems():
                found = _submission(self.client.get_job_info(submission))
            if found.ended or (deadline is not None and time.monotonic() > deadline):
                return found
            time.sleep(POLL_SECONDS)

    def logs(self, submission: str) -> str:
        with self._problems():
            return str(self.client.get_job_logs(submission))

    def follow(self, submission: str, write: Callable[[str], object]) -> Submission:
        """Write what the job prints as it comes, until the job has ended. Reconnect if the connection breaks."""
        offset = 0

        async def tail() -> None:
            nonlocal offset
            at = 0
            async for chunk in self.client.tail_job_logs(submission):
                fresh = chunk[max(0, offset - at) :]
                at += len(chunk)
                offset = max(offset, at)
                if fresh:
                    write(fresh)

        while True:
            with suppress(RuntimeError, aiohttp.ClientError, OSError):  # whether the cluster is there is asked next
                asyncio.run(tail())
            status = self.wait(submission, 0.0)
            if status.ended:
                rest = self.logs(submission)[offset:]
                if rest:
                    write(rest)
                return status
            time.sleep(RECONNECT_SECONDS)

    def stop(self, submission: str) -> None:
        """SIGTERM for the job's process, and SIGKILL seconds later."""
        with self._problems():
            self.client.stop_job(submission)

    def _submit(
        self, submission: str, line: str, folder: Path, metadata: Mapping[str, str], env: Mapping[str, str]
    ) -> None:
        with self._problems():
            self.client.submit_job(
                entrypoint=line,
                submission_id=submission,
                runtime_env={"working_dir": str(folder), "env_vars": dict(env)},
                metadata=dict(metadata),
            )

    def _forget(self, submission: str) -> None:
        """Take a short job out of the list; where that fails it stays, and no one is shown it."""
        with suppress(RuntimeError, OSError):
            self.client.delete_job(submission)

    def _check_version(self, headers: Mapping[str, str]) -> None:
        """That a Ray of our version answers, and takes the token."""
        request = Request(f"{self.address}/api/version", headers=dict(headers))
        try:
            with environment(self._no_proxy), build_opener(_Straight).open(request, timeout=CONNECT_SECONDS) as answer:
                theirs = json.loads(answer.read())["ray_version"]
        except HTTPError as error:
            raise self._refusal(error.code, bool(headers)) from None
        except OSError as error:
            raise self._silence(error) from None
        except (HTTPException, ValueError, KeyError, TypeError):
            raise self._no_dashboard() from None
        if str(theirs).split(".")[:2] != ray.__version__.split(".")[:2]:
            line = f"--address: got {self.address}, a cluster with Ray {theirs}; accepted: Ray {ray.__version__}"
            raise SpecError([f"{line}, the version that is installed here"])

    def _refusal(self, code: int, has_token: bool) -> SpecError:
        accepted = WHERE_TOKENS_ARE.format(token_path())
        if code == 401:
            return SpecError([f"--address: got {self.address}, which asks for a token; accepted: {accepted}"])
        if code == 403:
            kind = "refuses the token that is here" if has_token else "lets nobody in without a token"
            return SpecError([f"--address: got {self.address}, which {kind}; accepted: {accepted}"])
        return self._no_dashboard()

    def _no_dashboard(self) -> SpecError:
        return SpecError(
            [f"--address: got {self.address}, which is not a Ray dashboard; accepted: one, as http://head:8265"]
        )

    def _silence(self, error: OSError) -> SpecError:
        cause = getattr(error, "reason", error)  # what urllib wraps
        reason = getattr(cause, "strerror", None) or " ".join(str(cause).split()) or type(cause).__name__
        line = f"--address: got {self.address}, which does not answer ({reason})"
        return SpecError([f"{line}; accepted: the dashboard of a running Ray cluster"])

    @contextmanager
    def _problems(self) -> Iterator[None]:
        """What Ray's client raises, as one line; a server on this machine is asked without a proxy."""
        try:
            with environment(self._no_proxy):
                yield
        except ray.exceptions.AuthenticationError:
            raise self._refusal(403, True) from None
        except OSError as error:
            raise self._silence(error) from None
        except RuntimeError as error:
            raise SpecError([f"--address: {self.address} says: {_last_line(str(error))}"]) from None


class _Straight(HTTPRedirectHandler):
    """Follows no redirection: the token is for the address that was given."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


def _submission(job: Any) -> Submission:
    began = datetime.fromtimestamp((job.start_time or 0) / 1000, UTC)
    return Submission(job.submission_id, str(job.status.value), began.isoformat(timespec="seconds"), job.metadata or {})


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "nothing"
