# Shared by the scripts that train: check, start one task a GPU, stop cleanly, requeue. Sourced, not run.
# shellcheck shell=bash
#
#   DATA      folder of shards with manifest.json            required
#   RECIPE    what to train                                  default: the script's own
#   RUN_DIR   checkpoints, metrics, logs                     default: runs/$RECIPE, stable over requeues
#   EXTRA     more options, as in EXTRA="--optim.lr 1e-4"    default: none
#   SWEEP     folder of a sweep: an array's tasks take RUN_DIR and more EXTRA from its tasks.tsv
#   MAX_RESTARTS  requeues after a failure of this job       default: 5
#   HEALTH    0 leaves the check of the nodes out            default: 1; see launch/health.sh
#   ENV, CONTAINER, MOUNTS, LVM_ROOT: launch/job.sh
#
# The run folder tells how a run stands, never an exit code: `latest` names the newest checkpoint, and
# the trainer writes DONE when all steps are done. The job is requeued, and goes on from `latest`,
#   USR1 300 s before the time limit: the trainer saves and ends. Only if a checkpoint is new;
#   when a scheduler preempts, to the script or the tasks: the same; with nothing new, it is counted;
#   after a failure, while a checkpoint is new each time, at most MAX_RESTARTS times a job;
#   after a failed check of the nodes, without those nodes: counted with the failures;
# and never while Slurm is ending it (scancel; a requeue from outside, which Slurm does by itself), nor
# where `python -m launch cancel` has left CANCEL in the run folder. Run outside a job, this checks
# what is missing and starts nothing.

who=lvm
# shellcheck source=launch/job.sh
source "${BASH_SOURCE[0]%/*}/job.sh"

[[ -n ${RECIPE:-} ]] || fail "RECIPE is not set; say which recipe to train"
[[ -n ${DATA:-} ]] || fail "DATA is not set; give the folder of shards: DATA=/path sbatch launch/$RECIPE.sh"
[[ -f $DATA/manifest.json ]] || fail "no manifest.json in DATA=$DATA; build it with python -m visual_sentences.build"
if [[ -n ${SWEEP:-} ]]; then
    RUN_DIR=$SWEEP
