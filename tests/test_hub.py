"""What --push_to_hub uploads, and a card that the hub takes."""

import errno
import http.server
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, training_options
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects

import train_cogvideox_lora
from cogvideox.base_model import read_base_model
from cogvideox.lora_files import LORA_FILE
from files import CannotContinue
from run import hub
from run.signals import Stopped


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


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.fixture
def hub_server(monkeypatch):
    """A hub that answers every request with `code`, and is asked by huggingface_hub's own client."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            server.asked.append(self.path)
            self.send_response(server.code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.code, server.asked = 500, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    api = HfApi(f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr(hub, "create_repo", api.create_repo)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("code", [500, 503, 429])
def test_a_hub_that_is_out_of_order_or_busy_is_one_that_cannot_be_reached(hub_server, capsys, code):
    hub_server.code = code
    assert hub.create_hub_repo("someone/mine", "hf_secret") is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "the hub cannot be reached" in said and "tried again after training" in said


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_hub_that_says_no_is_obeyed(hub_server, code):
    hub_server.code = code
    with pytest.raises(ValueError, match="cannot create someone/mine .* log in with `hf auth login`"):
        hub.create_hub_repo("someone/mine", "hf_secret")


@pytest.mark.parametrize("name", ["../mine", "a/../b", "a/b/c", "mine; rm -r ."])
def test_a_name_that_no_repository_can_have_is_refused(hub_server, name):
    with pytest.raises(ValueError, match="--push_to_hub: cannot create"):
        hub.create_hub_repo(name, "hf_secret")


@pytest.mark.parametrize("token", ["hf_secret \n", "hf_sec\nret", "hf_secret\t"])
def test_a_token_that_no_request_can_carry_is_not_repeated(hub_server, capsys, token):
    """The HTTP library quotes it in its error; on the command line it is refused, but HF_TOKEN may hold one, too."""
    assert hub.create_hub_repo("someone/mine", token) is None
    with pytest.raises(SystemExit):
        train_cogvideox_lora.parse_args(training_options("m", "d", "o", hub_token=token))
    said = capsys.readouterr()
    assert "Illegal header value b'...'" in said.out and "copy it again" in said.err
    assert "hf_sec" not in said.out + said.err


def test_the_command_line_that_trackers_log_has_no_token(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", "hf_secret", "--hub_token=hf_secret"])
    hub.hide_token("hf_secret")
    assert sys.argv == ["train.py", "--hub_token", "...", "--hub_token=..."]


def result_of_a_run(folder):
    folder.mkdir()
    (folder / LORA_FILE).write_bytes(b"weights")
    return folder


SIGNALLED = """
import sys, time
from pathlib import Path

sys.path.insert(0, {root!r})
import run.hub

def upload_folder(**options):
    print("ready", flush=True)
    time.sleep(60)

run.hub.upload_folder = upload_folder
run.hub.model_card = lambda *_: "card"
run.hub.push_to_hub("someone/mine", Path(sys.argv[1]), None, name="mine", options={{}}, token="hf_secret")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_upload_ends_it_with_the_command_for_later(tmp_path, number):
    folder = result_of_a_run(tmp_path / "run")
    line = [sys.executable, "-c", SIGNALLED.format(root=str(ROOT)), folder]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "uploading to someone/mine\n"
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert f"stopped in the upload. The result is in {folder}; upload it with: hf upload someone/mine" in error
    assert "Traceback" not in error and "hf_secret" not in error


def test_a_signal_before_the_upload_leaves_it_out(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "upload_folder", lambda **_: pytest.fail("uploads"))
    with pytest.raises(Stopped, match="stopped before the upload. .* hf upload mine") as stopped:
        hub.push_to_hub(None, tmp_path, None, name="mine", options={}, token=None, signal=signal.SIGTERM)
    assert stopped.value.number == signal.SIGTERM


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("upload_folder", ConnectionError("gone")),
        ("publish", OSError(errno.ENOSPC, "No space left on device")),
        ("last_validation", ValueError("prompts.json: damaged")),
    ],
)
def test_an_upload_that_fails_names_the_command_for_later(tmp_path, monkeypatch, place, error):
    folder = result_of_a_run(tmp_path / "a run")
    monkeypatch.setattr(hub, "model_card", lambda *_: "card")
    monkeypatch.setattr(hub, place, raising(error))
    with pytest.raises(CannotContinue, match="the upload has failed .* upload it with: ") as failed:
        hub.push_to_hub("someone/mine", folder, None, name="mine", options={}, token="hf_secret")
    words = shlex.split(str(failed.value).split("upload it with: ")[1])
    assert words[:5] == ["hf", "upload", "someone/mine", str(folder), "."]
    patterns = [word for flag, word in zip(words[5::2], words[6::2], strict=True) if flag == "--include"]
    offered = [LORA_FILE, f"checkpoint-1/{LORA_FILE}", "transformer/config.json", "logs/x"]
    assert list(filter_repo_objects(offered, allow_patterns=patterns)) == [LORA_FILE, "transformer/config.json"]


@pytest.mark.skipif(not shutil.which("hf"), reason="hf, of huggingface_hub, is not on PATH")
def test_hf_takes_the_command_for_later(hub_server, tmp_path):
    """It asks for the repository, which this hub does not give."""
    folder = result_of_a_run(tmp_path / "a run")
    hub_server.code = 403
    place = {"HF_ENDPOINT": f"http://127.0.0.1:{hub_server.server_port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x"}
    command = hub.upload_command("someone/mine", folder)
    result = subprocess.run(shlex.split(command), env=os.environ | place, capture_output=True, text=True, timeout=60)
    assert result.returncode and "403" in result.stdout + result.stderr, result.stderr
    assert hub_server.asked[:1] == ["/api/repos/create"]


def test_a_hub_that_cannot_be_reached_costs_no_training(tiny_checkpoint, tmp_path, train, monkeypatch, capsys):
    error = ConnectionError("no route to the hub, asked with 'Authorization: Bearer secret-token'")
    monkeypatch.setattr(hub, "create_repo", raising(error))
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
