"""LoRA files in the namings of other tools: what is read from them, and what is refused before a model loads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import training_options
from safetensors.torch import load_file, safe_open, save_file

import cli_demo
import train_cogvideox_lora
from cogvideox.base_model import empty_transformer, read_base_model
from cogvideox.lora import Lora, with_lora
from cogvideox.lora_files import (
    COMFYUI,
    KOHYA,
    LORA_FILE,
    SAT,
    check_fits,
    find_lora_file,
    load_lora,
    name_in_transformer,
    read_lora,
)

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(TARGETS)}


@pytest.fixture(scope="module")
def original(tiny_checkpoint, tmp_path_factory):
    """A LoRA of ours, of rank 4 and alpha 8, far from zero."""
    transformer, export = with_lora(read_base_model(str(tiny_checkpoint)), torch.float32, Lora(4, 8, TARGETS))
    weights = {name: weight.data for name, weight in transformer.named_parameters() if weight.requires_grad}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    return export(weights, tmp_path_factory.mktemp("original"))


def bare(weights):
    return {name.removeprefix("transformer."): weight for name, weight in weights.items()}


def down_up(name):
    return name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")


def kohya(name):
    layer, _, part = down_up(name).partition(".lora_")
    return f"lora_unet_{layer.replace('.', '_')}.lora_{part}"


def comfyui(name):
    for ours, theirs in COMFYUI.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return f"diffusion_model.{name.replace('transformer_blocks.', 'blocks.')}"


def old_diffusers(name):
    name = name.replace("lora_A", "lora.down").replace("lora_B", "lora.up")
    return "transformer." + name.replace("to_out.0.lora", "to_out_lora").replace(".attn1.", ".attn1.processor.")


def sat(name):
    _, block, rest = name.split(".", 2)
    layer, _, part = rest.partition(".lora_")
    theirs, _, number = next(theirs for theirs, ours in SAT.items() if ours == layer).rpartition(".")
    return f"model.diffusion_model.transformer.layers.{block}.{theirs}.matrix_{part[0]}.{number}"


# name: (the name of a weight in the file, whether its strength is in .alpha; else in the metadata)
NAMINGS = {
    "kohya": (kohya, True),
    "down and up": (lambda name: f"transformer.{down_up(name)}", True),
    "diffusers old": (old_diffusers, False),
    "diffusers new": (lambda name: f"transformer.{name}".replace("lora_A", "lora_linear_layer.down").replace(
        "lora_B", "lora_linear_layer.up"), False),
    "peft": (lambda name: f"base_model.model.{name}", False),
    "adapter name": (lambda name: f"transformer.{name}".replace(".weight", ".default.weight"), False),
    "diffusion_model": (lambda name: f"diffusion_model.{name}", False),
    "comfyui": (comfyui, True),
}  # fmt: skip


def write(file, original, rename, with_alpha):
    """The original under other names; `lora_A` and `lora_B` stand for the parts."""
    weights = {rename(name): weight for name, weight in bare(load_file(original)).items()}
    if with_alpha:
        weights |= {f"{name.split('.lora_')[0]}.alpha": torch.tensor(8.0) for name in weights}
    with safe_open(original, "pt") as content:
        metadata = None if with_alpha else content.metadata()
    save_file({name: weight.clone() for name, weight in weights.items()}, file, metadata)
    return file


def check_same(path, original):
    weights, expected = load_lora(path), bare(load_file(original))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("naming", ["kohya", "comfyui", "diffusers old"])
def test_a_foreign_file_makes_the_video_of_the_original(naming, original, tiny_checkpoint, tmp_path):
    def video(*lora):
        options = ["--prompt", "a red circle", "--num_inference_steps", 2, "--output_path", tmp_path / "out.mp4"]
        cli_demo.main(cli_demo.parse_args([*map(str, [*options, "--model_path", tiny_checkpoint, *lora])]))
        return (tmp_path / "out.mp4").read_bytes()

    expected = video("--lora_path", original)
    assert video("--lora_path", write(tmp_path / "other.safetensors", original, *NAMINGS[naming])) == expected
    assert video() != expected


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_foreign_naming_gives_the_same_weights_and_strength(naming, original, tmp_path):
    file = write(tmp_path / "other.safetensors", original, *NAMINGS[naming])
    header = read_lora(file)
    check_same(file, original)
    assert set(header.strengths.values()) == {2.0}
    assert header.strength_from == (".alpha in the file" if NAMINGS[naming][1] else "metadata")


def test_a_folder_of_peft_has_its_strength_in_the_config_beside(original, tmp_path):
    weights = {f"base_model.model.{name}": weight for name, weight in bare(load_file(original)).items()}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS))
    header = read_lora(tmp_path / "adapter_model.safetensors")
    check_same(tmp_path, original)
    assert (set(header.strengths.values()), header.strength_from) == ({2.0}, "adapter_config.json")


def test_a_file_of_sat_has_its_alpha_of_1_and_says_what_of_the_model_is_not_used(original, tmp_path, capsys):
    weights = {sat(name): weight for name, weight in bare(load_file(original)).items()}
    weights["model.diffusion_model.transformer.word_embeddings.weight"] = torch.zeros(2)
    torch.save({"module": weights}, tmp_path / "mp_rank_00_model_states.pt")
    header = read_lora(tmp_path / "mp_rank_00_model_states.pt")
    check_same(header.file, original)
    assert (set(header.strengths.values()), header.strength_from) == ({0.25}, "alpha 1, SAT's default")
    assert "1 tensors beside the LoRA are not used" in capsys.readouterr().out


def test_a_pickled_file_that_holds_code_is_not_run(tmp_path):
    torch.save({"weight": torch.nn.Linear(1, 1)}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="cannot be read as tensors only"):
        read_lora(tmp_path / "lora.pt")


def test_rank_and_alpha_may_differ_by_layer(original, tmp_path):
    file = write(tmp_path / "other.safetensors", original, kohya, with_alpha=True)
    weights = load_file(file)
    layer = "lora_unet_transformer_blocks_1_attn1_to_q"
    weights[f"{layer}.lora_down.weight"] = weights[f"{layer}.lora_down.weight"][:2].clone()
    weights[f"{layer}.lora_up.weight"] = weights[f"{layer}.lora_up.weight"][:, :2].clone()
    weights[f"{layer}.alpha"] = torch.tensor(1.0)
    save_file(weights, file)
    header = read_lora(file)
    other = "transformer_blocks.1.attn1.to_q"
    assert {name for name, rank in header.ranks.items() if rank == 2} == {other}
    assert header.strengths.pop(other) == 0.5
    assert set(header.strengths.values()) == {0.5, 2.0}


@pytest.mark.parametrize("variant", ["2b", "5b-I2V", "1.5-5B-I2V"])
def test_every_linear_layer_has_a_name_in_kohyas_naming(variant, checkpoint_of):
    transformer = empty_transformer(read_base_model(str(checkpoint_of(variant))).transformer)
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert name_in_transformer(kohya(f"{name}.lora_A.weight")) == f"{name}.lora_A.weight"
    assert len(KOHYA) == 16


def test_blocks_without_a_lora_are_named(tiny_checkpoint, original, tmp_path, capsys):
    weights = {name: weight for name, weight in load_file(original).items() if "blocks.0." in name}
    save_file(weights, tmp_path / "half.safetensors")
    options = ["--prompt", "x", "--output_path", tmp_path / "out.mp4", "--model_path", tiny_checkpoint]
    cli_demo.make_request(cli_demo.parse_args([*map(str, options), "--lora_path", str(tmp_path / "half.safetensors")]))
    assert "has no LoRA in 1 of 2 blocks: 1\n" in capsys.readouterr().out


Q = "transformer.transformer_blocks.0.attn1.to_q."
BROKEN = {  # name: (weights to replace, or None to remove; metadata to replace; part of the message)
    "nan": ({f"{Q}lora_B.weight": torch.full((64, 4), torch.nan)}, {}, "has values that are not finite"),
    "infinity": ({f"{Q}lora_A.weight": torch.full((4, 64), torch.inf)}, {}, "has values that are not finite"),
    "without up": ({f"{Q}lora_B.weight": None}, {}, "to_q has no up (lora_B) matrix"),
    "without down": ({f"{Q}lora_A.weight": None}, {}, "to_q has no down (lora_A) matrix"),
    "ranks differ": ({f"{Q}lora_A.weight": torch.zeros(3, 64)}, {}, "matrices [3, 64] and [64, 4], whose ranks must"),
    "another rank": ({}, {"transformer.r": 8}, "recorded as rank 8, its weights have 4"),
    "alpha is text": ({}, {"transformer.lora_alpha": "8"}, "its lora_alpha is '8'; must be a number above 0"),
    "rank is text": ({}, {"transformer.r": "4"}, "its r is '4'; must be a number above 0"),
    "pattern is a list": ({}, {"transformer.alpha_pattern": [1]}, "its alpha_pattern is [1]; must be a JSON object"),
    "two strengths": ({f"{Q}alpha": torch.tensor(4.0)}, {}, "recorded as alpha 8, "),
    "alpha of no layer": ({"transformer.proj_out.alpha": torch.tensor(4.0)}, {}, "without matrices of that layer"),
    "alpha is a row": ({f"{Q}alpha": torch.ones(4)}, {}, "is [4]; must be one number"),
    "whole numbers": ({f"{Q}lora_A.weight": torch.ones(4, 64, dtype=torch.int8)}, {}, "must be floating point"),
    "down has a bias": ({f"{Q}lora_A.bias": torch.ones(4)}, {}, "belongs to no LoRA of CogVideoX"),
    "another kind": ({f"{Q}lokr_w1": torch.ones(4)}, {}, "lokr_w1, which belongs to no LoRA of CogVideoX"),
    "twice": ({f"base_model.model.{Q[12:]}lora_A.weight": torch.ones(4, 64)}, {}, "save one LoRA per file"),
    "no such block": (
        {f"{Q.replace('.0.', '.99.')}lora_{part}.weight": torch.ones(shape) for part, shape in zip(
            "AB", ((4, 64), (64, 4)), strict=True)}, {}, "transformer_blocks.99.attn1.to_q",
    ),
    "metadata is no json": ({}, "{bad", "its lora_adapter_metadata is not JSON"),
    "metadata is a list": ({}, "[1]", "its lora_adapter_metadata is [1]; must be a JSON object"),
    "metadata is an empty list": ({}, "[]", "its lora_adapter_metadata is []; must be a JSON object"),
}  # fmt: skip


def damage(original, file, changed, metadata):
    weights = {name: weight for name, weight in (load_file(original) | changed).items() if weight is not None}
    with safe_open(original, "pt") as content:
        about = content.metadata()
    recorded = about["lora_adapter_metadata"]
    about["lora_adapter_metadata"] = metadata if type(metadata) is str else json.dumps(json.loads(recorded) | metadata)
    save_file(weights, file, about)
    return file


def refusals(file, checkpoint, clips, capsys, monkeypatch, folder=None):
    """What both scripts say; neither may get to loading weights."""
    monkeypatch.setattr(cli_demo, "load_pipeline", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr("cogvideox.lora.load_transformer", lambda *_: pytest.fail("weights were loaded"))
    folder = folder or file.parent
    options = ["--prompt", "x", "--output_path", folder / "out.mp4", "--model_path", checkpoint]
    demo = cli_demo.parse_args([*map(str, options), "--lora_path", str(file)])
    options = training_options(checkpoint, clips, folder / "run", lora_path=file, lora_alpha=8)
    training = train_cogvideox_lora.parse_args(list(map(str, options)))
    for main, args in ((cli_demo.main, demo), (train_cogvideox_lora.main, training)):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2
        yield capsys.readouterr().err


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_both_scripts(
    case, original, tiny_checkpoint, clips, tmp_path, capsys, monkeypatch
):
    changed, metadata, part = BROKEN[case]
    file = damage(original, tmp_path / "broken.safetensors", changed, metadata)
    for message in refusals(file, tiny_checkpoint, clips, capsys, monkeypatch):
        assert f"--lora_path {file}: " in message and part in message


@pytest.mark.parametrize("size", [0, 1000, -100])
@pytest.mark.parametrize("name", ["lora.safetensors", "lora.bin"])
def test_a_truncated_file_is_refused_by_both_scripts(
    name, size, original, tiny_checkpoint, clips, tmp_path, capsys, monkeypatch
):
    file = tmp_path / name
    if name == "lora.bin":
        torch.save(load_file(original), file)
    file.write_bytes((file if file.exists() else original).read_bytes()[:size])
    for message in refusals(file, tiny_checkpoint, clips, capsys, monkeypatch):
        assert f"--lora_path {file}: cannot be read as" in message


def test_training_starts_from_a_foreign_file(original, tiny_checkpoint, tmp_path, train):
    file = write(tmp_path / "other.safetensors", original, kohya, with_alpha=True)
    still = {"max_train_steps": 1, "learning_rate": 1e-30, "lora_alpha": 8}
    train(tiny_checkpoint, tmp_path / "run", lora_path=file, **still)
    check_same(tmp_path / "run" / LORA_FILE, original)


# ---- where a LoRA is found


def put_in_the_hubs_cache(files, name, tmp_path, monkeypatch):
    """As a download leaves it; {path in the repository: file}."""
    snapshot = tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / ("0" * 40)
    for path, file in files.items():
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, snapshot / path)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_the_one_lora_in_a_folder_is_found_whatever_its_name(original, tmp_path):
    file = tmp_path / "my look.safetensors"
    shutil.copy(original, file)
    (tmp_path / "notes.txt").write_text("x")
    assert find_lora_file(tmp_path) == find_lora_file(file) == file
    shutil.copy(original, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds several files: my look.safetensors, other.safetensors; give one"):
        find_lora_file(tmp_path)
    shutil.copy(original, tmp_path / LORA_FILE)
    assert find_lora_file(tmp_path) == tmp_path / LORA_FILE


HUB = {"someone/one": "look.safetensors", "someone/two/b.safetensors": "b.safetensors", "someone/two/sub": "sub/c.bin"}


@pytest.mark.parametrize("is_online", [False, True])
def test_a_lora_is_named_by_its_repository_or_its_file_there(is_online, original, tmp_path, monkeypatch):
    """Online, with the functions of huggingface_hub that ask the hub replaced."""
    contents = {
        "someone/one": {"look.safetensors": original},
        "someone/two": {"a.safetensors": original, "b.safetensors": original, "sub/c.bin": original},
        "someone/none": {"README.md": original},
    }
    snapshots = {name: put_in_the_hubs_cache(files, name, tmp_path, monkeypatch) for name, files in contents.items()}
    if is_online:
        monkeypatch.setattr("cogvideox.lora_files.reaches_hub", lambda: True)
        monkeypatch.setattr("cogvideox.lora_files.list_repo_files", lambda name: list(contents[name]))
        monkeypatch.setattr("cogvideox.lora_files.hf_hub_download", lambda name, file, **_: snapshots[name] / file)
    for name, file in HUB.items():
        assert find_lora_file(Path(name)) == snapshots["/".join(name.split("/")[:2])] / file
    for name, message in {
        "someone/two": "holds several files: a.safetensors, b.safetensors; give one of them",
        "someone/none": "no LoRA in this repository",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=f"--lora_path {name}: {message}"):
            find_lora_file(Path(name))


@pytest.mark.parametrize(
    "name, reason", [("someone/away", "hub cannot be reached"), ("/no/file", "has the form owner")]
)
def test_what_is_nowhere_is_refused_by_both_scripts(
    name, reason, tiny_checkpoint, clips, tmp_path, capsys, monkeypatch
):
    for message in refusals(Path(name), tiny_checkpoint, clips, capsys, monkeypatch, folder=tmp_path):
        assert f"--lora_path {name}: no such file or folder, nor a LoRA on the hub; check it (" in message
        assert reason in message


def test_training_starts_from_a_lora_on_the_hub(original, tiny_checkpoint, tmp_path, train, monkeypatch):
    put_in_the_hubs_cache({"look.safetensors": original}, "someone/look", tmp_path, monkeypatch)
    still = {"max_train_steps": 1, "learning_rate": 1e-30, "lora_alpha": 8}
    train(tiny_checkpoint, tmp_path / "run", lora_path="someone/look", **still)
    check_same(tmp_path / "run" / LORA_FILE, original)


# ---- whose LoRA it is


def attention_lora(file, num_layers, channels, about=None, outside=()):
    """A LoRA of rank 2 on to_q of each block, and on layers (name, in, out) beside them, as other trainers write it."""
    layers = [(f"transformer_blocks.{i}.attn1.to_q", channels, channels) for i in range(num_layers)] + list(outside)
    weights = {f"transformer.{name}.lora_A.weight": torch.ones(2, inputs) for name, inputs, _ in layers}
    weights |= {f"transformer.{name}.lora_B.weight": torch.ones(outputs, 2) for name, _, outputs in layers}
    save_file(weights, file, about)
    return read_lora(file)


@pytest.fixture(scope="module")
def configs_of(checkpoint_of):
    """Base models with the blocks of the published ones, as configs only."""

    def read(variant):
        base = read_base_model(str(checkpoint_of(variant)))
        sizes = {"num_layers": 30, "num_attention_heads": 30} if variant == "2b" else {}
        sizes = sizes or {"num_layers": 42, "num_attention_heads": 48}
        return base._replace(transformer=base.transformer | sizes | {"attention_head_dim": 64})

    return read


VARIANTS = {  # name: (published name, blocks, channels of a token)
    "2b": ("CogVideoX-2b", 30, 1920),
    "5b": ("CogVideoX-5b", 42, 3072),
    "5b-I2V": ("CogVideoX-5b-I2V", 42, 3072),
    "1.5-5B": ("CogVideoX1.5-5B", 42, 3072),
    "1.5-5B-I2V": ("CogVideoX1.5-5B-I2V", 42, 3072),
}
FAMILY = "CogVideoX-5b, CogVideoX-5b-I2V, CogVideoX1.5-5B, CogVideoX1.5-5B-I2V"


@pytest.mark.parametrize("of", VARIANTS)
@pytest.mark.parametrize("on", VARIANTS)
def test_a_lora_of_another_variant_is_refused_by_name_or_it_is_said_that_it_cannot_be_known(
    of, on, configs_of, tmp_path, capsys
):
    """With the base model's config recorded, its name only, and nothing at all."""
    name, num_layers, channels = VARIANTS[of]
    base, size = configs_of(on), (num_layers, channels)
    identity = {"cogvideox_transformer": json.dumps(configs_of(of).identity)}
    records = {"config": identity | {"base_model": name}, "name": {"base_model": f"THUDM/{name}"}, "nothing": None}
    for record, about in records.items():
        lora = attention_lora(tmp_path / f"{record}.safetensors", *size, about)
        is_alike = channels == VARIANTS[on][2]
        if of == on or (is_alike and record == "nothing"):
            check_fits(lora, base, named_by="here", found="LoRA")
            told = capsys.readouterr().out
            line = (
                f"LoRA: does not record its base model; its shapes fit here, as they would {FAMILY}: it cannot be known"
            )
            assert told == (f"{line}\n" if record == "nothing" and of != "2b" else "")
        else:
            made_for = {"config": name, "name": f"THUDM/{name}"}.get(record, "by its shapes ")
            with pytest.raises(ValueError, match=rf"trained on another base model \({made_for}.* than here: "):
                check_fits(lora, base, named_by="here", found="LoRA")
            if is_alike:
                check_fits(lora, base, named_by="here", found="LoRA", for_other_base=True)


