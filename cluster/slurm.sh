#!/usr/bin/env bash
# One job on nodes of a Slurm cluster: Ray's head on the first, workers on all, then the job. The nodes go when it ends.
#
#   sbatch --nodes=4 --gpus-per-node=8 cluster/slurm.sh JOB.yaml --set store=/shared/graftwork
#
# What follows JOB.yaml goes to `graft run`. Preempted or out of time, the job saves what it has; the same sbatch goes on
# with it. Fill in below or on sbatch's command line: the partition, the time, the GPUs. `python` and `ray` must be those
# of an environment with Graftwork, at the same path on every node: activate it before sbatch, or here.
#SBATCH --job-name=graftwork
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Ten minutes to save, before Slurm ends the job: longer than any step needs.
#SBATCH --signal=B:TERM@600

set -euo pipefail

if [[ $# -lt 1 || ! -r $1 ]]; then
    echo "usage: sbatch cluster/slurm.sh JOB.yaml [--set path=value]..." >&2
    exit 2
fi

readonly port=${GRAFT_RAY_PORT:-6379}
readonly cpus=${SLURM_CPUS_ON_NODE:?only within a Slurm job: use sbatch}
readonly gpus=${SLURM_GPUS_ON_NODE:-0}

# The token and the nodes' logs: in a folder that only this user reads, on storage that all nodes share.
folder=$(mktemp -d "${GRAFT_SHARED:-$HOME}/.graftwork-slurm-${SLURM_JOB_ID}-XXXXXX")
readonly folder
ray_steps=()
driver=

# shellcheck disable=SC2329  # the trap invokes it
finish() {
    trap - EXIT
    for step in ${ray_steps[@]+"${ray_steps[@]}"}; do
        kill -TERM "$step" 2>/dev/null || true
    done
    wait
    rm -rf "$folder"
}
trap finish EXIT
trap '[[ -z $driver ]] || kill -TERM "$driver" 2>/dev/null || true' TERM

python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$folder/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')
readonly head_ip

start_node() { # NODE, then what `ray start` is told
    local node=$1
    shift
    # Else Slurm may bind all of Ray on the node to one core.
    srun --overlap --cpu-bind=none --nodes=1 --ntasks=1 --nodelist="$node" \
        ray start --block --disable-usage-stats --num-cpus="$cpus" --num-gpus="$gpus" "$@" \
        >"$folder/$node.log" 2>&1 &
    ray_steps+=($!)
}

start_node "${nodes[0]}" --head --node-ip-address="$head_ip" --port="$port" --include-dashboard=false
for node in "${nodes[@]:1}"; do
    start_node "$node" --address="$head_ip:$port"
done
export RAY_ADDRESS="$head_ip:$port"

# Until all nodes are there. A worker that comes before the head waits for it by itself.
python - "${ray_steps[@]}" <<'PYTHON' || { tail -n 20 "$folder"/*.log >&2; exit 1; }
import os
import sys
import time

import ray

steps, deadline = [int(step) for step in sys.argv[1:]], time.monotonic() + 300


def wait(for_what):
    for step in steps:
        try:
            os.kill(step, 0)
        except ProcessLookupError:
            sys.exit("graftwork: Ray ended on a node")
    if time.monotonic() > deadline:
        sys.exit(f"graftwork: {for_what} did not come up")
    time.sleep(2)


while not ray.is_initialized():
    try:
        ray.init(logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError):
        wait("Ray's head")
while sum(node["Alive"] for node in ray.nodes()) < len(steps):
    wait("a node")
PYTHON

graft run "$@" &
driver=$!
code=0
wait "$driver" || code=$?
# A signal only interrupts the wait: the driver is still saving what it has.
while kill -0 "$driver" 2>/dev/null; do
    code=0
    wait "$driver" || code=$?
done
exit "$code"
