"""lora.py: what it says of a LoRA, and that what it writes is what it should be."""

import json

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

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
        ((tmp_path, tmp_path / "a.safetensors", "--to", "kohya"), "no pytorch_lora_weights.safetensors; give"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("convert", *words)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a.safetensors").exists()
    assert load_lora(convert(dora, tmp_path / "b.safetensors", "diffusers")).keys() == load_lora(dora).keys()


# ---- merge, resize, extract, compare


def refusal(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def updates_of(file):
    """The update of each layer, [out, in], computed from the file's matrices and strengths."""
    header, weights = read_lora(file), load_lora(file)
    return {
        layer: strength
        * weights[f"{layer}.lora_B.weight"].double().flatten(1)
        @ weights[f"{layer}.lora_A.weight"].double().flatten(1)
        for layer, strength in header.strengths.items()
    }


@pytest.fixture(scope="module")
def second(tiny_checkpoint, tmp_path_factory):
    """A LoRA of another rank, on other layers, one of them a convolution."""
    targets = ("to_v", "ff.net.2", "patch_embed.proj")
    transformer = CogVideoXTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer")
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(1)
    weights = {
        f"transformer.{name.replace('.default', '')}": torch.randn(weight.shape, generator=generator)
        for name, weight in transformer.named_parameters()
        if "lora_" in name
    }
    file = tmp_path_factory.mktemp("second") / "second.safetensors"
    settings = {"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.target_modules": list(targets)}
    save_file(weights, file, {"lora_adapter_metadata": json.dumps(settings)})
    return file


@pytest.mark.parametrize("dora", [False, True])
def test_merge_equals_fuse_lora_of_diffusers(dora, original, second, tiny_checkpoint, tmp_path):
    if dora:
        original = make_lora(tiny_checkpoint, tmp_path / "dora", lora_target_modules=TARGETS, use_dora=True)
    folder = tmp_path / "merged"
    run("merge", original, second, "--lora_scale", 0.5, 2, "--base", tiny_checkpoint, "--output", folder)
    pipe = CogVideoXPipeline.from_pretrained(tiny_checkpoint)
    for name, file in (("a", original), ("b", second)):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, 2])
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    merged = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer").state_dict()
    expected = pipe.transformer.state_dict()
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in expected)


def test_merge_saves_in_the_base_models_precision_or_the_one_asked_for(original, tiny_checkpoint, tmp_path):
    for words, dtype in (([], torch.float32), (["--save_precision", "bf16"], torch.bfloat16)):
        run("merge", original, "--base", tiny_checkpoint, "--output", tmp_path / "merged", *words)
        (file,) = (tmp_path / "merged" / "transformer").glob("*.safetensors")
        assert {weight.dtype for weight in load_file(file).values()} == {dtype}


def test_merge_refuses_what_does_not_go_together(original, tiny_checkpoint, checkpoint_of, tmp_path, capsys):
    base = ["--base", tiny_checkpoint, "--output"]
    for words, message in (
        ([original, "--base", checkpoint_of("5b"), "--output", tmp_path / "a"], "trained on another base model"),
        ([original, *base, tmp_path / "a", "--lora_scale", 1, 2], "--lora_scale 1 2: 2 scales for 1 LoRAs"),
        ([original, *base, tiny_checkpoint], "is a base model, whose transformer would be lost"),
        ([original, "--base", tmp_path / "no", "--output", tmp_path / "a"], "found no model_index.json"),
    ):
        assert message in refusal(capsys, "merge", *words)
    assert not (tmp_path / "a").exists()


