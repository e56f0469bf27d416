"""Private API of libraries that is used: a new version that lacks one of these names is told here, by name."""

import importlib.metadata
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from graftwork.cluster.session.ray_internals import ATTRIBUTES, HOMES, found_at
from graftwork.cluster.training.deepspeed_internals import FLATS

OTHERS = (
    "fsspec:AbstractFileSystem._strip_protocol",
    "pytorch_fid.inception:load_state_dict_from_url",
    "torch.distributed.distributed_c10d:_get_default_store",
    "torch:_foreach_lerp_",
    "yaml:SafeLoader.yaml_implicit_resolvers",
)


@pytest.mark.parametrize("place", sorted({*HOMES.values(), *ATTRIBUTES, *OTHERS}))
def test_private_api_is_where_we_look_for_it(place: str) -> None:
    try:
        found_at(place)
    except (ImportError, AttributeError) as error:
        name = importlib.metadata.packages_distributions()[re.split(r"[.:]", place)[0]][0]
        pytest.fail(f"{name} {importlib.metadata.version(name)} has no {place}: {error}")


@pytest.mark.parametrize("zero", FLATS)
def test_deepspeed_names_its_flat_weights_as_we_do(zero: int) -> None:
    module, optimizer, attribute = FLATS[zero]
    assert f"self.{attribute} = " in inspect.getsource(found_at(f"{module}:{optimizer}"))


@pytest.mark.parametrize(
    ("module", "name"),
    [("torch._dynamo.variables.functions", "_dynamo_marked_constant"), ("deepspeed.ops", "__compatible_ops__")],
)
def test_marks_that_we_leave_are_read_there(module: str, name: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    assert name in Path(spec.origin).read_text()
