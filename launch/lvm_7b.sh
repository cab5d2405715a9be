#!/usr/bin/env bash
#SBATCH --job-name=lvm_7b
#SBATCH --nodes=32
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.log

# Pretrain LVM 7B: 6.54 B parameters, 420 B tokens, 256 GPUs as written. From the checkout:
#
#   cp launch/cluster.env.example launch/cluster.env     # edit: your environment, your network
#   DATA=/path/to/shards sbatch -p PARTITION -A ACCOUNT launch/lvm_7b.sh
#
# Fewer GPUs: sbatch --nodes=8 launch/lvm_7b.sh. The batch stays 512 rows whatever their number.
# Variables: launch/common.sh. The same with checks before it waits: python -m launch submit lvm_7b.

RECIPE=${RECIPE:-lvm_7b}

# sbatch runs a copy of this file from a spool folder, so the checkout is where it was submitted from.
common=${LVM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}/launch/common.sh
if [[ ! -f $common ]]; then
    echo "lvm: $common is not there; submit from the checkout, or set LVM_ROOT to it" >&2
    exit 2
fi
# shellcheck source=launch/common.sh
source "$common"