def test_resize_to_the_full_rank_is_the_same_lora(second, tmp_path, capsys):
    run("resize", second, tmp_path / "full.safetensors", "--rank", 3)
    assert "rank 3 -> 3: keeps 100.00% of the energy" in capsys.readouterr().out
    before, after = updates_of(second), updates_of(tmp_path / "full.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[layer], after[layer], atol=1e-5) for layer in before)


def test_resize_to_half_the_rank_is_the_best_by_svd(original, tmp_path, capsys):
    """Computed here from the SVD of each whole update; the printed energy as well."""
    run("resize", original, tmp_path / "half.safetensors", "--rank", 2)
    half, kept, whole = updates_of(tmp_path / "half.safetensors"), 0, 0
    for layer, update in updates_of(original).items():
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        assert torch.allclose(half[layer], (u[:, :2] * s[:2]) @ vh[:2], atol=1e-4)
        kept, whole = kept + s[:2].square().sum(), whole + s.square().sum()
    assert f"rank 4 -> 2: keeps {kept / whole:.2%} of the energy" in capsys.readouterr().out
    assert set(read_lora(tmp_path / "half.safetensors").ranks.values()) == {2}


def test_resize_refuses_a_larger_rank_and_a_dora(original, tiny_checkpoint, tmp_path, capsys):
    assert "has rank 4; a larger one adds nothing" in refusal(
        capsys, "resize", original, tmp_path / "a.safetensors", "--rank", 5
    )
    dora = make_lora(tiny_checkpoint, tmp_path / "dora", lora_target_modules=TARGETS, use_dora=True)
    assert "as a DoRA or a LoRA with biases does" in refusal(
        capsys, "resize", dora, tmp_path / "a.safetensors", "--rank", 2
    )


def test_extract_of_a_merge_gives_the_lora_back(second, tiny_checkpoint, tmp_path, capsys):
    run("merge", second, "--base", tiny_checkpoint, "--output", tmp_path / "merged")
    run("extract", tmp_path / "merged", tiny_checkpoint, tmp_path / "back.safetensors", "--rank", 3)
    said = capsys.readouterr().out
    assert "-> 3: keeps 100.00% of the energy" in said and "not in the LoRA" not in said
    before, after = updates_of(second), updates_of(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[layer], after[layer], atol=1e-4) for layer in before)
    assert read_lora(tmp_path / "back.safetensors").base_model == str(tiny_checkpoint)


def test_extract_names_what_a_lora_cannot_hold_and_refuses_what_does_not_differ(
    tiny_checkpoint, checkpoint_of, tmp_path, capsys
):
    tuned = CogVideoXTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer")
    with torch.no_grad():
        tuned.proj_out.weight += 1
        tuned.proj_out.bias += 1
    tuned.save_pretrained(tmp_path / "tuned" / "transformer")
    run("extract", tmp_path / "tuned", tiny_checkpoint, tmp_path / "a.safetensors", "--rank", 1)
    assert "which holds no biases and norms: 1 tensors, such as proj_out.bias\n" in capsys.readouterr().out
    for tuned, message in (
        (tiny_checkpoint, "there is no LoRA to extract"),
        (checkpoint_of("1.5-5B"), "of another kind than"),
        (tmp_path, "no transformer/ in it"),
    ):
        words = "extract", tuned, tiny_checkpoint, tmp_path / "b.safetensors", "--rank", 1
        assert message in refusal(capsys, *words)
    assert not (tmp_path / "b.safetensors").exists()


def test_compare_says_what_is_the_same_and_the_cosines_of_the_updates(original, second, tmp_path, capsys):
    """Computed here once more from the whole updates."""
    run("compare", original, original)
    said = capsys.readouterr().out.splitlines()
    assert "rank: 4 in both" in said and "strength: 2 in both" in said
    assert [line.split()[-1] for line in said if line.startswith(("block", "all"))] == ["1.000"] * 3
    run("compare", original, second)
    said = capsys.readouterr().out.splitlines()
    assert "rank: 4 in the first, 3 in the second" in said
    one, two = updates_of(original), updates_of(second)
    first, last = (sum(update.square().sum() for update in updates.values()).sqrt() for updates in (one, two))
    cosine = sum((one[layer] * two[layer]).sum() for layer in one.keys() & two.keys()) / (first * last)
    assert said[-1].split() == ["all", f"{first:.4g}", f"{last:.4g}", f"{cosine:.3f}"]
    assert said[-2].startswith("outside the blocks           0 ")
