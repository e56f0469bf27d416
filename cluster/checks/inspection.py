"""Checks of all nodes of a Ray cluster: an actor a node runs the probes there, and nodes are held against each other.

Actors take no CPU and no GPU of the cluster's: they look at nodes that are busy, too, and see all of their GPUs.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from graftwork.cluster.checks.probes import Check, Probe, broken, fine, run_phases, warning
from graftwork.specs.figures import amount

START_SECONDS = 40.0  # for a node to start a process
EXTRA_SECONDS = 10.0  # for what the probes of a node have found to come here
PING_SECONDS = 10.0
SENT_BYTES = 2**24  # from a node to the next, to see how fast that is
LOOPBACK = "127."
HEAD = "node:__internal_head__"  # a resource that the head alone has
MAX_SKEW_SECONDS, BROKEN_SKEW_SECONDS = 2.0, 240.0  # S3 refuses what is 15 minutes off
SAME_EVERYWHERE = ("ray", "torch", "source")  # what else differs is a warning; of Python the first two numbers


Phases = Sequence[Sequence[Sequence[Probe]]]


@dataclass(frozen=True, eq=False)  # so that it is a key
class Node:
    """A node that is alive: Ray's id of it, how it is shown, its address, and what it has by Ray's names."""

    id: str
    name: str
    address: str
    resources: Mapping[str, float]


def nodes() -> list[Node]:
    """Return the cluster's nodes that are alive, each by a name of its own."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    hosts = [node["NodeManagerHostname"] for node in alive]
    return [
        Node(node["NodeID"], _shown(node, hosts.count(host) > 1), node["NodeManagerAddress"], node["Resources"])
        for host, node in zip(hosts, alive, strict=True)
    ]


def _shown(node: Mapping[str, Any], ambiguous: bool) -> str:
    name = node["NodeManagerHostname"] + (f"/{node['NodeID'][:6]}" if ambiguous else "")
    return f"{name} (head)" if HEAD in node["Resources"] else name


def inspect_nodes(cluster: Sequence[Node], phases: Phases, seconds: float) -> Iterator[Check]:
    """Yield what the probes say on each node, and what differs between nodes. seconds: for the probes of a node."""
    actors = {node: _start(node) for node in cluster}
    clocks = {node: actor.clock.remote() for node, actor in actors.items()}
    ready, _ = ray.wait(list(clocks.values()), num_returns=len(clocks), timeout=START_SECONDS)
    for node in [node for node, ref in clocks.items() if ref not in ready]:
        del actors[node]
        advice = "look at its log in the dashboard, and whether it has graftwork's packages"
        yield replace(broken("node", f"starts no process within {START_SECONDS:.0f} s", advice), node=node.name)
    yield from _clocks(actors)
    yield from _ways(actors)
    answers = {node: actor.look.remote(phases, seconds) for node, actor in actors.items()}
    looked: dict[str, list[Check]] = {}
    deadline = time.monotonic() + seconds + EXTRA_SECONDS
    for node, ref in answers.items():
        try:
            found = ray.get(ref, timeout=max(0.1, deadline - time.monotonic()))
            looked[node.name] = [replace(check, node=node.name) for check in found]
        except (ray.exceptions.RayError, TimeoutError) as error:
            line = str(error).strip().splitlines()[-1]
            yield replace(broken("node", f"it gave no answer: {line}", "look at its log"), node=node.name)
    yield from (check for checks in looked.values() for check in checks)
    if any(not node.address.startswith(LOOPBACK) for node in cluster):
        yield from unreachable_names(looked)
    yield from differences(looked)


def unreachable_names(looked: Mapping[str, Sequence[Check]]) -> Iterator[Check]:
    """Warn of nodes whose own name resolves to loopback, as on Debian: gloo would have other nodes connect to that."""
    for node, checks in looked.items():
        for check in checks:
            if check.name == "host name" and str(check.values.get("address", "")).startswith(LOOPBACK):
                finding = f"{check.seen}, which no other node reaches"
                advice = "the node's own address in /etc/hosts, or GLOO_SOCKET_IFNAME=eth0 or the like on all nodes"
                yield replace(warning("host name", finding, advice), node=node)