fi
if [[ -n ${SWEEP:-} && -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    IFS=$'\t' read -r name options < <(sed -n "${SLURM_ARRAY_TASK_ID}p" "$SWEEP/tasks.tsv")
    [[ -n ${name:-} ]] || fail "task $SLURM_ARRAY_TASK_ID is not in $SWEEP/tasks.tsv; see python -m launch sweep"
    RUN_DIR=$SWEEP/$name EXTRA="${EXTRA:-} $options"
fi
RUN_DIR=${RUN_DIR:-runs/$RECIPE}
environment "$DATA" "$RUN_DIR"
mkdir -p "$RUN_DIR/logs" || fail "cannot write to RUN_DIR=$RUN_DIR"
if [[ -f $RUN_DIR/DONE ]]; then
    echo "lvm: $RUN_DIR is finished; nothing to do"
    exit 0
fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "lvm: not in a job; nothing is missing for $RECIPE, so submit it: sbatch $0"
    exit 0
fi

# The job as users name it. Two at once in one run folder would write over each other.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
other=$(cat "$RUN_DIR/job" 2>/dev/null)
[[ -z $other || $other == "$job" || $(squeue -h -j "$other" -o %T 2>/dev/null) != RUNNING ]] ||
    fail "job $other is training $RUN_DIR; cancel it, or give this one another RUN_DIR"
echo "$job" >"$RUN_DIR/job"
rm -f "$RUN_DIR/CANCEL"

export DATA RUN_DIR MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
counted=$RUN_DIR/logs/$SLURM_JOB_ID-failures # a line for each requeue after a failure

newest() { cat "$RUN_DIR/latest" 2>/dev/null || echo none; }
failures() { wc -l 2>/dev/null <"$counted" || echo 0; }

# Requeue this job and end. Slurm ends it in turn, by TERM, so this comes last.
requeue() {
    echo "lvm: $1; requeued"
    trap '' TERM
    scontrol requeue "$job"
    exit 0
}

# The same after a failure, unless there have been MAX_RESTARTS; with NODES, never on those again.
requeue_failed() { # REASON [NODES]
    local so_far before
    so_far=$(failures)
    [[ $so_far -lt $MAX_RESTARTS ]] || return
    echo "$1" >>"$counted"
    echo "lvm: $1; requeued, $((so_far + 1)) of $MAX_RESTARTS"
    before=$(scontrol show job -o "$job" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
    [[ $before != "(null)" ]] || before=
    trap '' TERM
    scontrol requeue "$job"
    # Slurm takes this only of a job that waits: now, and before it can start again.
    [[ -z ${2:-} ]] || scontrol update JobId="$job" ExcNodeList="${before:+$before,}$2"
    exit 0
}

step='' stopped=''
stop() {
    stopped=$1
    [[ -n $step ]] || return # nothing to save yet
    # USR1 to the tasks whatever came: Slurm may have sent them TERM already, and a second TERM
    # kills a trainer that is saving.
    scancel --signal=USR1 "$job" 2>/dev/null || kill -s USR1 "$step" 2>/dev/null
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

before=$(newest)
echo "lvm: $RECIPE, $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST, run $RUN_DIR, from $before, restart $restarts"

if [[ ${HEALTH:-1} != 0 ]]; then
    # A node that does not answer is as bad as one that complains.
    report=$(timeout -k 10 180 srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
        --ntasks-per-node=1 --kill-on-bad-exit=0 bash "$ROOT/launch/health.sh" 2>&1)
    bad=$(comm -23 <(scontrol show hostnames "$SLURM_JOB_NODELIST" | sort) \
        <(sed -n 's/^health: \([^ ]*\) ok$/\1/p' <<<"$report" | sort) | paste -sd,)
    if [[ -n $bad && -z $stopped ]]; then
        grep -v ' ok$' <<<"$report"
        requeue_failed "the nodes $bad failed the health check" "$bad"
        echo "lvm: the nodes $bad failed the health check, after $MAX_RESTARTS requeues; tell whoever runs the cluster, or set HEALTH=0 to train all the same" >&2
        exit 1
    fi
fi

if [[ -z $stopped ]]; then
    # The task's own rank becomes torch's; EXTRA is a list of words on purpose. srun does not hand on
    # the batch job's --cpus-per-task by itself.
    # shellcheck disable=SC2016,SC2086
    srun --export=ALL --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
        --open-mode=append --output="$RUN_DIR/logs/%j-$restarts-%t.log" "${container[@]}" \
        bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"' lvm \
        "$python" -m lvm.train "$RECIPE" --data "$DATA" --out "$RUN_DIR" ${EXTRA:-} &
    step=$!
fi
# A trap runs only between waits, so wait again while the step lives.
code=0
while [[ -n $step ]]; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
done

now=$(newest)
if [[ -f $RUN_DIR/DONE ]]; then
    echo "lvm: $RUN_DIR is finished"
    exit 0
fi
if [[ -f $RUN_DIR/CANCEL ]]; then
    rm -f "$RUN_DIR/CANCEL"
    echo "lvm: cancelled at $now; submit again to go on"
    exit 0
fi
# Slurm would take a requeue even after scancel. It sends TERM to all processes of a job, and so to
# the squeue that asks: then ask again.
for _ in 1 2 3 4 5; do
    state=$(squeue -h -j "$job" -o %T 2>/dev/null)
    [[ -z $state ]] || break
    sleep 1
done
if [[ $state != RUNNING && $state != SIGNALING ]]; then # SIGNALING: while signals are on their way
    echo "lvm: Slurm ended this job at $now (${state:-no answer}: scancel, preemption, a dead node); submit again to go on, unless Slurm has requeued it"
    exit 0
fi
# In the time of grace before a preemption Slurm tells the tasks alone, which end well; or it sends this
# job's own signal (PreemptParameters=send_user_signal), long before the time limit.
[[ -n $stopped || $code != 0 ]] || stopped=TERM
[[ $stopped != USR1 || $(squeue -h -j "$job" -o %L) =~ ^[0-9]+:[0-9]+$ ]] || stopped=TERM # an hour or more
if [[ $stopped == USR1 ]]; then
    [[ $now == "$before" ]] || requeue "stopped at $now before the time limit"
    fail "no checkpoint is newer than $before, although the time limit is near; give more --time, or EXTRA=\"--save-every N\" with a smaller N"
elif [[ $stopped == TERM ]]; then
    [[ $now == "$before" ]] || requeue "stopped at $now by the scheduler"
    requeue_failed "stopped at $now, before anything new, by the scheduler"
fi
[[ $now == "$before" ]] || requeue_failed "failed with code $code after $now"
echo "lvm: failed with code $code at $now, after $(failures) requeues; logs in $RUN_DIR/logs" >&2
exit "$((code == 0 ? 1 : code))"
