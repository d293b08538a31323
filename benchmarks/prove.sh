#!/usr/bin/env bash
# Proves on a GPU what benchmarks/GPU_TODO.md lists, in seven parts of at most 9 minutes, most decisive first:
#
#     bash benchmarks/prove.sh [1-7 ...] [--dry] [--tiny]      # without a number: all parts
#
# 1: pytest -m gpu, and the first seconds of 2b, with a profile; 2: seconds and memory of 2b and 5b; 3: against diffusers'
# example (needs VERSUS_REFERENCE=path); 4: against it, ours compiled; 5: preprocessing, and short steps of the other
# models; 6: swapped blocks and quantised ones; 7: the quickstart and the small model.
#
# After each run, what became of it is written to benchmarks/results/prove-<gpu>.json, the one file for a pull request.
# Ctrl-C stops; the same command continues. A run that has passed on this GPU, with this commit, driver and versions, is
# not repeated, nor is one that does not fit into its memory, as predicted; one that failed is. A table ends it. Exit
# code 0: nothing has failed; 1: a run failed, or its part had no time left for it; 2: refused, or no GPU; 130: stopped.
#
# --dry prints the commands; --tiny, or PROVE_MODEL=tiny, takes stand-ins that any CPU can do. PROVE_RESULTS is the folder
# of the file (default: benchmarks/results, tiny: examples/world/prove). Needs the packages of requirements-dev.txt, and
# 5b-full-nf4, which is skipped without it, bitsandbytes (pip install bitsandbytes). Installs nothing.
set -uo pipefail

# absolute PATH: an empty one stays empty.
absolute() {
  [[ -z $1 || $1 == /* ]] && echo "$1" || echo "$PWD/$1"
}

python=${PYTHON:-python}
[[ $python != */* ]] || python=$(absolute "$python") # otherwise found in PATH
reference=$(absolute "${VERSUS_REFERENCE:-}")
results=$(absolute "${PROVE_RESULTS:-}")
cd "$(dirname "$0")/.." || exit 2

parts="" dry="" tiny=""
for word; do
  case $word in
    [1-7]) parts+=$word ;;
    --dry) dry=1 ;;
    --tiny) tiny=1 ;;
    -h | --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' benchmarks/prove.sh; exit ;;
    *) echo "usage: bash benchmarks/prove.sh [1-7 ...] [--dry] [--tiny]" >&2; exit 2 ;;
  esac
done
parts=${parts:-1234567}
case ${PROVE_MODEL:-} in
  "") ;;
  tiny) tiny=1 ;;
  *) echo "PROVE_MODEL=$PROVE_MODEL: only tiny; leave it out for the real models" >&2; exit 2 ;;
esac

results=${results:-${tiny:+examples/world/prove}}
results=${results:-benchmarks/results}
scratch=$results/.prove # what the runs write; git ignores it
part_seconds=${PROVE_PART_SECONDS:-540}
gpu=$("$python" -c 'import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")') || exit
[[ $gpu != cpu || $tiny || $dry ]] || { echo "no GPU here; try --tiny or --dry" >&2; exit 2; }
file=$(sed -E 's/^nvidia //; s/[^a-z0-9]+/-/g; s/^-|-$//g' <<< "${gpu,,}")
file=$results/${tiny:+tiny-}prove-$file.json
slow=3 # what the limits of other GPUs are multiplied by: an A100 has a third of an H100's TFLOPS, an RTX 4090 a sixth
[[ $gpu =~ H[12]00|B[23]00 ]] && slow=1
mode=list all=() seconds=(0 0 0 0 0 0 0 0) left=(0 0 0 0 0 0 0 0) failed=0

# run NAME SECONDS COMMAND...: within its own limit and that of the part; what it writes to $scratch/NAME.json is recorded.
# SECONDS are for an H100; on another GPU, it begins if so many are left in the part, and may take `slow` times as many.
run() {
  local name=$1 limit=$2 remaining
  shift 2
  if [[ $mode == list ]]; then
    all+=("$name")
    [[ " $finished " != *" $name "* ]] || return 0
    seconds[number]=$((seconds[number] + slow * limit)) left[number]=$((left[number] + 1))
    ((seconds[number] < part_seconds)) || seconds[number]=$part_seconds
    return
  fi
  if [[ $mode == dry ]]; then
    echo "timeout $((slow * limit))$(printf ' %q' "$@")"
    return
  fi
  if [[ " $finished " == *" $name "* ]]; then
    echo "== $name is done already"
    return
  fi
  remaining=$((part_seconds - SECONDS))
  if ((remaining < 5 || remaining + 5 < limit)); then
    echo "== $name: not run, the $part_seconds seconds of the part are over; the same command continues"
    failed=1
    return
  fi
  limit=$((slow * limit < remaining ? slow * limit : remaining))
  echo "== $name"
  "$python" benchmarks/proof.py run --gpu "$gpu" --limit "$limit" --output "$scratch/$name.json" "$file" "$name" "$@"
  case $? in
    0) ;;
    130) stop ;;
    *) failed=1 ;;
  esac
}

