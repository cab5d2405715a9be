#!/usr/bin/env bash
#SBATCH --job-name=build_ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
#SBATCH --output=%x-%j.log

# Build shards of visual sentences with Ray on all nodes of one allocation. From the checkout:
#
#   cp launch/cluster.env.example launch/cluster.env     # edit: your environment
#   export SPEC=mix.toml TOKENIZER=/path/to/tokenizer OUT=/path/to/shards
#   sbatch -p PARTITION -A ACCOUNT launch/build_ray.sh
#
# On GPUs, one actor for each: EXTRA="--device cuda" sbatch --gpus-per-node=8 …. Nodes are not shared
# with other jobs: Ray stops all that is called Ray on a node. Variables: launch/build_common.sh.

# sbatch runs a copy of this file from a spool folder, so the checkout is where it was submitted from.
common=${LVM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}/launch/build_common.sh
if [[ ! -f $common ]]; then
    echo "build: $common is not there; submit from the checkout, or set LVM_ROOT to it" >&2
    exit 2
fi
# shellcheck source=launch/build_common.sh
source "$common"
[[ -n ${CONTAINER:-} || -x $ENV/bin/ray ]] || fail "no ray in ENV=$ENV; pip install 'large-vision-models[ray]' there"

# A number, since a node may know its own name as 127.0.1.1, where the others do not find it.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
host=$(getent ahostsv4 "$head" | awk '$1 !~ /^127\./ { print $1; exit }')
[[ -n $host ]] || host=$(hostname -I | awk '{ print $1 }')

# The build connects to a cluster through RAY_ADDRESS alone. The token keeps others of this network
# out, who could run what they like; told how, Ray does not use one of some other cluster.
export RAY_ADDRESS=$host:$((20000 + SLURM_JOB_ID % 10000))
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300} # seconds

echo "build: $SLURM_JOB_NUM_NODES nodes of $cpus cores, Ray at $RAY_ADDRESS, restart $restarts, logs in $OUT/logs"
run --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --output="$OUT/logs/%j-$restarts-%t.log" \
    ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus "$cpus" \
    -- "${build[@]}" --engine ray
