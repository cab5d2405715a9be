#!/usr/bin/env bash
#SBATCH --job-name=aim_1b
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.log

# Pretrain AIM 1B: 1.21 B parameters, 4.9 B images, 64 GPUs as written. DATA is a folder of image
# shards (python -m visual_sentences.build --images). From the checkout:
#
#   cp launch/cluster.env.example launch/cluster.env     # edit: your environment, your network
#   DATA=/path/to/shards sbatch -p PARTITION -A ACCOUNT launch/aim_1b.sh
#
# Fewer GPUs: sbatch --nodes=1 launch/aim_1b.sh. The batch stays 4096 images whatever their number.
# Variables: launch/common.sh. The same with checks before it waits: python -m launch submit aim_1b.

RECIPE=${RECIPE:-aim_1b}

# sbatch runs a copy of this file from a spool folder, so the checkout is where it was submitted from.
common=${LVM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}/launch/common.sh
if [[ ! -f $common ]]; then
    echo "lvm: $common is not there; submit from the checkout, or set LVM_ROOT to it" >&2
    exit 2
fi
# shellcheck source=launch/common.sh
source "$common"
