"""A user's program as a type checker sees it: `make check` fails if a call of the face loses its signature."""

from typing import Any, assert_type

import graftwork
from graftwork.pipeline.runs.record import RunRecord


def use() -> None:
    assert_type(graftwork.run("job.yaml", ["seed=1"]), RunRecord)
    assert_type(graftwork.plan("job.yaml").steps[0].key, str)
    assert_type(graftwork.compare(["a"]), list[dict[str, Any]])
    assert_type(graftwork.resume("a"), RunRecord)
    assert_type(graftwork.__version__, str)
    graftwork.run(3)  # type: ignore[arg-type]
