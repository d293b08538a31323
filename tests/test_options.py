"""The options that scripts and people rely on, and the three ways in."""

import os
import shlex
import subprocess

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, training_options
from diffusers import CogVideoXTransformer3DModel

import cli_demo
import train_cogvideox_lora
from pages import preview
from run import validation

# As users have it in their scripts.
REFERENCE = """
  --pretrained_model_name_or_path THUDM/CogVideoX-2b --cache_dir ~/.cache --enable_tiling --enable_slicing
  --instance_data_root ~/disney/ --caption_column prompts.txt --video_column videos.txt
  --validation_prompt "Mickey with the captain and friends:::Mickey and the bear" --validation_prompt_separator :::
  --num_validation_videos 1 --validation_epochs 2 --seed 3407 --rank 128 --mixed_precision bf16
  --output_dir cogvideox-lora-single-gpu --height 480 --width 720 --fps 8 --max_num_frames 49
  --skip_frames_start 0 --skip_frames_end 0 --train_batch_size 1 --num_train_epochs 10 --checkpointing_steps 500
  --gradient_accumulation_steps 1 --learning_rate 1e-4 --optimizer AdamW --adam_beta1 0.9 --adam_beta2 0.95
"""

OPTIONS = """
  pretrained_model_name_or_path revision variant cache_dir instance_data_root dataset_name caption_column video_column
  image_column mask_column mask_floor mask_preserve
  validation_images training_type lora_path lora_dropout use_dora use_rslora init_lora_weights
  ddp_timeout base_precision text_encoder_precision text_encoder_device
  id_token height width fps max_num_frames skip_frames_start skip_frames_end video_reshape_mode random_flip
  video_decoder allow_damaged check_all encode_only buckets clip_mode clips_per_video frame_sampling drop_unfit
  caption_prefix caption_suffix caption_dropout image_share max_tokens_per_batch bucket_group
  timestep_sampling loraplus_lr_ratio stop_patience result
  preserve preserve_every preserve_prompt drift_prompt self_check regularization_data_root prior_loss_weight
  latents_cache_dir dataloader_num_workers enable_tiling enable_slicing rank lora_alpha lora_target_modules seed
  mixed_precision train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps gradient_checkpointing
  allow_tf32 optimizer use_8bit_adam learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power
  adam_beta1 adam_beta2 adam_weight_decay adam_epsilon prodigy_beta3 prodigy_decouple prodigy_use_bias_correction
  prodigy_safeguard_warmup max_grad_norm validation_prompt validation_prompt_separator num_validation_videos
  validation_epochs validation_steps guidance_scale use_dynamic_cfg output_dir checkpointing_steps
  checkpoints_total_limit resume_from_checkpoint logging_steps report_to tracker_name logging_dir push_to_hub
  hub_model_id hub_token validation_split validate_first ema_decay compile attention_backend
  blocks_to_swap dry_run dry_run_gib allow_oversubscription max_skipped_updates save_minutes change
  save_precision lora_for_other_base
"""

TRAIN = train_cogvideox_lora.parse_args


def parse(*options, **changes):
    return train_cogvideox_lora.parse_args([*training_options("model", "data", "run", **changes), *options])


