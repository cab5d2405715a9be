#!/usr/bin/env bash
#SBATCH --job-name=build_array
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
#SBATCH --output=%x-%j.log

# Build shards of visual sentences as an array of independent jobs, then write the manifest. The
# parts first, then the same script without --array, which seals. From the checkout:
#
#   cp launch/cluster.env.example launch/cluster.env     # edit: your environment
#   export SPEC=mix.toml TOKENIZER=/path/to/tokenizer OUT=/path/to/shards
#   parts=$(sbatch --parsable -p PARTITION -A ACCOUNT --array=1-64 launch/build_array.sh)
#   sbatch -p PARTITION -A ACCOUNT --dependency=afterok:$parts launch/build_array.sh
#
# With afterany instead, the last job itself does what failed parts have left. Some parts again:
# PARTS=64 sbatch --array=3,17 launch/build_array.sh. On GPUs: EXTRA="--device cuda" sbatch
# --gpus-per-node=1 …. Variables: launch/build_common.sh.

# sbatch runs a copy of this file from a spool folder, so the checkout is where it was submitted from.
common=${LVM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}/launch/build_common.sh
if [[ ! -f $common ]]; then
    echo "build: $common is not there; submit from the checkout, or set LVM_ROOT to it" >&2
    exit 2
fi
# shellcheck source=launch/build_common.sh
source "$common"

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    part=$SLURM_ARRAY_TASK_ID parts=${PARTS:-$SLURM_ARRAY_TASK_COUNT}
    [[ $part -ge 1 && $part -le $parts ]] || fail "task $part of $parts; wanted --array=1-$parts, or PARTS=n with some of 1 to n"
    build+=(--part "$part/$parts")
    echo "build: part $part of $parts, restart $restarts"
else
    echo "build: what is missing, and the manifest, restart $restarts"
fi
run "${build[@]}"
