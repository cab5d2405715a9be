#!/usr/bin/env bash
#SBATCH --job-name=delvm_300m_kd
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.log

# Distil DeLVM 300M: 292 M parameters, 10.5 B tokens, 8 GPUs as written. From the checkout:
#
#   cp launch/cluster.env.example launch/cluster.env     # edit: your environment, your network
#   DATA=/path/to/shards TEACHER=runs/delvm_1b TOKENIZER=/path/to/tokenizer \
#       sbatch -p PARTITION -A ACCOUNT launch/delvm_300m_kd.sh
#
# TEACHER is a run or model folder; LOGITS, a folder of python -m lvm.distil, stands in for it.
# TOKENIZER is the one of the data; its codebook is the embedding. In a container these folders have
# to be among MOUNTS.
#
# Other numbers of GPUs: sbatch --nodes=2 launch/delvm_300m_kd.sh; the batch stays 128 rows of 2048.
# Variables: launch/common.sh. The same with checks before it waits: python -m launch submit delvm_300m_kd.

RECIPE=${RECIPE:-delvm_300m_kd}

if [[ -n ${LOGITS:-} ]]; then
    EXTRA="--distil.logits $LOGITS ${EXTRA:-}"
elif [[ -n ${TEACHER:-} ]]; then
    EXTRA="--distil.teacher $TEACHER ${EXTRA:-}"
elif [[ " ${EXTRA:-}" != *" --distil."* ]]; then
    echo "lvm: neither TEACHER nor LOGITS is set; give the folder of a trained teacher, or of its logits" >&2
    exit 2
fi
[[ -z ${TOKENIZER:-} ]] || EXTRA="--codebook $TOKENIZER $EXTRA"

# sbatch runs a copy of this file from a spool folder, so the checkout is where it was submitted from.
common=${LVM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}/launch/common.sh
if [[ ! -f $common ]]; then
    echo "lvm: $common is not there; submit from the checkout, or set LVM_ROOT to it" >&2
    exit 2
fi
# shellcheck source=launch/common.sh
source "$common"
