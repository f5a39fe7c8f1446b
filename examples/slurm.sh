#!/usr/bin/env bash
# Training under Slurm that continues after its time limit, after preemption, and after the loss of a process.
#
#   sbatch examples/slurm.sh train_ldm.py --config configs/adni/ldm.yaml
#
# Slurm signals this shell five minutes before the time limit; the recipe writes a checkpoint after the current
# step, and the job requeues itself. Preemption (SIGTERM) writes a checkpoint as well, and Slurm requeues the job.
# `scancel` ends it. The launcher restarts all processes up to three times if one of them dies.
#SBATCH --job-name=adni-ldm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%j.log
#SBATCH --signal=B:USR1@300
set -euo pipefail

(($#)) || { echo "usage: sbatch examples/slurm.sh train_ldm.py --config configs/adni/ldm.yaml" >&2; exit 2; }
[[ -d .venv ]] && source .venv/bin/activate
gpus=${SLURM_GPUS_ON_NODE:-1}
export NUM_MACHINES=${SLURM_JOB_NUM_NODES:-1}
export NUM_PROCESSES=$((NUM_MACHINES * gpus))
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_ADDRESS
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000)) # another job on the same node has another
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# One launcher per node, each with its own rank; the command is the same for the first and any later start.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file configs/accelerate/multi_node.yaml \
    --num_machines "$NUM_MACHINES" --num_processes "$NUM_PROCESSES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" --max_restarts 3 \
    "$@" --resume_from_checkpoint latest' launch "$@" &
step=$!

time_is_up=
trap 'time_is_up=1; kill -TERM "$step"' USR1
trap 'kill -TERM "$step"' TERM
status=0
while kill -0 "$step" 2> /dev/null; do # a signal interrupts wait
    wait "$step" && status=0 || status=$?
done

if [[ -n $time_is_up && $status -ne 0 ]]; then
    echo "time limit: the job requeues itself and continues from its last checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
