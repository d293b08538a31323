"""What --push_to_hub uploads, and a card that the hub takes."""

import json

import pytest
from conftest import training_options
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

import train_cogvideox_lora
from cogvideox.base_model import read_base_model
from cogvideox.lora_files import LORA_FILE
from run import hub


@pytest.mark.parametrize(
    ("variant", "training_type", "parts"),
    [
        ("2b", "lora", ['CogVideoXPipeline.from_pretrained("2b"', 'load_lora_weights("someone/my-run")', "- lora"]),
        ("5b-I2V", "sft", ["CogVideoXImageToVideoPipeline.from_pretrained", 'load_image("image.png")', "transformer="]),
    ],
)
def test_push_to_hub_uploads_the_result_with_a_card_that_loads_it(
    checkpoint_of, tmp_path, train, monkeypatch, variant, training_type, parts
):
    uploads = []
    monkeypatch.setattr(hub, "create_repo", lambda name, **_: type("Url", (), {"repo_id": f"someone/{name}"})())
    monkeypatch.setattr(hub, "upload_folder", lambda **options: uploads.append(options))
    options = {"push_to_hub": True, "hub_token": "secret", "training_type": training_type, "validation_prompt": "a cat"}
    train(checkpoint_of(variant), tmp_path / "my-run", max_train_steps=1, **options)
    assert uploads[0]["repo_id"] == "someone/my-run" and uploads[0]["token"] == "secret"
    result = LORA_FILE if training_type == "lora" else "transformer/config.json"
    video = "validation/step-000001/prompt-00_seed-3407.mp4"
    wanted = [result, video, "README.md", "report.html"]
    assert list(filter_repo_objects(wanted, allow_patterns=uploads[0]["allow_patterns"])) == wanted
    card = (tmp_path / "my-run" / "README.md").read_text()
    assert card.startswith("---\n") and all(part in card for part in parts), card
    assert ModelCard(card).data.to_dict()["widget"] == [{"text": "a cat", "output": {"url": video}}]
    assert f"({video}): a cat" in card and (tmp_path / "my-run" / video).is_file()
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    assert not [p for p in (tmp_path / "my-run").rglob("*") if p.is_file() and b"secret" in p.read_bytes()]


def unreachable(*_, **__):
    raise ConnectionError("no route to the hub, asked for with secret-token".replace("secret-token", "a token"))


def test_a_hub_that_cannot_be_reached_costs_no_training(tiny_checkpoint, tmp_path, train, monkeypatch, capsys):
    monkeypatch.setattr(hub, "create_repo", unreachable)
    options = {"push_to_hub": True, "hub_token": "secret-token", "hub_model_id": "someone/mine", "max_train_steps": 1}
    with pytest.raises(SystemExit) as stop:
        train(tiny_checkpoint, tmp_path / "run", **options)
    said = capsys.readouterr()
    assert stop.value.code == 3 and (tmp_path / "run" / LORA_FILE).is_file()
    assert "the hub cannot be reached (no route to the hub" in said.out and "tried again after training" in said.out
    assert f"hf upload someone/mine {tmp_path}/run . --include {LORA_FILE}" in said.err
    assert "secret-token" not in said.out + said.err
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file() and b"secret-token" in p.read_bytes()]


# ---- the card

APACHE = {"license": "apache-2.0"}


def cogvideox_license(name):
    link = f"https://huggingface.co/{name}/blob/main/LICENSE"
    return {"license": "other", "license_name": "cogvideox-license", "license_link": link}


def card_of(folder, name=None, videos=None, **options):
    """Header and text of the card of a run on the checkpoint in `folder`, as if it had come from the hub by `name`."""
    args = vars(train_cogvideox_lora.parse_args(training_options(folder, "-", "my-run", **options)))
    checkpoint = read_base_model(str(folder))
    checkpoint = checkpoint._replace(name=name) if name else checkpoint
    card = ModelCard(hub.model_card("someone/my-run", checkpoint, args, videos or {}))
    return card.data.to_dict(), card.text


@pytest.mark.parametrize(
    ("variant", "name", "expected"),
    [
        ("2b", "THUDM/CogVideoX-2b", APACHE),
        ("2b", "zai-org/CogVideoX-2b", APACHE),
        ("5b", "THUDM/CogVideoX-5b", cogvideox_license("THUDM/CogVideoX-5b")),
        ("5b-I2V", "THUDM/CogVideoX-5b-I2V", cogvideox_license("THUDM/CogVideoX-5b-I2V")),
        ("1.5-5B", "zai-org/CogVideoX1.5-5B", cogvideox_license("zai-org/CogVideoX1.5-5B")),
        ("1.5-5B-I2V", "THUDM/CogVideoX1.5-5B-I2V", cogvideox_license("THUDM/CogVideoX1.5-5B-I2V")),
        ("2b", "someone/CogVideoX-2b", {}),
    ],
)
@pytest.mark.parametrize(("training_type", "relation"), [("lora", "adapter"), ("sft", "finetune")])
def test_the_card_names_the_base_model_its_licence_and_what_was_made_of_it(
    checkpoint_of, variant, name, expected, training_type, relation
):
    header, text = card_of(checkpoint_of(variant), name, training_type=training_type)
    assert {key: value for key, value in header.items() if key.startswith("license")} == expected
    assert (header["base_model"], header["base_model_relation"]) == (name, relation)
    assert header["pipeline_tag"] == ("image-to-video" if variant.endswith("I2V") else "text-to-video")
    assert ("the training script does not know it" in text) == (not expected)
    assert expected.get("license_link", "") in text


def test_the_card_invents_no_licence_and_no_hub_name_for_a_folder(tiny_checkpoint):
    header, text = card_of(tiny_checkpoint)
    assert not {"license", "base_model", "base_model_relation", "widget", "instance_prompt"} & header.keys()
    assert "the training script does not know it" in text and "<Gallery />" not in text


def test_the_card_names_the_token_that_the_captions_begin_with(tiny_checkpoint):
    header, text = card_of(tiny_checkpoint, id_token="BW_STYLE")
    assert header["instance_prompt"] == "BW_STYLE" and 'prompt="BW_STYLE a prompt"' in text


@pytest.mark.parametrize("prompt", ['"quoted": {a} [link] #1', "two lines\n---\nand a rule", "Käse, 奶酪"])
def test_the_card_shows_the_last_videos_whatever_their_prompts(tiny_checkpoint, tmp_path, prompt):
    for step in (999_999, 1_000_000):  # which sort otherwise as names
        folder = tmp_path / "validation" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        prompts = {"prompt-00_seed-1.mp4": prompt, "prompt-01_seed-1.mp4": "another"}
        (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    header, text = card_of(tiny_checkpoint, videos=hub.last_validation(tmp_path))
    line, path = " ".join(prompt.split()), "validation/step-1000000/prompt-00_seed-1.mp4"
    assert header["widget"][0] == {"text": line, "output": {"url": path}} and len(header["widget"]) == 2
    assert f"- [prompt-00_seed-1.mp4]({path}): {line}\n" in text and "<Gallery />" in text