def test_the_reference_command_means_what_it_meant(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    args = train_cogvideox_lora.parse_args(shlex.split(REFERENCE))
    assert str(*args.instance_data_root) == "/home/someone/disney" and str(args.cache_dir) == "/home/someone/.cache"
    assert args.optimizer == "adamw" and args.lora_alpha == args.rank == 128
    assert validation.prompts(args) == ["Mickey with the captain and friends", "Mickey and the bear"]


def test_prodigy_gets_the_learning_rate_that_it_is_made_for():
    line = ["--pretrained_model_name_or_path", "m", "--instance_data_root", "d"]
    assert train_cogvideox_lora.parse_args(line).learning_rate == 1e-4
    assert train_cogvideox_lora.parse_args([*line, "--optimizer", "prodigy"]).learning_rate == 1.0


def test_the_options_are_these():
    assert sorted(vars(parse())) == sorted(OPTIONS.split())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("--height 100", ["--height 100", "divisible by 16", "nearest is 96"]),
        ("--width 90", ["--width 90", "divisible by 16", "nearest is 96"]),
        ("--max_num_frames 50", ["--max_num_frames 50", "4k + 1", "nearest is 49"]),
        ("--max_num_frames 0", ["--max_num_frames", "at least 1"]),
        ("--rank 0", ["--rank", "0: must be a whole number of at least 1"]),
        ("--rank four", ["--rank", "four"]),
        ("--lora_alpha 0", ["--lora_alpha 0.0: must be above 0"]),
        ("--learning_rate -1", ["--learning_rate -1.0: must be above 0"]),
        ("--skip_frames_start -1", ["--skip_frames_start", "at least 0"]),
        ("--dataset_name someone/clips", ["--dataset_name", "not allowed with", "--instance_data_root"]),
        ("--prodigy_decouple", ["--prodigy_", "--optimizer adamw", "pass --optimizer prodigy"]),
        ("--optimizer prodigy --use_8bit_adam", ["--use_8bit_adam", "--optimizer prodigy"]),
        ("--lr_warmup_steps 10", ["--lr_warmup_steps", "constant_with_warmup"]),
        ("--validation_prompt a:::", ["--validation_prompt 'a:::'", "empty"]),
        ("--validation_prompt a --validation_prompt_separator=", ["--validation_prompt 'a'", "separator is empty"]),
        ("--lora_dropout 1", ["--lora_dropout 1.0", "below 1"]),
        ("--base_precision int4", ["--base_precision", "int8", "nf4"]),
        (
            "--base_precision int8 --use_dora",
            ["--base_precision int8", "--use_dora", "unquantised weights", "one of the two"],
        ),
        ("--base_precision fp8 --init_lora_weights pissa_niter_4", ["--base_precision fp8", "pissa_niter_4", "one of"]),
        ("--base_precision nf4 --init_lora_weights olora", ["--base_precision nf4", "olora", "one of the two"]),
        ("--text_encoder_precision fp8", ["--text_encoder_precision", "int8"]),
        ("--init_lora_weights eva", ["--init_lora_weights", "pissa"]),
        ("--init_lora_weights orthogonal --rank 3", ["--rank 3", "even", "pass 4"]),
        ("--init_lora_weights pissa --lora_path x", ["--init_lora_weights pissa", "--lora_path", "one of the two"]),
        ("--validation_images a.png", ["--validation_images 'a.png'", "more images than prompts"]),
        ("--training_type all", ["--training_type", "sft"]),
        ("--gradient_checkpointing some", ["--gradient_checkpointing", "attention"]),
        ("--gradient_checkpointing attention --attention_backend math", ["--attention_backend", "pass", "full"]),
        ("--compile --attention_backend flash3", ["--compile", "flash3", "leave one"]),
        ("--blocks_to_swap 2", ["--blocks_to_swap 2", "without recomputation", "pass --gradient_checkpointing full"]),
        ("--enable_tiling sometimes", ["--enable_tiling", "auto"]),
        ("--video_reshape_mode none", ["--video_reshape_mode", "center"]),
        ("--height_ 3", ["--height_: unknown option; did you mean --height?"]),
        ("--resume latest", ["--resume: unknown option; did you mean --resume_from_checkpoint?"]),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(capsys, options, parts):
    with pytest.raises(SystemExit) as stop:
        parse(*options.split())
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("parse_args", "line", "message"),
    [
        (TRAIN, "--learning_rte 1", "--learning_rte: unknown option; did you mean --learning_rate?"),
        (TRAIN, "--learning-rate=1", "did you mean --learning_rate?"),
        (TRAIN, "-rank 4", "-rank: unknown option; did you mean --rank?"),
        (TRAIN, "--epochs 4", "did you mean --num_train_epochs or --validation_epochs?"),
        (TRAIN, "--lora_rank 4", "did you mean --rank?"),
        (TRAIN, "--nonsense", "--nonsense: unknown option; --help lists all of them"),
        (TRAIN, "--widht 9 --heigth 9", "did you mean --width? --heigth: unknown option; "),
        (TRAIN, "--instance_data_rot x", "did you mean --instance_data_root?"),
        (preview.parse_args, "clips --max_frames 9", "--max_frames: unknown option; did you mean --max_num_frames?"),
        (cli_demo.parse_args, "--promt cat", "--promt: unknown option; did you mean --prompt?"),
    ],
)
def test_an_unknown_option_names_those_that_are_near(parse_args, line, message, capsys):
    """Also where a required option is missing, which may be the one that is misspelled."""
    with pytest.raises(SystemExit) as stop:
        parse_args(line.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_text_and_negative_numbers_are_no_options():
    args = parse("--id_token", "- BW -", "--validation_split", "0", "--validation_prompt=--look: a cat")
    assert args.id_token == "- BW -" and args.validation_prompt == "--look: a cat"
    assert cli_demo.parse_args(["--prompt", "-- a cat --", "--seed", "-1"]).seed == -1


def test_swapping_is_refused_where_nothing_is_frozen(capsys):
    with pytest.raises(SystemExit):
        parse("--blocks_to_swap", "2", "--gradient_checkpointing", training_type="sft")
    assert "--blocks_to_swap: swaps frozen weights, of which --training_type sft has none" in capsys.readouterr().err


def test_data_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        train_cogvideox_lora.parse_args(["--pretrained_model_name_or_path", "m"])
    assert "one of the arguments --instance_data_root --dataset_name is required" in capsys.readouterr().err


def launched(tmp_path, script, *options, **environment):
    """What a launch script gives to `accelerate launch` and to the training script, parsed by both."""
    fake = tmp_path / "accelerate"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": "/home/some one"} | environment
    result = subprocess.run(
        ["bash", ROOT / script, *options], env=environment, capture_output=True, text=True, check=True
    )
    command, *words = result.stdout.splitlines()
    assert command == "launch"
    launch = launch_command_parser().parse_args(words)
    return launch, train_cogvideox_lora.parse_args(launch.training_script_args)


def test_the_single_gpu_script_starts_one_process_with_its_defaults(tmp_path):
    launch, args = launched(tmp_path, "finetune_single_gpu.sh")
    assert launch.num_processes == 1 and not launch.multi_gpu
    assert launch.config_file == str(ROOT / "accelerate_config_machine_single.yaml")
    assert launch.training_script == str(ROOT / "train_cogvideox_lora.py")
    assert str(*args.instance_data_root) == "/home/some one/disney"
    assert (args.height, args.width, args.max_num_frames, args.rank) == (480, 720, 49, 128)


def test_the_single_gpu_script_trains_all_weights_at_their_own_learning_rate(tmp_path):
    _, args = launched(tmp_path, "finetune_single_gpu.sh", "--training_type", "sft")
    assert args.learning_rate == 1e-5


def test_values_of_the_scripts_can_be_overridden_and_options_added(tmp_path):
    environment = {"MODEL_PATH": "a b/c", "DATASET_PATH": "data set", "OUTPUT_PATH": "out", "CACHE_PATH": "cache"}
    for script in ("finetune_single_gpu.sh", "finetune_multi_gpus_1.sh", "finetune_sft_multi_gpus.sh"):
        rank = [] if "sft" in script else ["--rank", "64"]
        _, args = launched(tmp_path, script, *rank, "--id_token", "BW STYLE", **environment)
        assert args.pretrained_model_name_or_path == "a b/c"
        assert [str(p) for p in (*args.instance_data_root, args.output_dir, args.cache_dir)] == [
            "data set",
            "out",
            "cache",
        ]
        assert args.id_token == "BW STYLE" and (not rank or (args.rank, args.lora_alpha) == (64, 64))


@pytest.mark.parametrize(
    ("script", "config", "training_type", "learning_rate"),
    [
        ("finetune_multi_gpus_1.sh", "accelerate_config_machine_multi.yaml", "lora", 1e-4),
        ("finetune_sft_multi_gpus.sh", "accelerate_config_machine_multi_fsdp.yaml", "sft", 1e-5),
    ],
)
def test_a_multi_gpu_script_is_one_node_of_eight_by_default_and_counts_over_machines(
    tmp_path, script, config, training_type, learning_rate
):
    launch, _ = launched(tmp_path, script)
    assert (launch.num_machines, launch.num_processes, launch.machine_rank) == (1, 8, 0)
    launch, args = launched(
        tmp_path, script, NUM_MACHINES="2", NUM_GPUS="4", MACHINE_RANK="1",
        MAIN_PROCESS_IP="10.0.0.1", MAIN_PROCESS_PORT="29600",
    )  # fmt: skip
    assert (launch.num_machines, launch.num_processes, launch.machine_rank) == (2, 8, 1)
    assert (launch.main_process_ip, launch.main_process_port) == ("10.0.0.1", 29600)
    assert launch.config_file == str(ROOT / config)
    assert (args.training_type, args.learning_rate) == (training_type, learning_rate)
    assert args.gradient_checkpointing == "full"


def test_the_configs_are_accelerate_s(tmp_path):
    from accelerate.commands.config.config_args import ClusterConfig

    single = ClusterConfig.from_yaml_file(ROOT / "accelerate_config_machine_single.yaml")
    multi = ClusterConfig.from_yaml_file(ROOT / "accelerate_config_machine_multi.yaml")
    assert (single.distributed_type, multi.distributed_type) == ("NO", "MULTI_GPU")
    assert single.num_machines == 1 and single.num_processes == multi.num_processes == 8
    sharded = ClusterConfig.from_yaml_file(ROOT / "accelerate_config_machine_multi_fsdp.yaml")
    assert (sharded.distributed_type, sharded.num_processes, sharded.fsdp_config["fsdp_version"]) == ("FSDP", 8, 2)
    block = CogVideoXTransformer3DModel._no_split_modules[0]
    assert sharded.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == block == "CogVideoXBlock"