stop() {
  echo "stopped; the same command continues"
  finish 130
}

finish() {
  trap '' INT TERM HUP
  "$python" benchmarks/proof.py table "$file" "${all[@]}"
  exit "$1"
}

skip() { # NAME REASON
  if [[ $mode == list ]]; then
    all+=("$1")
  else
    echo "skipped $1: $2"
  fi
}

# step NAME SECONDS MODEL OPTIONS...
step() {
  local name=$1 limit=$2 model=$3
  shift 3
  if [[ $tiny ]]; then
    [[ $model == *I2V ]] && model=tiny-I2V || model=tiny
  fi
  run "$name" "$limit" "$python" benchmarks/step.py --model "$model" --output "$scratch/$name.json" "$@"
}

# versus NAME SECONDS OPTIONS...
versus() {
  local name=$1 limit=$2
  shift 2
  if [[ $reference ]]; then
    set -- --reference "$reference" --output "$scratch/$name.json" "$@"
    run "$name" "$limit" "$python" benchmarks/versus.py "$@"
  else
    skip "$name" "VERSUS_REFERENCE names no reference"
  fi
}

timing=(--steps 8 --warmup 2 --max_seconds 20)
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
  for level in full attention none; do # none needs 70 GiB, as predicted
    step "5b-$level" 75 5b "${timing[@]}" --gradient_checkpointing "$level"
  done
  for backend in flash cudnn; do
    [[ $tiny && $gpu == cpu && $backend == cudnn ]] && continue # it has none
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
  run preprocess 180 "$python" benchmarks/preprocess.py --model "$model" --clips 4 --output "$scratch/preprocess.json"
  run preprocess-channels-last 95 "$python" benchmarks/preprocess.py --model "$model" --clips 2 --channels_last \
    --output "$scratch/preprocess-channels-last.json"
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
    if [[ $precision == nf4 && $mode != dry ]] && ! "$python" -c 'import bitsandbytes' &> /dev/null; then
      skip 5b-full-nf4 "needs bitsandbytes; pip install bitsandbytes"
      continue
    fi
    step "5b-full-$precision" 75 5b "${timing[@]}" --gradient_checkpointing full --base_precision "$precision"
  done
  step 1.5-I2V-short 130 1.5-I2V "${short[@]}"
}

part_7() {
  local steps=3000 clips=2400 samples=50
  local pretrained=(--output_dir "$scratch/pretrained" --results "$scratch")
  [[ $tiny ]] && steps=2 clips=16 samples=1
  if [[ $tiny ]]; then
    run example 60 "$python" examples/make_example.py --output_dir examples/world
  else
    run quickstart 180 env NO_INSTALL=1 bash quickstart.sh # begins with removing examples/world
  fi
  pretrain() { # STAGE SECONDS OPTIONS...
    run "small-cogvideox-$1" "$2" "$python" examples/pretrain.py "$1" "${@:3}" "${pretrained[@]}"
  }
  pretrain vae 150 --steps "$steps"
  pretrain transformer 150 --steps "$steps" --clips "$clips"
  pretrain measure 60 --samples "$samples"
}

each_part() {
  for number in 1 2 3 4 5 6 7; do
    [[ $mode == list || $parts == *$number* ]] || continue
    [[ $mode == list ]] || echo "---- part $number, on $gpu"
    SECONDS=0
    "part_$number"
  done
}

if [[ $dry ]]; then
  mode=dry
  each_part
  exit
fi
PATH=$(dirname "$(command -v "$python")"):$PATH # for quickstart.sh
mkdir -p "$scratch" || exit 2
finished=$("$python" benchmarks/proof.py done "$file" | tr '\n' ' ') || exit 2
each_part
for number in 1 2 3 4 5 6 7; do
  [[ $parts == *$number* ]] || continue
  echo "part $number: ${left[number]} runs to do, at most $(((seconds[number] + 59) / 60)) minutes"
done
trap stop INT TERM HUP
mode=run
each_part
finish "$failed"
