#!/usr/bin/env bash
# Trains a LoRA and makes videos with it, offline and without a GPU once the packages are installed: with the real
# scripts, a small CogVideoX that knows coloured shapes learns to show them as a hatched black-and-white film.
set -euo pipefail
cd "$(dirname "$0")"
echo "1/5 packages"
. .ci/environment.sh requirements.txt

world=examples/world
rm -rf "$world"
echo "2/5 clips of a new look, into $world/film"
python examples/make_film.py --output_dir "$world/film"
python dataset.py preview "$world/film" --id_token FILM --height 64 --width 96 --max_num_frames 17 \
  --pretrained_model_name_or_path examples/small-cogvideox --output "$world/preview.html"

# In float32: without AVX-512, a processor takes seconds per clip for bfloat16 convolutions.
echo "3/5 training, with finetune_single_gpu.sh"
MODEL_PATH=examples/small-cogvideox DATASET_PATH="$world/film" OUTPUT_PATH="$world/lora" bash finetune_single_gpu.sh \
  --mixed_precision no --height 64 --width 96 --max_num_frames 17 --rank 16 --learning_rate 4e-3 --train_batch_size 4 \
  --max_train_steps 100 --validation_split 5 --validation_steps 100 --guidance_scale 1.5 \
  --id_token FILM --preserve 5 --preserve_every 8 --ema_decay 0.95 \
  --lora_target_modules to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 --gradient_checkpointing none \
  --validation_prompt "FILM a red circle moves left over a dark ground:::a red circle moves left over a dark ground"

echo "4/5 a video with the LoRA, with cli_demo.py"
python cli_demo.py --model_path examples/small-cogvideox --lora_path "$world/lora" --guidance_scale 1.5 \
  --num_inference_steps 30 --prompt "FILM a blue square moves right over a light ground" \
  --output_path "$world/with-lora.mp4"

echo "5/5 what it has learned, measured on 8 prompts, with and without the word FILM"
python examples/compare.py --samples 8 --lora_path "$world/lora" --output "$world/compare.png"
echo
echo "LoRA              $world/lora"
echo "page of the run   $PWD/$world/lora/report.html"
echo "before and after  $PWD/$world/compare.png"
