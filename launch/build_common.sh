# Shared by the build scripts: check, run one step, end or requeue. Sourced, not run.
# shellcheck shell=bash
#
#   SPEC       the mixture, such as mix.toml                  required
#   TOKENIZER  folder of the tokenizer                        required, but with EXTRA="--images"
#   OUT        folder for the shards, which all nodes see     required
#   EXTRA      more options, as in EXTRA="--device cuda"      default: none
#   MAX_RESTARTS  requeues after a failure                    default: 5
#   ENV, CONTAINER, LVM_ROOT: launch/job.sh. MOUNTS are the folders that the spec names
#
# A build may be killed at any moment and goes on from its finished units, so nothing is saved before
# the time limit: USR1 comes 60 s before it, and the job is requeued. So is a failure. Both only while
# units get finished, and never where the options are wrong.

who=build
# shellcheck source=launch/job.sh
source "${BASH_SOURCE[0]%/*}/job.sh"

[[ -n ${SPEC:-} ]] || fail "SPEC is not set; give the mixture: SPEC=mix.toml TOKENIZER=/path OUT=/path sbatch …"
[[ -f $SPEC ]] || fail "there is no spec SPEC=$SPEC"
[[ -n ${OUT:-} ]] || fail "OUT is not set; give the folder for the shards, on a disk that all nodes see"
options=("$SPEC" --out "$OUT")
if [[ " ${EXTRA:-} " != *" --images "* ]]; then
    [[ -n ${TOKENIZER:-} ]] || fail "TOKENIZER is not set; give its folder, or EXTRA=\"--images\" to store JPEG"
    [[ -d $TOKENIZER ]] || fail "there is no folder TOKENIZER=$TOKENIZER"
    options+=(--tokenizer "$TOKENIZER")
fi
environment "$OUT" ${TOKENIZER:+"$TOKENIZER"}
[[ -n ${CONTAINER:-} ]] || export PATH=$ENV/bin:$PATH
mkdir -p "$OUT/logs" || fail "cannot write to OUT=$OUT"
export OMP_NUM_THREADS=1
cpus=${SLURM_CPUS_PER_TASK:-1}

# A step may end well although the build did not, so the build's own exit code is kept in a file;
# EXTRA is a list of words on purpose.
ended=$OUT/logs/ended-$SLURM_JOB_ID
# shellcheck disable=SC2016,SC2206,SC2034
build=(bash -c '"$@"; code=$?; echo "$code" > "$0"; exit "$code"' "$ended"
    python -m visual_sentences.build "${options[@]}" ${EXTRA:-})

# Every finished unit has a JSON file, which no other file is named like.
units() { find "$OUT" -maxdepth 1 -name '*-*-*.json' | wc -l; }

# Run the step of these arguments of srun, and end as it did or be requeued.
run() {
    local before code=0 own stopped='' pid why
    before=$(units)
    rm -f "$ended"
    trap 'stopped=USR1' USR1
    trap 'stopped=TERM' TERM
    srun --export=ALL --kill-on-bad-exit=1 --cpus-per-task="$cpus" "${container[@]}" "$@" &
    pid=$!
    # A trap runs only between waits, so wait again while the step lives.
    while [[ -z $stopped ]]; do
        wait "$pid"
        code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    if [[ -n $stopped ]]; then
        kill "$pid" 2>/dev/null
    else
        own=$(cat "$ended" 2>/dev/null)
        code=${own:-$((code == 0 ? 1 : code))} # none: it was never started, or killed
        rm -f "$ended"
    fi
    if [[ -z $stopped && $code == 0 ]]; then
        echo "build: done, $(units) units are in $OUT"
        exit 0
    fi
    if [[ $stopped == TERM ]]; then
        echo "build: stopped by the scheduler or by you at $(units) units; submit again to go on"
        exit 143
    fi
    if [[ $code != 2 && $(units) -gt $before && ($stopped == USR1 || $restarts -lt $MAX_RESTARTS) ]]; then
        [[ -n $stopped ]] && why="stopped before the time limit" || why="failed with code $code"
        echo "build: $why at $(units) units; requeued"
        scontrol requeue "$SLURM_JOB_ID"
        exit
    fi
    [[ -z $stopped ]] || fail "no unit was finished within the time limit; give more --time, or a smaller --shard-rows"
    echo "build: failed with code $code at $(units) units; the same submission goes on from there" >&2
    exit "$code"
}
