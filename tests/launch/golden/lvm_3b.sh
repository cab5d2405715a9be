#!/usr/bin/env bash
#SBATCH --job-name=lvm_3b
#SBATCH --nodes=16
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.log

# launch/lvm_3b.sh, filled in by python -m launch. Variables: launch/common.sh.

export LVM_ROOT=/CHECKOUT
export RUN_DIR=/CHECKOUT/runs/lvm_3b
export RECIPE=lvm_3b

# sbatch runs a copy of this file from a spool folder, so the checkout is where it was submitted from.
common=${LVM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}/launch/common.sh
if [[ ! -f $common ]]; then
    echo "lvm: $common is not there; submit from the checkout, or set LVM_ROOT to it" >&2
    exit 2
fi
# shellcheck source=launch/common.sh
source "$common"