def test_more_blocks_or_another_layer_beside_them_tell_two_models_apart(configs_of, tmp_path):
    longer = attention_lora(tmp_path / "a.safetensors", 43, 3072)
    beside = attention_lora(tmp_path / "b.safetensors", 42, 3072, outside=[("ofs_embedding.linear_1", 512, 512)])
    for lora, part in ((longer, "transformer_blocks.42.attn1.to_q"), (beside, "ofs_embedding.linear_1")):
        with pytest.raises(ValueError, match=f"{part}.*, here no such layer"):
            check_fits(lora, configs_of("5b"), named_by="here", found="LoRA")


def test_a_lora_of_another_base_model_is_taken_where_that_is_asked_for(
    original, checkpoint_of, tmp_path, train, capsys
):
    still = {"max_train_steps": 1, "learning_rate": 1e-30, "lora_alpha": 8, "lora_path": original}
    train(checkpoint_of("5b"), tmp_path / "run", lora_for_other_base=True, **still)
    check_same(tmp_path / "run" / LORA_FILE, original)
    options = ["--prompt", "x", "--output_path", tmp_path / "out.mp4", "--model_path", checkpoint_of("5b")]
    options += ["--lora_path", original]
    cli_demo.make_request(cli_demo.parse_args([*map(str, options), "--lora_for_other_base"]))
    with pytest.raises(ValueError, match="trained on another base model"):
        cli_demo.make_request(cli_demo.parse_args(list(map(str, options))))
