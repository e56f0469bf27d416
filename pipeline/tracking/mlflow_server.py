"""An MLflow server as its client meets it: what an error says of it in a line, and what is known to be wrong before."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import requests
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException

from graftwork.pipeline.tracking.mlflow_database import restoring
from graftwork.specs.masking import masked
from graftwork.specs.problems import shortened
from graftwork.specs.secrets import redacted

ANSWER_SECONDS = "10"  # that a request may take
MAX_CAUSES = 10  # of an error, each of the one before
MAX_REASON = 300  # characters
OTHERS_FAULT = (401, 403, 407, 408, 429)  # statuses below 500 that somebody else can set right
LOGIN = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
NO_MLFLOW = "does not answer as an MLflow server does"


@dataclass(frozen=True)
class Fault:
    """What the error of a request says.

    reason: of the server, as "does not answer". is_silence: no answer came. is_ours: the request is at fault.
    """

    reason: str
    is_silence: bool = False
    is_ours: bool = False


def set_up() -> None:
    """Have MLflow's client answer soon and print nothing; what users set stays."""
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it tells of each table it makes and each failed try
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # trying again is the outbox's: it looks before it creates
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", ANSWER_SECONDS)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def problem(uri: str, experiment: str) -> str | None:
    """What keeps a run from being recorded at a URI, asked through the client that a run uses; None if nothing does."""
    set_up()
    try:
        known = find_experiment(MlflowClient(tracking_uri=uri), experiment)
    except Exception as error:  # of whatever library MLflow talks through
        found = fault(error, uri)
        return f"which MLflow refuses: {one_line(error)}" if found.is_ours else f"which {found.reason}"
    if known is not None and known.lifecycle_stage == "deleted":
        return f"whose experiment {experiment!r} is deleted; {restoring(masked(uri), known.experiment_id)}"
    return None


def find_experiment(client: MlflowClient, name: str) -> Experiment | None:
    """The experiment of that name, deleted or not. Raises whatever the client raises."""
    known = client.get_experiment_by_name(name)
    if known is not None and known.name != name:  # of an answer that has no such field
        raise NotMlflow
    return known


class NotMlflow(Exception):
    """Whoever answers is not an MLflow server."""


def fault(error: BaseException, uri: str) -> Fault:
    """What an error of the client at a URI says."""
    causes = list(_causes(error))
    silence = next((cause for cause in causes if isinstance(cause, requests.ConnectionError | requests.Timeout)), None)
    if silence is not None:
        return Fault(_silent(silence, causes) + _proxy(uri), is_silence=True)
    status = _status(error)
    if isinstance(error, NotMlflow) or _is_foreign(error):
        return Fault(_foreign(error, status) + _proxy(uri))
    if status in (401, 407):
        return Fault(f"wants a login ({status}; accepted: {LOGIN})" + _proxy(uri))
    if status == 403:
        return Fault(f"does not let this login in (403: {one_line(error)})")
    if status is not None and 400 <= status < 500 and status not in OTHERS_FAULT:
        return Fault(f"refuses an entry: {one_line(error)}", is_ours=True)
    via = _proxy(uri) if status is not None else ""
    return Fault(f"fails ({one_line(error)}){via}")


def one_line(error: BaseException) -> str:
    """An error's text, without what it says of statements and links, and without secrets."""
    text = " ".join(str(error).split())
    if found := re.search(r"too many (\d+) error responses", text):
        return f"it answers {found[1]}"
    text = re.sub(r"(\[SQL: .*| ?\(Background on this error at: .*| See https?://\S+.*)$", "", text).strip()
    return shortened(redacted(text or type(error).__name__), MAX_REASON)


def _silent(silence: BaseException, causes: list[BaseException]) -> str:
    """What is said of a server that gave no answer."""
    texts = [str(getattr(cause, "strerror", None) or cause) for cause in causes if isinstance(cause, OSError)]
    root = shortened(redacted(" ".join(texts[-1].split())), MAX_REASON)
    if isinstance(silence, requests.exceptions.SSLError):
        return f"cannot be trusted ({root}; MLFLOW_TRACKING_SERVER_CERT_PATH names a certificate that can)"
    if isinstance(silence, requests.Timeout) or "timed out" in root:
        return f"does not answer within {os.environ['MLFLOW_HTTP_REQUEST_TIMEOUT']} seconds"
    return "does not answer" if root.startswith(("('Connection", "HTTP")) else f"does not answer ({root})"


def _proxy(uri: str) -> str:
    """The proxy that requests to a URI go through, if one is set."""
    if urlsplit(uri).scheme not in ("http", "https"):
        return ""
    proxy = requests.utils.select_proxy(uri, requests.utils.get_environ_proxies(uri))
    return f", through the proxy {masked(proxy)}" if proxy else ""


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error stands for."""
    if isinstance(error, MlflowException):
        found = re.search(r"too many (\d+) error responses", str(error))
        return int(found[1]) if found else error.get_http_status_code()
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code
    return None


def _is_foreign(error: BaseException) -> bool:
    """Whether an answer is none that MLflow gives: a page, or a document of another service."""
    if not isinstance(error, MlflowException) or _status(error) in OTHERS_FAULT:
        return False
    text = str(error)
    return "Response body: '" in text or text.startswith("INTERNAL_ERROR: Response: ")


def _foreign(error: BaseException, status: int | None) -> str:
    text = str(error)
    if "not in a valid JSON" in text:
        return f"{NO_MLFLOW} (a page instead of JSON, as for a login)"
    return f"{NO_MLFLOW} ({status})" if "failed with error code" in text else NO_MLFLOW


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it, and so on."""
    cause: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__
