#!/usr/bin/env bash
# From nothing to a LoRA and a video made with it, offline and without a GPU once the packages are installed: six small
# clips, a tiny CogVideoX of random weights, the real training script. It shows that everything works on this machine;
# what it paints is noise, since the tiny model has never seen anything.
set -euo pipefail
cd "$(dirname "$0")"
echo "1/4 packages"
. .ci/environment.sh requirements.txt

world=examples/world
rm -rf "$world"
echo "2/4 clips and a tiny model, into $world"
python examples/make_example.py --output_dir "$world"

echo "3/4 training, by finetune_single_gpu.sh"
MODEL_PATH="$world/tiny-cogvideox" DATASET_PATH="$world/clips" OUTPUT_PATH="$world/lora" bash finetune_single_gpu.sh \
  --height 64 --width 96 --max_num_frames 9 --rank 8 --learning_rate 1e-3 --num_train_epochs 4 --checkpointing_steps 12 \
  --validation_prompt "a red circle moves left:::a blue square moves up" --validation_epochs 2

echo "4/4 a video with the LoRA, by cli_demo.py"
python cli_demo.py --model_path "$world/tiny-cogvideox" --lora_path "$world/lora" \
  --prompt "a red circle moves left" --num_inference_steps 20 --output_path "$world/video.mp4"
echo
echo "The LoRA lies in     $world/lora"
echo "its validation in    $world/lora/validation"
echo "and the video is     $PWD/$world/video.mp4"
