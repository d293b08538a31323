"""Full fine-tuning, and FSDP2 on two CPU ranks, which share weights, gradients and optimizer state between them."""

import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, training_options
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
from make_example import make_clips
from safetensors.torch import load_file
from test_distributed import launch, rows_of, torchrun

from cogvideox import lora
from cogvideox.lora_files import LORA_FILE
from run import processes
from run.run_directory import STATE_FOLDER, list_checkpoints, read_args

SCRIPT = ROOT / "train_cogvideox_lora.py"
RUN = {"max_train_steps": 6, "lr_scheduler": "cosine", "checkpointing_steps": 3, "gradient_accumulation_steps": 2}
OF_TYPE = {
    kind: RUN | {"training_type": kind, "validation_split": 1, "validation_steps": 3} for kind in ("lora", "sft")
}
OF_TYPE["lora"] |= {"ema_decay": 0.5, "id_token": "FILM", "preserve": 1, "preserve_every": 2}
RESULT = {"lora": LORA_FILE, "sft": "transformer/diffusion_pytorch_model.safetensors"}


CONFIG = ROOT / "accelerate_config_machine_multi_fsdp.yaml"


def sharded_run(script, *options, expected=0, config=CONFIG):
    """Two ranks by `accelerate launch`, as finetune_sft_multi_gpus.sh starts them."""
    command = [
        "accelerate.commands.launch", "--config_file", config, "--num_processes", 2, "--main_process_port", 0,
        script, *options,
    ]  # fmt: skip
    environment = {"PYTHONPATH": str(ROOT / "tests" / "fsdp_on_cpu"), "ACCELERATE_TORCH_DEVICE": "cpu"}
    return launch(command, expected, ACCELERATE_USE_CPU="false", **environment)


def result_of(folder, training_type):
    return load_file(folder / RESULT[training_type])


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- one process


@pytest.mark.parametrize("variant", ["2b", "5b-I2V", "1.5-5B-I2V"])
def test_full_fine_tuning_moves_every_weight_and_plain_diffusers_loads_it(
    checkpoint_of, tmp_path, train, monkeypatch, variant
):
    trained = {}
    make = lora.whole

    def keep(*args):
        trained["transformer"], export = make(*args)
        return trained["transformer"], export

    monkeypatch.setattr(lora, "whole", keep)
    folder = checkpoint_of(variant)
    train(
        folder, tmp_path / "run", training_type="sft", max_train_steps=2, learning_rate=1e-3, validation_prompt="a cat"
    )
    base = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        ours = CogVideoXTransformer3DModel.from_pretrained(place / "transformer")
        moved = {name for name, weight in ours.named_parameters() if not torch.equal(weight, base.get_parameter(name))}
        still = {name for name, _ in base.named_parameters()} - moved
        assert still == set(), place
    assert_equal_weights(ours.state_dict(), trained["transformer"].state_dict())
    assert list((tmp_path / "run" / "validation").glob("*/*.mp4"))
    pipeline = DiffusionPipeline.from_pretrained(folder, transformer=ours)
    assert pipeline.transformer is ours


def test_master_weights_are_float32_under_bfloat16_and_the_result_is_bfloat16(tiny_checkpoint, tmp_path, train):
    """A step of 1e-6 would round away in bfloat16, whose neighbours are 0.4 % apart: the master weights keep it."""
    train(
        tiny_checkpoint, tmp_path / "run", training_type="sft", mixed_precision="bf16", max_train_steps=2,
        learning_rate=1e-6,
    )  # fmt: skip
    assert {weight.dtype for weight in result_of(tmp_path / "run", "sft").values()} == {torch.bfloat16}
    base = CogVideoXTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer")
    state = {"transformer": {name: torch.zeros_like(weight) for name, weight in base.state_dict().items()}}
    dcp.load(state, checkpoint_id=tmp_path / "run" / "checkpoint-2" / STATE_FOLDER)
    master, before = state["transformer"], dict(base.named_parameters())
    name = "transformer_blocks.0.attn1.to_q.weight"
    step = (master[name] - before[name]).abs()
    assert 0 < step.max() < 1e-5 and (step > 0).float().mean() > 0.9


def test_a_killed_fine_tuning_that_resumes_equals_a_straight_one(tiny_checkpoint, clips, tmp_path, train):
    options = RUN | {"training_type": "sft", "mixed_precision": "bf16"}
    train(tiny_checkpoint, tmp_path / "straight", **options)
    line = training_options(tiny_checkpoint, clips, tmp_path / "killed", **options)
    script = [sys.executable, ROOT / "tests" / "kill_after_checkpoint.py", "saved", "3"]
    assert subprocess.run([*script, *line], capture_output=True).returncode == -signal.SIGKILL
    train(tiny_checkpoint, tmp_path / "killed", resume_from_checkpoint="latest", **options)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "straight")
    assert_equal_weights(result_of(tmp_path / "straight", "sft"), result_of(tmp_path / "killed", "sft"))


