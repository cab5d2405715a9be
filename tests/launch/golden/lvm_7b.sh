#!/usr/bin/env bash
#SBATCH --job-name=lvm_7b
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=2-00:00:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.log
#SBATCH --partition=gpu
#SBATCH --account=v
#SBATCH --qos=high
#SBATCH --exclude=node7

# launch/lvm_7b.sh, filled in by python -m launch. Variables: launch/common.sh.

export LVM_ROOT=/CHECKOUT
export RUN_DIR='/shared/runs/a run'
export RECIPE=lvm_7b
export DATA=/shared/uvd
export EXTRA='--optim.lr 1e-4 --steps 1000'

# sbatch runs a copy of this file from a spool folder, so the checkout is where it was submitted from.
common=${LVM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}/launch/common.sh
if [[ ! -f $common ]]; then
    echo "lvm: $common is not there; submit from the checkout, or set LVM_ROOT to it" >&2
    exit 2
fi
# shellcheck source=launch/common.sh
source "$common"
