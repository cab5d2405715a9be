# Shared by every job: the checkout, its settings, the Python environment. Sourced, not run.
# shellcheck shell=bash
#
#   who       what messages begin with, set by the file that sources this
#   LVM_ROOT  the checkout                                   default: where sbatch was called
#   ENV       virtual environment; or CONTAINER, an image    required (one of the two)
#   MOUNTS    host folders for a container, besides those that the job names
#
# launch/cluster.env, where present, is read first and wins over the environment.

set -uo pipefail

fail() {
    echo "$who: $*" >&2
    exit 2
}

ROOT=${LVM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
cd "$ROOT" || fail "cannot enter $ROOT"
if [[ -f launch/cluster.env ]]; then
    set -a
    # shellcheck source=/dev/null
    source launch/cluster.env
    set +a
fi
restarts=${SLURM_RESTART_COUNT:-0} # how often Slurm started this job again, for whatever reason
MAX_RESTARTS=${MAX_RESTARTS:-5}

# Set `python` and the array `container`, srun's options for an image that sees these folders.
environment() {
    local mounts folder
    if [[ -n ${CONTAINER:-} ]]; then
        mounts=$ROOT
        for folder; do mounts+=,$(realpath -m "$folder"); done
        python=python
        container=(--container-image="$CONTAINER" --container-mounts="$mounts${MOUNTS:+,$MOUNTS}" --container-workdir="$ROOT")
    elif [[ -n ${ENV:-} ]]; then
        [[ -x $ENV/bin/python ]] || fail "no python in ENV=$ENV; wanted a virtual environment with bin/python"
        python=$ENV/bin/python
        container=()
    else
        fail "neither ENV (a virtual environment) nor CONTAINER (an image) is set; see launch/cluster.env.example"
    fi
}
