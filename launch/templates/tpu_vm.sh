#!/bin/bash
# One training on all hosts of a TPU VM (a slice that gcloud made): every host runs the same command, jax finds the others.
#
#   export TPU=my-slice ZONE=us-east5-a SOURCE=ADDRESS_OF_THE_GIT_REPOSITORY
#   bash launch/templates/tpu_vm.sh install     # once: clone, .venv, jax for TPU, on every host
#   bash launch/templates/tpu_vm.sh train       # in the foreground; the same again goes on from the last checkpoint
#   bash launch/templates/tpu_vm.sh stop        # from another terminal: SIGTERM to all, which save and end
#
# RUNS is a folder that all hosts share (a mounted bucket or Filestore): checkpoints are written by all of them.
set -euo pipefail
TPU=${TPU:?the name of the TPU VM}
ZONE=${ZONE:?its zone}
SOURCE=${SOURCE:-}
FOLDER=${FOLDER:-moe_jax}
RUNS=${RUNS:-/mnt/runs}
NAME=${NAME:-one}
PRESET=${PRESET:-small}
DATA=${DATA:-wiki}
STEPS=${STEPS:-10000}
MESH=${MESH:-} # such as data=4,expert=8; empty: data over all devices

on_all() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
  install)
    : "${SOURCE:?the address of the git repository}"
    on_all "test -d $FOLDER || git clone $SOURCE $FOLDER; cd $FOLDER && python3 -m venv .venv && .venv/bin/pip install --quiet --editable '.[tpu]'"
    ;;
  train)
    on_all "cd $FOLDER && MOE_JAX_CACHE=$RUNS/cache .venv/bin/python -m launch.train --preset=$PRESET --data=$DATA --steps=$STEPS \
      --mesh=$MESH --workdir=$RUNS/$NAME --connect_timeout=120"
    ;;
  stop)
    on_all "pkill -TERM --full '[l]aunch.train.*--workdir=$RUNS/$NAME' || true"
    ;;
  *)
    echo "usage: TPU=NAME ZONE=ZONE bash $0 install|train|stop" >&2
    exit 2
    ;;
esac