LORA_OPTIONS = {"rank": 128, "lora_alpha": 4, "use_dora": True, "use_rslora": True, "lora_path": "x"}
LORA_OPTIONS |= {"init_lora_weights": "pissa", "lora_dropout": 0.1, "lora_target_modules": ["to_q"], "ema_decay": 0.9}


@pytest.mark.parametrize("option", LORA_OPTIONS)
def test_options_of_a_lora_are_refused_where_none_is_trained(tiny_checkpoint, tmp_path, train, capsys, option):
    with pytest.raises(SystemExit):
        train(tiny_checkpoint, tmp_path / "run", training_type="sft", **{option: LORA_OPTIONS[option]})
    assert f"--{option}: does nothing with --training_type sft" in capsys.readouterr().err


# ---- FSDP2


@pytest.fixture(scope="module", params=["lora", "sft"])
def sharded(request, tiny_checkpoint, clips, tmp_path_factory):
    """A straight run of two ranks with accumulation 2."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    options = OF_TYPE[request.param] | {"validation_prompt": "a cat:::a dog:::a cow"}
    sharded_run(SCRIPT, *training_options(tiny_checkpoint, clips, folder, **options))
    return request.param, folder


def test_two_sharded_ranks_equal_one_process(sharded, tiny_checkpoint, tmp_path, train):
    """Within float32 rounding: the same clips with the same noise, losses, norms, and weights."""
    training_type, folder = sharded
    train(tiny_checkpoint, tmp_path / "one", **OF_TYPE[training_type] | {"gradient_accumulation_steps": 4})
    for ours, theirs in zip(rows_of(folder), rows_of(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    one, two = result_of(tmp_path / "one", training_type), result_of(folder, training_type)
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)
    assert len(list((folder / "validation").glob("step-000006/*.mp4"))) == 3


def test_killed_sharded_ranks_that_resume_equal_a_straight_run(sharded, tiny_checkpoint, clips, tmp_path):
    training_type, straight = sharded
    options = training_options(tiny_checkpoint, clips, tmp_path / "run", **OF_TYPE[training_type])
    sharded_run(ROOT / "tests" / "kill_after_checkpoint.py", "saved", 3, *options, expected=1)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    sharded_run(SCRIPT, *options, "--resume_from_checkpoint", "latest")
    assert rows_of(tmp_path / "run") == rows_of(straight)
    assert_equal_weights(result_of(straight, training_type), result_of(tmp_path / "run", training_type))


def test_one_process_goes_on_where_two_sharded_ranks_were(sharded, tiny_checkpoint, tmp_path, train):
    """And ends where they ended."""
    training_type, straight = sharded
    options = OF_TYPE[training_type] | {"gradient_accumulation_steps": 4}
    train(tiny_checkpoint, tmp_path / "one", resume_from_checkpoint=straight / "checkpoint-3", **options)
    ours, theirs = ([row for row in rows_of(run) if row["step"] > 3] for run in (tmp_path / "one", straight))
    for one, other in zip(ours, theirs, strict=True):
        one.pop("loss_smoothed", None)  # begins anew in another directory
        other.pop("loss_smoothed", None)
        assert one == pytest.approx(other, rel=1e-4)
    one, two = result_of(tmp_path / "one", training_type), result_of(straight, training_type)
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)


def test_two_sharded_ranks_go_on_where_one_process_was(tiny_checkpoint, clips, tmp_path, train):
    options = {"training_type": "sft", "checkpointing_steps": 3, "mixed_precision": "bf16"}
    straight = train(tiny_checkpoint, tmp_path / "a", max_train_steps=6, gradient_accumulation_steps=2, **options)
    train(tiny_checkpoint, tmp_path / "b", max_train_steps=3, gradient_accumulation_steps=2, **options)
    line = training_options(
        tiny_checkpoint, clips, tmp_path / "b", max_train_steps=6, resume_from_checkpoint="latest", **options
    )
    sharded_run(SCRIPT, *line, "--gradient_checkpointing")
    ours = [row["loss"] for row in rows_of(tmp_path / "b")]
    assert ours == pytest.approx([row["loss"] for row in straight], rel=1e-2)  # bfloat16


def test_a_sharded_lora_in_bfloat16_learns_what_one_process_learns(tiny_checkpoint, clips, tmp_path, train):
    """Within bfloat16: FSDP2 computes LayerNorms and the LoRA in it, which autocast of one process does not."""
    options = RUN | {"mixed_precision": "bf16", "gradient_checkpointing": True, "use_dora": True, "learning_rate": 1e-2}
    sharded_run(SCRIPT, *training_options(tiny_checkpoint, clips, tmp_path / "two", **options))
    one = train(tiny_checkpoint, tmp_path / "one", **options | {"gradient_accumulation_steps": 4})
    losses = [row["loss"] for row in rows_of(tmp_path / "two")]
    assert losses == pytest.approx([row["loss"] for row in one], rel=2e-2)
    assert {weight.dtype for weight in result_of(tmp_path / "two", "lora").values()} == {torch.float32}


def test_no_rank_keeps_the_whole_weights_beside_its_shard(tiny_checkpoint, clips, tmp_path):
    options = training_options(tiny_checkpoint, clips, tmp_path / "run", training_type="sft", max_train_steps=1)
    sharded_run(ROOT / "tests" / "weigh.py", tmp_path, *options)
    for rank in range(2):
        whole, shard = map(int, (tmp_path / f"rank-{rank}.txt").read_text().split())
        assert whole == 0 and shard > 100_000


def test_two_ranks_fine_tune_unsharded_and_resume(tiny_checkpoint, clips, tmp_path, train):
    """DDP: each holds all weights, and they write the checkpoint between them."""
    options = RUN | {"training_type": "sft", "max_train_steps": 4, "checkpointing_steps": 2}
    line = training_options(tiny_checkpoint, clips, tmp_path / "two", **options | {"max_train_steps": 2})
    torchrun(SCRIPT, *line)
    line = training_options(tiny_checkpoint, clips, tmp_path / "two", **options, resume_from_checkpoint="latest")
    torchrun(SCRIPT, *line, "--change", "steps")
    train(tiny_checkpoint, tmp_path / "one", **options | {"gradient_accumulation_steps": 4, "lr_scheduler": "cosine"})
    ours, theirs = rows_of(tmp_path / "two"), rows_of(tmp_path / "one")
    assert [row["loss"] for row in ours[:2]] == pytest.approx([row["loss"] for row in theirs[:2]], rel=1e-4)
    assert [row["step"] for row in ours] == [1, 2, 3, 4]


def test_a_sharded_dora_from_pissa_equals_that_of_one_process(tiny_checkpoint, clips, tmp_path, train):
    options = RUN | {"use_dora": True, "init_lora_weights": "pissa", "max_train_steps": 2, "lora_dropout": 0.1}
    sharded_run(SCRIPT, *training_options(tiny_checkpoint, clips, tmp_path / "two", **options))
    train(tiny_checkpoint, tmp_path / "one", **options | {"gradient_accumulation_steps": 4})
    for ours, theirs in zip(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    one, two = result_of(tmp_path / "one", "lora"), result_of(tmp_path / "two", "lora")
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


@pytest.mark.parametrize(
    ("environment", "precision", "message"),
    [
        ({"FSDP_VERSION": "2"}, "fp16", "FSDP with --mixed_precision fp16"),
        ({"FSDP_VERSION": "1"}, "bf16", "FSDP, version 1, in accelerate's config: .* set fsdp_version: 2"),
    ],
)
def test_kinds_of_sharding_that_are_not_supported_are_refused(monkeypatch, environment, precision, message):
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        processes._sharding(precision)


def test_shards_find_the_learning_rate_that_one_process_finds(tiny_checkpoint, clips, tmp_path, train):
    """With regularization clips beside the others, LoRA+ and an average: whatever the trials must put back.

    FSDP2 keeps whole weights between passes here, which would hide what is put back into the shards.
    """
    config = tmp_path / "config.yaml"
    kept = CONFIG.read_text().replace("fsdp_reshard_after_forward: true", "fsdp_reshard_after_forward: false")
    assert "forward: false" in kept
    config.write_text(kept)
    options = {
        "learning_rate": "auto",
        "validation_split": 2,
        "validation_steps": 1,  # with the average, before the second update
        "max_train_steps": 2,
        "gradient_checkpointing": "none",
        "id_token": "FILM",
    }
    others = make_clips(tmp_path / "others", count=3, num_frames=16)
    options |= {"regularization_data_root": others, "loraplus_lr_ratio": 2, "ema_decay": 0.5}
    sharded_run(SCRIPT, *training_options(tiny_checkpoint, clips, tmp_path / "two", **options), config=config)
    rows = train(tiny_checkpoint, tmp_path / "one", gradient_accumulation_steps=2, **options)
    two, one = (read_args(tmp_path / run)["learning_rate_found"] for run in ("two", "one"))
    assert two["learning_rate"] == one["learning_rate"] and two["loss_by_rate"] == pytest.approx(one["loss_by_rate"])
    losses = [row["loss"] for row in rows if "loss" in row]
    assert [row["loss"] for row in rows_of(tmp_path / "two") if "loss" in row] == pytest.approx(losses, rel=1e-5)
