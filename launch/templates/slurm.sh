#!/bin/bash
# One training on several hosts under SLURM: one process per host, which finds the others by what srun announces.
#
#   sbatch --nodes=4 launch/templates/slurm.sh              # from the checkout; all hosts must see it and WORKDIR
#   WORKDIR=/scratch/two PRESET=small sbatch --nodes=2 launch/templates/slurm.sh
#
# Five minutes before the time is up every process gets SIGUSR1, saves and ends with 75; the job is then queued again and goes on.
#SBATCH --job-name=moe
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

set -u
PYTHON=${PYTHON:-.venv/bin/python}
WORKDIR=${WORKDIR:-runs/slurm}
PRESET=${PRESET:-small}
DATA=${DATA:-wiki}
STEPS=${STEPS:-10000}
MESH=${MESH:-} # such as data=4,expert=8; empty: data over all devices
MAX_RESTARTS=${MAX_RESTARTS:-3}

# --wait: when one process has ended, the others have 90 s to notice and end; they do within 60.
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=90 \
  "$PYTHON" -m launch.train --preset="$PRESET" --data="$DATA" --steps="$STEPS" --mesh="$MESH" --workdir="$WORKDIR" --connect_timeout=120
code=$?

case $code in
  0 | 2 | 3 | 4) exit $code ;; # done, or an error that would come again: usage, data, checkpoint
  75) echo "stopped and resumable: queued again" ;;
  *)
    restarts=${SLURM_RESTART_COUNT:-0}
    if [ "$restarts" -ge "$MAX_RESTARTS" ]; then exit $code; fi
    echo "exit code $code: restart $((restarts + 1)) of $MAX_RESTARTS"
    ;;
esac
scontrol requeue "$SLURM_JOB_ID"
