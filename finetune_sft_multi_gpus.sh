#!/usr/bin/env bash
# Trains all weights of the transformer, sharded over the GPUs of one or several machines (default: one machine with 8
# GPUs). Run it on every machine, with MACHINE_RANK=0, 1, ... and otherwise the same variables and options; options go
# to the training script.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
NUM_MACHINES="${NUM_MACHINES:-1}" NUM_GPUS="${NUM_GPUS:-8}" # per machine

exec accelerate launch --quiet --config_file "$here/accelerate_config_machine_multi_fsdp.yaml" \
  --num_machines "$NUM_MACHINES" --num_processes "$((NUM_MACHINES * NUM_GPUS))" --machine_rank "${MACHINE_RANK:-0}" \
  --main_process_ip "${MAIN_PROCESS_IP:-127.0.0.1}" --main_process_port "${MAIN_PROCESS_PORT:-29500}" \
  "$here/train_cogvideox_lora.py" --training_type sft \
  --pretrained_model_name_or_path "${MODEL_PATH:-THUDM/CogVideoX-2b}" \
  --instance_data_root "${DATASET_PATH:-$HOME/disney}" \
  ${CACHE_PATH:+--cache_dir "$CACHE_PATH"} --output_dir "${OUTPUT_PATH:-cogvideox-sft-multi-gpus}" \
  --height 480 --width 720 --fps 8 --max_num_frames 49 --enable_tiling auto --gradient_checkpointing \
  --mixed_precision bf16 --train_batch_size 1 --num_train_epochs 10 --checkpointing_steps 100 \
  --checkpoints_total_limit 2 --optimizer AdamW --adam_beta1 0.9 --adam_beta2 0.95 \
  --max_grad_norm 1.0 --seed 3407 \
  "$@"
