#!/usr/bin/env bash
# Trains a LoRA on one GPU. Variables override the paths: MODEL_PATH=... DATASET_PATH=... bash finetune_single_gpu.sh
# Options of the training script override or extend the rest: bash finetune_single_gpu.sh --num_train_epochs 30
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"

# --quiet: accelerate's traceback would bury the message of the training script.
exec accelerate launch --quiet --config_file "$here/accelerate_config_machine_single.yaml" --num_processes 1 \
  "$here/train_cogvideox_lora.py" \
  --pretrained_model_name_or_path "${MODEL_PATH:-THUDM/CogVideoX-2b}" \
  --instance_data_root "${DATASET_PATH:-$HOME/disney}" \
  ${CACHE_PATH:+--cache_dir "$CACHE_PATH"} --output_dir "${OUTPUT_PATH:-cogvideox-lora-single-gpu}" \
  --height 480 --width 720 --fps 8 --max_num_frames 49 --enable_tiling auto --gradient_checkpointing \
  --mixed_precision bf16 --train_batch_size 1 --num_train_epochs 10 --checkpointing_steps 100 \
  --optimizer AdamW --adam_beta1 0.9 --adam_beta2 0.95 --max_grad_norm 1.0 --seed 3407 \
  "$@"
