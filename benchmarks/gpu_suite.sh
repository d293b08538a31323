#!/usr/bin/env bash
# What a GPU must prove (benchmarks/GPU_TODO.md), in seven parts of at most 9 minutes, what decides most first:
#
#     bash benchmarks/gpu_suite.sh 1|2|3|4|5|6|7|all [--dry] [--tiny]
#
# 1: pytest -m gpu, and the first seconds of 2b, with a profile; 2: seconds and memory of 2b and 5b; 3: against diffusers'
# example (needs VERSUS_REFERENCE=path); 4: against it, ours compiled; 5: preprocessing, and short steps of the other
# models; 6: swapped blocks and quantised ones; 7: the quickstart and the small model.
# --dry prints the commands; --tiny, or GPU_SUITE_MODEL=tiny, takes stand-ins that any CPU can do. Results go to
# GPU_SUITE_RESULTS (default: benchmarks/results, tiny: examples/world/gpu-suite). What fails is written to failures.txt
# there and does not stop the rest. Needs the packages of requirements-dev.txt, and installs nothing. Start it in the
# foreground: what is started in the background ignores the interrupt by which a command over its time is ended.
set -uo pipefail
cd "$(dirname "$0")/.."

part=${1:-} dry="" tiny=""
for word in "${@:2}"; do
  case $word in
    --dry) dry=1 ;;
    --tiny) tiny=1 ;;
    *) part="" ;;
  esac
done
[[ $part =~ ^([1-7]|all)$ ]] || { echo "usage: bash benchmarks/gpu_suite.sh 1|2|3|4|5|6|7|all [--dry] [--tiny]" >&2; exit 2; }
case ${GPU_SUITE_MODEL:-} in
  "") ;;
  tiny) tiny=1 ;;
  *) echo "GPU_SUITE_MODEL=$GPU_SUITE_MODEL: only tiny; leave it out for the real models" >&2; exit 2 ;;
esac

