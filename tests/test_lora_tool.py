"""lora.py: what it says of a LoRA, and that a converted file is the same LoRA."""

import pytest
import torch
from diffusers import CogVideoXPipeline
from peft import LoraConfig
from safetensors.torch import load_file

import lora
from cogvideox.base_model import read_base_model
from cogvideox.lora import Lora, with_lora
from cogvideox.lora_files import NAMINGS, load_lora, lora_file_in, read_lora

TARGETS = ("to_q", "to_out.0", "ff.net.2")


def make_lora(checkpoint, folder, **options):
    transformer, export = with_lora(
        read_base_model(str(checkpoint)), torch.float32, Lora(**{"rank": 4, "lora_alpha": 8} | options)
    )
    generator = torch.Generator().manual_seed(0)
    trained = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
    return export({name: torch.randn(weight.shape, generator=generator) for name, weight in trained.items()}, folder)


@pytest.fixture(scope="module")
def original(tiny_checkpoint, tmp_path_factory):
    return make_lora(tiny_checkpoint, tmp_path_factory.mktemp("original"), lora_target_modules=TARGETS)


def run(*words):
    lora.main(lora.parse_args(list(map(str, words))))


def convert(source, output, naming):
    run("convert", source, output, "--to", naming)
    return lora_file_in(output) or output


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_converted_file_comes_back_as_it_was(naming, original, tmp_path):
    name = "folder" if naming == "peft" else "other.safetensors"
    there = convert(original, tmp_path / name, naming)
    back = convert(there, tmp_path / "back.safetensors", "diffusers")
    before, after = load_file(original), load_file(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert read_lora(there).strengths == read_lora(back).strengths == read_lora(original).strengths
    assert read_lora(there).strength_from
    assert (naming == "diffusers") == (load_file(there).keys() == before.keys())


def test_a_converted_file_has_its_strength_in_plain_diffusers(original, tiny_checkpoint, tmp_path):
    there = convert(original, tmp_path / "kohya.safetensors", "kohya")
    back = convert(there, tmp_path / "back.safetensors", "diffusers")
    pipe = CogVideoXPipeline.from_pretrained(tiny_checkpoint)
    pipe.load_lora_weights(str(back.parent), weight_name=back.name, adapter_name="lora")
    assert pipe.transformer.transformer_blocks[1].ff.net[2].scaling == {"lora": 2.0}


def test_peft_itself_reads_the_folder(original, tmp_path):
    convert(original, tmp_path / "folder", "peft")
    config = LoraConfig.from_pretrained(tmp_path / "folder")
    assert (config.r, config.lora_alpha, sorted(config.target_modules)) == (4, 8, sorted(TARGETS))


def test_inspect_says_rank_strength_layers_and_base_model(original, tiny_checkpoint, capsys):
    run("inspect", original.parent)
    said = capsys.readouterr().out
    for line in ("rank: 4", "strength: 2 (from metadata)", "blocks: 2", f"base model: {tiny_checkpoint}"):
        assert f"{line}\n" in said
    assert "layers: attn1.to_out.0 (2), attn1.to_q (2), ff.net.2 (2)\n" in said


def test_what_another_tool_cannot_hold_is_refused(original, tiny_checkpoint, tmp_path, capsys):
    dora = make_lora(tiny_checkpoint, tmp_path / "dora", lora_target_modules=TARGETS, use_dora=True)
    outside = make_lora(tiny_checkpoint, tmp_path / "outside", lora_target_modules=("proj_out",))
    for words, message in (
        ((dora, tmp_path / "a.safetensors", "--to", "kohya"), "lora_magnitude_vector; use --to diffusers or peft"),
        ((outside, tmp_path / "a.safetensors", "--to", "comfyui"), "has no place for proj_out.lora_A.weight"),
        ((original, tmp_path / "a.bin", "--to", "kohya"), "a.bin: must be a .safetensors file"),
        ((original, original, "--to", "kohya"), "is the file that is read"),
        ((tmp_path, tmp_path / "a.safetensors", "--to", "kohya"), "no LoRA file of that name, nor in it"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("convert", *words)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a.safetensors").exists()
    assert load_lora(convert(dora, tmp_path / "b.safetensors", "diffusers")).keys() == load_lora(dora).keys()
