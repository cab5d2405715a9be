# Shared by the launch scripts: check, start one task a GPU, stop cleanly, requeue. Sourced, not run.
#
#   DATA      folder of shards with manifest.json            required
#   RECIPE    what to train                                  default: the script's own
#   RUN_DIR   checkpoints, metrics, logs                     default: runs/$RECIPE, stable over requeues
#   ENV       virtual environment; or CONTAINER, an image    required (one of the two)
#   EXTRA     more options, as in EXTRA="--optim.lr 1e-4"    default: none
#   LVM_ROOT  the checkout                                   default: where sbatch was called
#   MAX_RESTARTS  requeues after a failure                   default: 5
#
# launch/cluster.env, where present, sets ENV or CONTAINER and the NCCL_* values of your network.
#
# The run folder tells how a run stands, never an exit code: DONE is written by the trainer when all
# steps are done. USR1 comes 300 s before the time limit: the trainer saves and ends, and the job is
# requeued. A failure is requeued only while the newest checkpoint moves on.

set -uo pipefail

fail() {
    echo "lvm: $*" >&2
    exit 2
}

ROOT=${LVM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
cd "$ROOT" || fail "cannot enter $ROOT"
if [[ -f launch/cluster.env ]]; then
    set -a
    source launch/cluster.env
    set +a
fi

[[ -n ${RECIPE:-} ]] || fail "RECIPE is not set; say which recipe to train"
[[ -n ${DATA:-} ]] || fail "DATA is not set; give the folder of shards: DATA=/path sbatch launch/$RECIPE.sh"
[[ -f $DATA/manifest.json ]] || fail "no manifest.json in DATA=$DATA; build it with python -m visual_sentences.build"
if [[ -n ${CONTAINER:-} ]]; then
    python=python
    container=(--container-image="$CONTAINER" --container-mounts="$ROOT,$DATA,${MOUNTS:-$ROOT}" --container-workdir="$ROOT")
elif [[ -n ${ENV:-} ]]; then
    [[ -x $ENV/bin/python ]] || fail "no python in ENV=$ENV; wanted a virtual environment with bin/python"
    python=$ENV/bin/python
    container=()
else
    fail "neither ENV (a virtual environment) nor CONTAINER (an image) is set; see launch/cluster.env.example"
fi

RUN_DIR=${RUN_DIR:-runs/$RECIPE}
MAX_RESTARTS=${MAX_RESTARTS:-5}
restarts=${SLURM_RESTART_COUNT:-0}
mkdir -p "$RUN_DIR/logs" || fail "cannot write to RUN_DIR=$RUN_DIR"
if [[ -f $RUN_DIR/DONE ]]; then
    echo "lvm: $RUN_DIR is finished; nothing to do"
    exit 0
fi

export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

newest() { cat "$RUN_DIR/latest" 2>/dev/null || echo none; }

stopped=
stop() {
    stopped=$1
    # To the tasks, not to srun alone: each rank saves at its next step and ends by itself.
    scancel --signal="$1" "$SLURM_JOB_ID.0" 2>/dev/null || kill -s "$1" "$step" 2>/dev/null
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

before=$(newest)
echo "lvm: $RECIPE, $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST, run $RUN_DIR, from $before, restart $restarts"
# The task's own rank becomes torch's; EXTRA is a list of words on purpose.
srun --kill-on-bad-exit=1 --output="$RUN_DIR/logs/%j-$restarts-%t.log" "${container[@]}" \
    bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"' lvm \
    "$python" -m lvm.train "$RECIPE" --data "$DATA" --out "$RUN_DIR" ${EXTRA:-} &
step=$!

# A trap runs only between waits, so wait again while the step lives.
while true; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
done

if [[ -f $RUN_DIR/DONE ]]; then
    echo "lvm: $RUN_DIR is finished"
    exit 0
fi
if [[ $stopped == USR1 ]]; then
    echo "lvm: stopped at $(newest) before the time limit; requeued"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
if [[ $stopped == TERM ]]; then
    echo "lvm: stopped at $(newest) by the scheduler or by you; submit again to go on"
    exit 0
fi
if [[ $restarts -lt $MAX_RESTARTS && $(newest) != "$before" ]]; then
    echo "lvm: failed with code $code after $(newest); requeued, restart $((restarts + 1)) of $MAX_RESTARTS"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
echo "lvm: failed with code $code at $(newest); logs in $RUN_DIR/logs" >&2
exit "$code"
