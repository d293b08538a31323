"""A LoRA of ours in ComfyUI: what its loaders look for in the file, and the strength that they apply it at."""

import json
import re

import pytest
import torch
from conftest import transformer_inputs
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, safe_open, save

from cogvideox.base_model import empty_transformer, read_base_model
from cogvideox.lora import Lora, with_lora
from cogvideox.lora_files import LORA_FILE
from files import publish

# kijai/ComfyUI-CogVideoXWrapper at fdb8abd, model_loading.py: a file with "lora_B" in a key goes to diffusers'
# load_lora_weights, any other is taken for one of another trainer. diffusers then looks for modules of the transformer
# behind the prefix; the wrapper's own transformer (custom_cogvideox_transformer_3d.py) names them as diffusers does.
KEY = re.compile(
    r"transformer\.(?P<module>transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)))"
    r"\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)"
)
ALL_LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
KINDS = {"plain": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


@pytest.fixture
def saved(tmp_path):
    def save(folder, **options):
        """The checkpoint, and the file of a LoRA of random weights."""
        checkpoint = read_base_model(str(folder))
        lora = Lora(**{"rank": 8, "lora_alpha": 4, "lora_target_modules": ALL_LINEAR} | options)
        transformer, export = with_lora(checkpoint, torch.float32, lora, None)
        weights = {name: weight.data for name, weight in transformer.named_parameters() if weight.requires_grad}
        for name, weight in weights.items():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
        return checkpoint, export(weights, tmp_path / "lora")

    return save


def node_loads(folder, file, strength):
    """What the wrapper's loader node does with the file at that strength."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    name = file.name.split(".")[0]
    pipeline.load_lora_weights(str(file), weight_name=file.name, adapter_name=name)
    pipeline.set_adapters([name], adapter_weights=[strength])
    return pipeline.transformer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["2b", "1.5-5B-I2V"])
def test_every_key_of_the_file_is_one_that_the_loader_node_finds(checkpoint_of, saved, variant, kind):
    checkpoint, file = saved(checkpoint_of(variant), **KINDS[kind])
    found, modules = {}, dict(empty_transformer(checkpoint.transformer).named_modules())
    for name, weight in load_file(file).items():
        match = KEY.fullmatch(name)
        assert match, name
        found.setdefault(match["module"], {})[match["part"]] = weight.shape
    targets = tuple(f".{target}" for target in ALL_LINEAR)
    assert found.keys() == {name for name in modules if name.endswith(targets)}
    for name, parts in found.items():
        rank, layer = parts["lora_B.weight"][1], modules[name]
        assert parts["lora_A.weight"] == (rank, layer.in_features)
        assert parts["lora_B.weight"] == (layer.out_features, rank)
        assert ("lora_magnitude_vector" in parts) == (kind == "dora")


@pytest.mark.parametrize("kind", KINDS)
def test_the_loader_node_applies_the_trained_strength_at_1(tiny_checkpoint, saved, kind):
    _, file = saved(tiny_checkpoint, **KINDS[kind])
    plain = DiffusionPipeline.from_pretrained(tiny_checkpoint)
    plain.load_lora_weights(file.parent)
    inputs = transformer_inputs(tiny_checkpoint)
    with torch.no_grad():
        assert torch.equal(node_loads(tiny_checkpoint, file, 1.0)(**inputs)[0], plain.transformer(**inputs)[0])


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_loader_that_ignores_the_metadata_wants_the_strength_that_it_holds(tiny_checkpoint, saved, use_rslora):
    """diffusers before 0.34: as docs/lora.md says, lora_alpha / rank, or lora_alpha / sqrt(rank) of rsLoRA."""
    _, file = saved(tiny_checkpoint, use_rslora=use_rslora)
    with safe_open(file, framework="pt") as weights:
        settings = json.loads(weights.metadata()["lora_adapter_metadata"])
    strength = settings["transformer.lora_alpha"] / settings["transformer.r"] ** (0.5 if use_rslora else 1)
    bare = file.parent / "bare" / LORA_FILE
    publish(bare, save(load_file(file)))
    inputs = transformer_inputs(tiny_checkpoint)
    with torch.no_grad():
        trained = node_loads(tiny_checkpoint, file, 1.0)(**inputs)[0]
        assert torch.allclose(node_loads(tiny_checkpoint, bare, strength)(**inputs)[0], trained, atol=1e-6)
        assert not torch.allclose(node_loads(tiny_checkpoint, bare, 1.0)(**inputs)[0], trained, atol=1e-3)
