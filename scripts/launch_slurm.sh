#!/usr/bin/env bash
# Trains on a SLURM cluster, one process for each GPU:
#   sbatch --nodes 2 scripts/launch_slurm.sh configs/NAME.py --mesh data=-1 --workdir /shared/runs/NAME
# Options of sbatch stand before the script and win over the lines below; more settings of the run behind it.
# The work directory must be on a disk that all nodes share. PYTHON is the interpreter (.venv/bin/python).
# Two minutes before its time ends, and when it is preempted, the run saves and is queued again to go on.
# Tried: two processes on CPUs, with stand-ins for srun and scontrol. Not tried: a real SLURM; GPUs.
#SBATCH --job-name=jaxmp
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

code=0
# Processes end each other by themselves; one that SLURM killed would hide the exit code 75.
srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" scripts/train.py "$@" || code=$?
if [[ $code == 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
