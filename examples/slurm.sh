#!/usr/bin/env bash
#SBATCH --job-name=cogvideox
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# Trains on several nodes of a SLURM cluster; submit it from the repository's folder, which all nodes must see:
#   DATASET_PATH=/shared/clips OUTPUT_PATH=/shared/lora sbatch examples/slurm.sh --rank 64
# SCRIPT=finetune_sft_multi_gpus.sh trains all weights. A requeued job continues from its last checkpoint.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
. .venv/bin/activate 2> /dev/null || true # otherwise the environment that is active
export SCRIPT="${SCRIPT:-finetune_multi_gpus_1.sh}" OUTPUT_PATH="${OUTPUT_PATH:-cogvideox-$SLURM_JOB_ID}"
export NUM_MACHINES="$SLURM_NNODES" NUM_GPUS="${NUM_GPUS:-${SLURM_GPUS_ON_NODE:-8}}"
MAIN_PROCESS_IP="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MAIN_PROCESS_IP MAIN_PROCESS_PORT="$((20000 + SLURM_JOB_ID % 20000))"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-32}" # srun does not inherit it from sbatch
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0  # the network to use where nodes have several

# Before the time is up, or the node is taken back: the ranks finish their update, write a checkpoint, and the job is
# put back into the queue, where it continues.
srun --kill-on-bad-exit=1 bash -c 'MACHINE_RANK="$SLURM_NODEID" exec bash "$SCRIPT" "$@"' \
  "$SCRIPT" --resume_from_checkpoint auto "$@" &
trap 'scancel --signal=TERM "$SLURM_JOB_ID"; wait $! || true; scontrol requeue "$SLURM_JOB_ID"' TERM
wait $!