python=${PYTHON:-python}
results=${GPU_SUITE_RESULTS:-${tiny:+examples/world/gpu-suite}}
results=${results:-benchmarks/results}
part_seconds=${GPU_SUITE_PART_SECONDS:-540}
gpu=$("$python" -c 'import re, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
print(re.sub("[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-"))') || exit
[[ $gpu != cpu || $tiny || $dry ]] || { echo "no GPU here; try --tiny or --dry" >&2; exit 2; }
failures="$results/failures.txt"
failed=0

# run NAME SECONDS COMMAND...: within its own limit and that of the part; its output is shown, and kept if it fails.
run() {
  local name=$1 limit=$2 left=$((part_seconds - SECONDS)) log code
  shift 2
  ((limit < left)) || limit=$left
  if [[ $dry ]]; then
    echo "timeout $limit $*"
    return
  fi
  if ((limit < 5)); then
    fail "$name" "not run: the $part_seconds seconds of the part are over"
    return
  fi
  echo "== $name"
  log=$(mktemp)
  timeout -s INT -k 20 "$limit" "$@" 2>&1 | tee "$log" # interrupted, pytest still says what has failed
  code=${PIPESTATUS[0]}
  ((code == 0)) || fail "$name" "exit code $code (124: over $limit s); $(tail -n 3 "$log" | tr '\n' ' ')"
  rm -f "$log"
}

fail() {
  echo "part $number, $1 ($gpu): $2" | tee -a "$failures"
  failed=1
}

# script NAME SECONDS SCRIPT OPTIONS...: of ours; said, not failed, if it is not there yet.
script() {
  local name=$1 limit=$2 file=$3
  shift 3
  if [[ -f $file ]]; then
    run "$name" "$limit" "$python" "$file" "$@"
  else
    echo "skipped $name: there is no $file yet"
  fi
}

# step NAME SECONDS MODEL OPTIONS...
step() {
  local name=$1 limit=$2 model=$3
  shift 3
  if [[ $tiny ]]; then
    [[ $model == *I2V ]] && model=tiny-I2V || model=tiny
  fi
  script "$name" "$limit" benchmarks/step.py --model "$model" --output "$results/$name-$gpu.json" "$@"
}

# versus NAME SECONDS OPTIONS...
versus() {
  local name=$1 limit=$2
  shift 2
  if [[ ! ${VERSUS_REFERENCE:-} ]]; then
    echo "skipped $name: VERSUS_REFERENCE names no reference"
    return
  fi
  script "$name" "$limit" benchmarks/versus.py --reference "$VERSUS_REFERENCE" --output "$results/$name-$gpu.json" "$@"
}

timing=(--steps 8 --warmup 2)
[[ $tiny ]] && timing=(--steps 2 --warmup 1)
short=(--steps 2 --warmup 1 --gradient_checkpointing full)

part_1() {
  run tests 420 "$python" -m pytest -m gpu -v --durations=10
  step 2b-none 60 2b "${timing[@]}" --gradient_checkpointing none --profile 2
  step 2b-full 60 2b "${timing[@]}" --gradient_checkpointing full
}

part_2() {
  local level backend
  step 2b-attention 45 2b "${timing[@]}" --gradient_checkpointing attention
  for level in full attention none; do # none is predicted not to fit on 80 GB
    step "5b-$level" 75 5b "${timing[@]}" --gradient_checkpointing "$level"
  done
  for backend in flash cudnn; do
    [[ $gpu == cpu && $backend == cudnn ]] && continue # it has none
    step "2b-none-$backend" 45 2b "${timing[@]}" --gradient_checkpointing none --attention_backend "$backend"
  done
  step 2b-none-compile 90 2b "${timing[@]}" --gradient_checkpointing none --compile --profile 2
  for level in attention full; do # what the first has compiled is not compiled again, for the most part
    step "2b-$level-compile" 45 2b "${timing[@]}" --gradient_checkpointing "$level" --compile
  done
}

large=(--size 2b --steps 4 --warmup 2 --gate_updates 1 --mixed_precision bf16)
small=(--size overhead)
[[ $tiny ]] && small+=(--steps 2 --warmup 1) large=("${small[@]}" --mixed_precision bf16)

part_3() {
  versus versus 150 "${small[@]}"
  versus versus-2b-recompute 390 "${large[@]}" --gradient_checkpointing
}

part_4() {
  versus versus-2b-compile 540 "${large[@]}" --ours_options --compile
}

part_5() {
  local model=2b
  [[ $tiny ]] && model=tiny
  script preprocess 180 benchmarks/preprocess.py --model "$model" --clips 4 --output "$results/preprocess-$gpu.json"
  script preprocess-channels-last 95 benchmarks/preprocess.py --model "$model" --clips 2 --channels_last \
    --output "$results/preprocess-channels-last-$gpu.json"
  step 5b-I2V-short 70 5b-I2V "${short[@]}"
  step 2b-sft-short 70 2b "${short[@]}" --training_type sft
  step 1.5-short 120 1.5 "${short[@]}"
}

part_6() {
  local model blocks precision
  for model in 2b 5b; do
    blocks=30
    [[ $model == 5b ]] && blocks=42
    [[ $tiny ]] && blocks=2
    step "$model-full-swapped" 75 "$model" "${timing[@]}" --gradient_checkpointing full \
      --blocks_to_swap "$blocks"
  done
  for precision in int8 fp8 nf4; do
    step "5b-full-$precision" 75 5b "${timing[@]}" --gradient_checkpointing full --base_precision "$precision"
  done
  step 1.5-I2V-short 130 1.5-I2V "${short[@]}"
}

part_7() {
  local steps=3000 clips=2400 samples=50 folder=examples/world/pretrained
  local pretrained=(--output_dir "$folder" --results "$folder")
  [[ $tiny ]] && steps=2 clips=16 samples=1
  if [[ $tiny ]]; then
    script example 60 examples/make_example.py --output_dir examples/world
  else
    # begins with removing examples/world
    run quickstart 180 env NO_INSTALL=1 PATH="$(dirname "$(command -v "$python")"):$PATH" bash quickstart.sh
  fi
  script pretrain-vae 150 examples/pretrain.py vae --steps "$steps" "${pretrained[@]}"
  script pretrain-transformer 150 examples/pretrain.py transformer --steps "$steps" --clips "$clips" "${pretrained[@]}"
  script pretrain-measure 60 examples/pretrain.py measure --samples "$samples" "${pretrained[@]}"
}

[[ $dry ]] || mkdir -p "$results"
for number in 1 2 3 4 5 6 7; do
  [[ $part == "$number" || $part == all ]] || continue
  echo "---- part $number, on $gpu"
  if [[ ! $dry && -f $failures ]]; then # those of an earlier run
    sed -i "/^part $number, .* ($gpu): /d" "$failures"
  fi
  SECONDS=0
  "part_$number"
done
((!failed)) || echo "what failed is in $failures"
exit "$failed"
