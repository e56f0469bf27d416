"""Ray's private API: all of it that is used, in one place, as it is in Ray 2.60 (the pin in pyproject.toml).

A name is looked up in Ray each time it is asked for, so that importing this module loads nothing of Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

HOMES = {
    "AuthenticationTokenLoader": "ray._raylet:AuthenticationTokenLoader",
    "Config": "ray._raylet:Config",
    "GcsNodeInfo": "ray.core.generated.gcs_pb2:GcsNodeInfo",
    "GetAllNodeInfoRequest": "ray.core.generated.gcs_service_pb2:GetAllNodeInfoRequest",
    "InternalKVGcsServiceStub": "ray.core.generated.gcs_service_pb2_grpc:InternalKVGcsServiceStub",
    "InternalKVGetRequest": "ray.core.generated.gcs_service_pb2:InternalKVGetRequest",
    "NodeInfoGcsServiceStub": "ray.core.generated.gcs_service_pb2_grpc:NodeInfoGcsServiceStub",
    "NvidiaGPUAcceleratorManager": "ray._private.accelerators.nvidia_gpu:NvidiaGPUAcceleratorManager",
    "PlacementGroupTableData": "ray.core.generated.gcs_pb2:PlacementGroupTableData",
    "canonicalize_bootstrap_address": "ray._private.services:canonicalize_bootstrap_address",
    "constants": "ray._private.ray_constants",
    "dashboard_logger": "ray.dashboard.modules.dashboard_sdk:logger",
    "find_node_ids": "ray._private.services:find_node_ids",
    "jobs_logger": "ray.dashboard.modules.job.sdk:logger",
    "resolve_object_store_memory": "ray._private.utils:resolve_object_store_memory",
    "state": "ray._private.state:state",
}
# What is used of these, beside the names themselves; and private attributes of Ray's public classes.
ATTRIBUTES = (
    "ray._private.ray_constants:ENABLE_RAY_CLUSTER",
    "ray._private.ray_constants:OBJECT_STORE_MINIMUM_MEMORY_BYTES",
    "ray._private.ray_constants:RAY_ENABLE_UV_RUN_RUNTIME_ENV",
    "ray._private.accelerators.nvidia_gpu:NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type",
    "ray._private.state:GlobalState._connect_and_get_accessor",
    "ray._raylet:AuthenticationTokenLoader.instance",
    "ray._raylet:Config.initialize",
    "ray.core.generated.gcs_pb2:GcsNodeInfo.ALIVE",
    "ray.core.generated.gcs_pb2:PlacementGroupTableData.REMOVED",
    "ray.data:DataContext.raise_original_map_exception",
    "ray.job_config:JobConfig._runtime_env_has_working_dir",
)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found_at(HOMES[name])


def found_at(place: str) -> Any:
    """Return what is at `module:attribute.attribute`; raise ImportError or AttributeError."""
    module, _, path = place.partition(":")
    value: Any = import_module(module)
    for attribute in filter(None, path.split(".")):
        value = getattr(value, attribute)
    return value