def differences(looked: Mapping[str, Sequence[Check]]) -> list[Check]:
    """Return a check for each version that differs between nodes. If several nodes agree, return one that says so."""
    versions: dict[str, dict[str, str]] = {}  # of what -> node -> version
    for node, checks in looked.items():
        for check in checks:
            for what, version in _versions(check).items():
                versions.setdefault(what, {})[node] = version
    results = []
    for what, of_nodes in versions.items():
        by_version: dict[str, list[str]] = {}
        for node in looked:
            by_version.setdefault(of_nodes.get(node, "none"), []).append(node)
        if len(by_version) > 1:
            finding = "; ".join(f"{version} on {', '.join(on)}" for version, on in by_version.items())
            python = {".".join(version.split(".")[:2]) for version in by_version}
            serious = what in SAME_EVERYWHERE or (what == "python" and len(python) > 1)
            advice = "install the same on all nodes: one image, or pip install with the same constraints"
            results.append((broken if serious else warning)(f"same {what}", finding, advice))
    if not results and len(looked) > 1:
        results.append(fine("same versions", f"on {len(looked)} nodes"))
    return results


def _versions(check: Check) -> dict[str, str]:
    """Return the versions that a check tells, by what they are of."""
    match check.name:
        case "packages":
            return {name: str(version) for name, version in check.values.items()}
        case "python":
            return {"python": str(check.values["version"])}
        case "graftwork" if "source" in check.values:
            return {"source": str(check.values["source"])}
        case "driver" if "version" in check.values:
            return {"driver": str(check.values["version"])}
    return {}


def _clocks(actors: Mapping[Node, Any]) -> Iterator[Check]:
    """Compare the nodes' clocks with this one's, as exactly as the time of an answer allows."""
    for node, actor in actors.items():
        start = time.time()
        there, end = ray.get(actor.clock.remote(), timeout=PING_SECONDS), time.time()
        skew = max(0.0, start - there, there - end)
        finding = f"{skew:.1f} s off the head's" if skew else "that of the head's"
        values = {"skew_s": round(skew, 3), "answer_s": round(end - start, 4)}
        if skew <= MAX_SKEW_SECONDS:
            check = fine("clock", finding, **values)
        else:
            verdict = broken if skew > BROKEN_SKEW_SECONDS else warning
            check = verdict("clock", finding, "have it set by NTP: timedatectl set-ntp true", **values)
        yield replace(check, node=node.name)


def _ways(actors: Mapping[Node, Any]) -> Iterator[Check]:
    """Have each node send something to the next, all at once, by a port of any number, as training workers do."""
    order = list(actors)
    if len(order) < 2:
        return
    places = {node: actor.listen.remote() for node, actor in actors.items()}
    pairs = list(zip(order, order[1:] + order[:1], strict=True))
    # Where to send to is an argument that Ray waits for, so that a node which does not listen fails its sender's task.
    sends = [actors[node].send.remote(places[other]) for node, other in pairs]
    deadline = time.monotonic() + 2 * PING_SECONDS
    for (node, other), send in zip(pairs, sends, strict=True):
        yield replace(_way(other, send, deadline - time.monotonic()), node=node.name)


def _way(other: Node, send: Any, seconds: float) -> Check:
    """Return the check of the way to another node. send: the ref of the task that sends something there."""
    try:
        speed = SENT_BYTES / ray.get(send, timeout=max(0.1, seconds))
    except (ray.exceptions.RayError, TimeoutError) as error:
        lines = str(getattr(error, "cause", error) or error).strip().splitlines() or [type(error).__name__]
        advice = (
            "open all ports between the cluster's nodes; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose a network"
        )
        return broken("way to nodes", f"{other.name} cannot be reached: {lines[-1]}", advice)
    return fine("way to nodes", f"{amount(speed)}/s to {other.name}", bytes_per_s=speed)


def _start(node: Node) -> Any:
    pinned = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return ray.remote(Inspector).options(num_cpus=0, scheduling_strategy=pinned).remote()


class Inspector:
    """An actor on a node."""

    def clock(self) -> float:
        return time.time()

    def look(self, phases: Phases, seconds: float) -> list[Check]:
        return list(run_phases(phases, seconds))

    def listen(self) -> tuple[str, int]:
        """Take what one peer sends, once; return where to send it."""
        address = ray.util.get_node_ip_address()
        server = socket.create_server((address, 0))
        threading.Thread(target=_take, args=(server,), daemon=True).start()
        return address, server.getsockname()[1]

    def send(self, place: tuple[str, int]) -> float:
        """Return the seconds until the peer at an address and port has taken what it is sent."""
        began = time.perf_counter()
        with socket.create_connection(place, timeout=PING_SECONDS / 2) as peer:
            peer.sendall(bytes(SENT_BYTES))
            peer.shutdown(socket.SHUT_WR)
            peer.recv(1)
        return time.perf_counter() - began


def _take(server: socket.socket) -> None:
    server.settimeout(PING_SECONDS)
    with server:
        peer, _ = server.accept()
        with peer:
            while peer.recv(2**20):
                pass
            peer.sendall(b"!")
