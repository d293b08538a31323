"""A base model whose parts are missing, cut off, pointers, or another model's: both scripts say so in time."""

import json
import shutil

import pytest
from conftest import training_options
from safetensors.torch import load_file, save_file

import cli_demo
import train_cogvideox_lora
from cogvideox.base_files import check_files
from cogvideox.base_model import read_base_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9999999\n"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INCOMPLETE = "the base model is not complete"


def missing(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def pointer(path):
    path.write_bytes(POINTER)


def other_class(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "Foreign", "model_type": "clip"}))


def other_weights(path):
    """The names of another model, and whole."""
    weights = load_file(path)
    save_file({f"other.{name}": weight for name, weight in weights.items()}, path)


def other_shape(path):
    weights = load_file(path)
    name = min(name for name, weight in weights.items() if weight.ndim >= 2)
    save_file(weights | {name: weights[name][:-1].contiguous()}, path)


def a_list(path):
    path.write_text("[1]")


def foreign_bytes(path):
    path.write_bytes(bytes(range(256)) * 20)


def only_half_precision(path):
    path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))


def shards_without_one(path):
    names = sorted(load_file(path))
    index = {"metadata": {}, "weight_map": {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}}
    save_file({name: load_file(path)[name] for name in names[::2]}, path.with_name("part-0.safetensors"))
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    path.unlink()


def broken_index(path):
    path.with_name(f"{path.name}.index.json").write_text("{}")


def endless(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": [512]}))


T, V, E = f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"
NOT_WHOLE, NOT_ITS_OWN = "cannot be read as .safetensors", "the weights are not those of its config.json"
CASES = [  # file or folder, what happens to it, parts of the message
    ("model_index.json", missing, "model_index.json"),
    ("model_index.json", truncated, "model_index.json"),
    ("model_index.json", pointer, "model_index.json"),
    ("model_index.json", other_class, "holds a Foreign"),
    ("model_index.json", a_list, "model_index.json"),
    ("transformer", missing, INCOMPLETE),
    ("transformer/config.json", missing, INCOMPLETE),
    ("transformer/config.json", truncated, "not a valid JSON"),
    ("transformer/config.json", pointer, "not a valid JSON"),
    ("transformer/config.json", other_class, "transformer/config.json is of a Foreign"),
    (T, missing, "no weights in transformer/; download"),
    (T, truncated, NOT_WHOLE),
    (T, empty, NOT_WHOLE),
    (T, pointer, "is a pointer of Git LFS"),
    (T, other_weights, NOT_ITS_OWN),
    (T, other_shape, NOT_ITS_OWN),
    (T, only_half_precision, "under their usual name, but diffusion_pytorch_model.fp16.safetensors"),
    (T, shards_without_one, "no part-1.safetensors in transformer/"),
    (T, broken_index, "is no index of weights"),
    ("vae", missing, INCOMPLETE),
    ("vae/config.json", truncated, "not a valid JSON"),
    ("vae/config.json", pointer, "not a valid JSON"),
    ("vae/config.json", other_class, "vae/config.json is of a Foreign"),
    (V, missing, "no weights in vae/"),
    (V, truncated, NOT_WHOLE),
    (V, pointer, "is a pointer of Git LFS"),
    (V, other_weights, NOT_ITS_OWN),
    (V, other_shape, NOT_ITS_OWN),
    ("text_encoder/config.json", missing, INCOMPLETE),
    ("text_encoder/config.json", truncated, "not a valid JSON"),
    ("text_encoder/config.json", other_class, "text_encoder/config.json is of a clip, not of a t5"),
    (E, missing, "no weights in text_encoder/"),
    (E, truncated, NOT_WHOLE),
    (E, pointer, "is a pointer of Git LFS"),
    (E, other_weights, NOT_ITS_OWN),
    (E, other_shape, NOT_ITS_OWN),
    ("tokenizer", missing, "no spiece.model in tokenizer/"),
    ("tokenizer/spiece.model", missing, "no spiece.model in tokenizer/"),
    ("tokenizer/spiece.model", truncated, "is no vocabulary that sentencepiece can read"),
    ("tokenizer/spiece.model", pointer, "is a pointer of Git LFS"),
    ("tokenizer/spiece.model", foreign_bytes, "is no vocabulary that sentencepiece can read"),
    ("tokenizer/tokenizer_config.json", missing, "no tokenizer_config.json in tokenizer/"),
    ("tokenizer/tokenizer_config.json", truncated, "is not valid JSON"),
    ("tokenizer/tokenizer_config.json", endless, "tokenizer of the base model: its config describes no model"),
    ("scheduler", missing, INCOMPLETE),
    ("scheduler/scheduler_config.json", truncated, "not a valid JSON"),
    ("scheduler/scheduler_config.json", pointer, "not a valid JSON"),
    ("scheduler/scheduler_config.json", other_class, "scheduler/scheduler_config.json is of a Foreign"),
]


@pytest.mark.parametrize("place, harm, part", CASES, ids=[f"{place}-{harm.__name__}" for place, harm, _ in CASES])
def test_a_base_model_that_is_not_whole_is_refused_by_both_scripts(
    place, harm, part, tiny_checkpoint, clips, tmp_path, capsys, monkeypatch
):
    for name in ("cli_demo.load_pipeline", "cogvideox.lora.load_transformer", "cogvideox.encoders.loaded_vae"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("cogvideox.encoders.load_tokenizer", lambda *_: pytest.fail("T5 was loaded"))
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    harm(base / place)
    demo = cli_demo.parse_args(["--prompt", "x", "--model_path", str(base), "--output_path", str(tmp_path / "a.mp4")])
    training = train_cogvideox_lora.parse_args(training_options(base, clips, tmp_path / "run"))
    for main, args in ((cli_demo.main, demo), (train_cogvideox_lora.main, training)):
        with pytest.raises(SystemExit) as stop:
            main(args)
        message = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert stop.value.code == 2 and len(message) == 1 and part in message[0]
        assert str(base) in message[0]
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("variant", ["2b", "5b-I2V", "1.5-5B-I2V"])
def test_a_whole_base_model_passes(variant, checkpoint_of):
    check_files(read_base_model(str(checkpoint_of(variant))))


def test_the_small_model_passes():
    check_files(read_base_model("examples/small-cogvideox"))
