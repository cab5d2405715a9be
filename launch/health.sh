#!/usr/bin/env bash
# Is this node fit to train on? One task a node, before training:
#
#   srun --ntasks-per-node=1 bash launch/health.sh
#
# prints `health: NODE ok`, or `health: NODE bad: why` for each thing that is wrong, and exits 1.
# Needs bash and nvidia-smi alone, outside of any container.
#
#   HEALTH_GPU=0        the node has no GPUs, or not NVIDIA's
#   HEALTH_GPU_MIB      memory of a GPU that others may hold    default: 2048
#   HEALTH_TMP_GIB      free space wanted in TMPDIR (or /tmp)   default: 1
#   SLURM_GPUS_ON_NODE  how many GPUs must answer               set by Slurm
#   DATA, RUN_DIR, ENV, CONTAINER, MASTER_ADDR                  of the job, where set

set -uo pipefail
node=${SLURMD_NODENAME:-$(hostname -s)}
code=0
bad() {
    echo "health: $node bad: $*"
    code=1
}

# A GPU that has fallen off the bus makes nvidia-smi hang, or answer for the others alone.
if [[ ${HEALTH_GPU:-1} != 0 ]]; then
    query=index,memory.used,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_thermal_slowdown
    if ! gpus=$(timeout -k 5 60 nvidia-smi --query-gpu="$query" --format=csv,noheader,nounits 2>&1); then
        bad "nvidia-smi failed: ${gpus:-no answer in 60 s}"
    else
        count=$(grep -c . <<<"$gpus")
        wanted=${SLURM_GPUS_ON_NODE:-$count}
        [[ $count -ge $wanted ]] || bad "$count of $wanted GPUs answer"
        while IFS=, read -r index used ecc hot; do
            [[ $used =~ ^[0-9]+$ ]] || bad "GPU $index says $used instead of its memory"
            [[ ! $used =~ ^[0-9]+$ || $used -le ${HEALTH_GPU_MIB:-2048} ]] || bad "GPU $index: $used MiB are held by others"
            [[ ! $ecc =~ ^[1-9] ]] || bad "GPU $index: $ecc uncorrected memory errors since its driver was loaded"
            [[ $hot != Active ]] || bad "GPU $index is slowed down by heat"
        done <<<"${gpus//, /,}"
    fi
fi

free=$(df --output=avail -BG "${TMPDIR:-/tmp}" 2>/dev/null | tail -n 1 | tr -dc 0-9)
[[ ${free:-0} -ge ${HEALTH_TMP_GIB:-1} ]] || bad "${free:-0} GiB free in ${TMPDIR:-/tmp}, wanted ${HEALTH_TMP_GIB:-1}"
[[ -z ${DATA:-} || -r $DATA/manifest.json ]] || bad "cannot read DATA=$DATA/manifest.json; is its disk mounted here?"
if [[ -n ${RUN_DIR:-} ]]; then
    probe=$RUN_DIR/logs/.health-$node
    if ! { echo "$node" >"$probe" && rm "$probe"; } 2>/dev/null; then bad "cannot write to RUN_DIR=$RUN_DIR"; fi
fi
[[ -n ${CONTAINER:-} || -z ${ENV:-} || -x $ENV/bin/python ]] || bad "no python in ENV=$ENV; is its disk mounted here?"
[[ -z ${MASTER_ADDR:-} ]] || getent hosts "$MASTER_ADDR" >/dev/null || bad "does not know the host $MASTER_ADDR of rank 0"

[[ $code != 0 ]] || echo "health: $node ok"
exit "$code"
