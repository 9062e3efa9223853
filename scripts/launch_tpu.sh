#!/usr/bin/env bash
# Trains on all hosts of a TPU VM slice; run it where gcloud is set up:
#   scripts/launch_tpu.sh TPU_NAME ZONE configs/NAME.py --mesh fsdp=-1 --workdir /mnt/shared/NAME
# Every host has the checkout in ~/jaxmp with `pip install -e ".[train,tpu]"` in ~/jaxmp/.venv, and the work
# directory lies on a disk that all have mounted (Filestore, NFS). The same command again resumes. To stop:
#   gcloud compute tpus tpu-vm ssh TPU_NAME --zone ZONE --worker=0 --command 'pkill -TERM -f scripts/train.py'
# Tried: the command on one machine without a TPU, with a stand-in for gcloud. Not tried: gcloud; TPUs.
set -euo pipefail
name=${1:?"which TPU? $0 TPU_NAME ZONE configs/NAME.py ..."}
zone=${2:?"which zone? $0 $1 ZONE configs/NAME.py ..."}
shift 2
command="cd ~/jaxmp && exec .venv/bin/python scripts/train.py$(printf ' %q' "$@")"
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$command"
