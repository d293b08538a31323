"""benchmarks/versus.py: its gate, its clock and its arithmetic.

The script that it compares with is no part of this repository: COGVIDEOX_REFERENCE=path/to/diffusers/examples/cogvideo/
train_cogvideox_lora.py runs the comparison itself, too.
"""

import contextlib
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference
import torch
import transformers
import trial
import versus
from diffusers import CogVideoXTransformer3DModel

import train_cogvideox_lora
from clips.facts import examine
from clips.listing import Folder, read_listing
from clips.selection import selection_of
from cogvideox import objective
from cogvideox.base_model import load_transformer, read_base_model
from cogvideox.objective import velocity_loss

ROOT = Path(__file__).parents[1]


def parse(*words):
    return versus.parse_args(["--reference", __file__, *words])


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["--reference", "nowhere.py"], "--reference nowhere.py: no such file"),
        (["--steps", "1"], "--steps: 1: must be a whole number of at least 2"),
        (["--warmup", "0"], "--warmup: 0: must be a whole number of at least 1"),
        (["--rounds", "0"], "--rounds: 0: must be a whole number of at least 1"),
        (["--ours_options", "--rank=4"], "--ours_options --rank: is the same for both scripts"),
        (["--ours_options", "--compiled"], "--compiled: unknown option; did you mean --compile?"),
    ],
)
def test_refuses_what_cannot_work(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        versus.main(["--reference", __file__, *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_not_given_comes_from_the_size():
    args = parse("--size", "compute", "--steps", "7")
    assert (args.rank, args.steps, args.warmup) == (32, 7, 4)


@pytest.mark.parametrize("words", [
    ["--ours_options", "--compile", "--attention_backend", "math"],
    ["--ours_options", "--compile --attention_backend math"],
    ["--ours_options=--compile --attention_backend math", "--rounds", "1"],
])  # fmt: skip
def test_options_for_ours_alone_can_be_given_with_and_without_quotes(words):
    args = parse("--steps", "7", *words)
    assert (args.ours_options, args.steps) == (["--compile", "--attention_backend", "math"], 7)


@pytest.mark.parametrize("size", versus.SIZES)
def test_our_script_takes_the_shared_options(size):
    args = parse("--size", size, "--gradient_checkpointing", "--mixed_precision", "bf16")
    line = versus.shared_options(args, updates=9)
    ours = train_cogvideox_lora.parse_args(line)
    assert (ours.rank, ours.lora_alpha, ours.max_train_steps) == (args.rank, args.rank, 9)
    assert ours.gradient_checkpointing and ours.mixed_precision == "bf16" and ours.optimizer == "adamw"
    assert ours.checkpointing_steps > ours.max_train_steps and not ours.validation_prompt
    assert "5b" not in ours.pretrained_model_name_or_path  # diffusers' example would load bfloat16


def test_the_base_model_is_stored_as_the_other_script_loads_it_and_shows_all_its_pixels(tmp_path):
    size = versus.SIZES["overhead"]
    versus.write_inputs(size, tmp_path)
    checkpoint = read_base_model(str(tmp_path / "base-model"))
    transformer = load_transformer(checkpoint, torch.float32)
    assert all(torch.equal(weight, weight.half().float()) for weight in transformer.parameters())
    _, _, clips, problems, _ = read_listing([Folder(tmp_path / "clips")])
    assert problems == [] and len(clips) == 8
    shared = train_cogvideox_lora.parse_args(versus.shared_options(parse("--size", "overhead"), updates=9))
    (facts,), problem, _ = examine(clips[0], selection_of(shared, with_image=False, whole=False))
    assert problem is None
    assert (facts.height, facts.width, facts.num_seen) == (size.height, size.width, size.max_num_frames)
    assert facts.num_frames == facts.num_distinct == size.max_num_frames


# ---- the gate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def captured(checkpoint_of, train, tmp_path):
    """Three updates of a run whose scheduler is the one of diffusers' example."""
    records = []
    with trial.captured_draws(records), trial.update_values(records):
        rows = train(checkpoint_of("5b"), tmp_path / "captured", max_train_steps=3)
    return records, rows


def replay(theirs, checkpoint, folder, train, **options):
    """The same updates in a run that would draw all of it otherwise."""
    records = []
    with trial.replayed_draws(records, theirs, ROOT), trial.update_values(records):
        train(checkpoint, folder, max_train_steps=len(theirs), seed=1, **options)
    return versus.compare_updates(records, theirs)


def test_what_is_captured_is_what_the_run_reports(captured):
    records, rows = captured
    assert [record["loss"] for record in records] == [row["loss"] for row in rows]
    for record, row in zip(records, rows, strict=True):
        norm = torch.stack([gradient.norm() for gradient in record["gradients"].values()]).norm()
        assert norm.item() == pytest.approx(row["grad_norm"], rel=1e-5)
    for record, following in zip(records, records[1:]):
        assert all(torch.equal(weight, following["before"][name]) for name, weight in record["after"].items())


def test_a_replayed_run_computes_what_was_captured(captured, checkpoint_of, train, tmp_path):
    records, _ = captured
    shifts = replay(records, checkpoint_of("5b"), tmp_path / "replayed", train)
    versus.check_gate(shifts)
    assert max(update["gradients"] for update in shifts) < 1e-6


def test_a_compiled_run_can_be_replayed(captured, checkpoint_of, train, tmp_path, monkeypatch):
    """By all of torch.compile but its last stage, which needs a C++ compiler and half a minute."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    records, _ = captured
    shifts = replay(records, checkpoint_of("5b"), tmp_path / "replayed", train, compile=True)
    torch.compiler.reset()
    versus.check_gate(shifts)
    assert compiled


@pytest.mark.parametrize("what", ["noise", "before", "timesteps", "encoder_hidden_states", "latents"])
def test_the_gate_sees_what_is_not_the_same(what, captured, checkpoint_of, train, tmp_path):
    records, _ = captured
    if what == "before":
        for weight in records[1][what].values():
            weight += 0.01
    else:
        records[1][what] = records[1][what] + (1 if what == "timesteps" else 0.01)
    shifts = replay(records[:2], checkpoint_of("5b"), tmp_path / "replayed", train)
    with pytest.raises(ValueError, match="update 2: .* the two scripts do not do the same work"):
        versus.check_gate(shifts)


def test_nothing_stays_wrapped(captured):
    for function in (velocity_loss, objective.randn_tensor, CogVideoXTransformer3DModel.forward):
        assert function.__code__.co_filename != trial.__file__


def test_not_a_number_is_no_agreement():
    update = dict.fromkeys(versus.TOLERANCE, 0.0) | {"loss": float("nan")}
    with pytest.raises(ValueError, match="loss differ by nan"):
        versus.check_gate([update])


@pytest.mark.parametrize(("ours", "passes"), [(0.02, True), (0.06, False), (float("nan"), False)])
def test_in_16_bits_ours_may_be_as_far_from_float32_as_theirs_and_not_much_farther(ours, passes):
    distances = {"ours": [{"gradients": ours}, {"gradients": ours}], "theirs": [{"gradients": 0.01}] * 2}
    with contextlib.nullcontext() if passes else pytest.raises(ValueError, match="the times cannot be compared"):
        versus.check_rounding(distances)


@pytest.mark.parametrize(
    "found, expected, share",
    [([3.0, 4.0], [3.0, 4.0], 0.0), ([0.0, 0.0], [3.0, 4.0], 1.0), ([3.0, 9.0], [3.0, 4.0], 1.0), ([6, 8], [3, 4], 1)],
)
def test_distance_is_a_share_of_what_is_expected(found, expected, share):
    named = [{name: torch.tensor([value]) for name, value in zip("ab", values)} for values in (found, expected)]
    assert versus.distance(*named) == pytest.approx(share)


# ---- the clock -------------------------------------------------------------------------------------------------------


def test_every_update_of_any_optimizer_is_a_row():
    weight, rows = torch.nn.Parameter(torch.ones(3)), []
    optimizers = [torch.optim.AdamW([weight]), torch.optim.SGD([weight])]
    with trial.update_times(rows):
        for optimizer in optimizers * 2:
            weight.sum().backward()
            optimizer.step()
    optimizers[0].step()
    assert len(rows) == 4
    for name in ("at", "cpu", "peak_gib"):
        assert [row[name] for row in rows] == sorted(row[name] for row in rows)
        assert rows[0][name] > 0


def test_a_script_runs_as_if_it_were_started_by_python(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", ["elsewhere", *sys.path])
    (tmp_path / "its_module.py").write_text("value = 7")
    script = tmp_path / "script.py"
    script.write_text("import sys, its_module\nif __name__ == '__main__': print(sys.argv[1:], its_module.value)")
    trial.run_script(script, ["--rank", "4"])
    assert capsys.readouterr().out == "['--rank', '4'] 7\n"
    assert "elsewhere" not in sys.path


def test_a_script_that_fails_is_reported_with_its_last_words(tmp_path, monkeypatch):
    failing = tmp_path / "trial.py"
    failing.write_text("import sys; sys.exit('no such optimizer')")
    monkeypatch.setattr(versus, "TRIAL", failing)
    with pytest.raises(RuntimeError, match="(?s)1-ours: .*script.py ended with code 1:\nno such optimizer"):
        versus.run_trial(tmp_path, "1-ours", ["times"], tmp_path / "script.py", [])


def test_torchvision_is_stood_in_for_and_the_libraries_do_not_notice(tmp_path, monkeypatch):
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if not reference.stand_in_for_torchvision():
        pytest.skip("torchvision is installed here")
    script = tmp_path / "script.py"
    script.write_text(
        "import torchvision.transforms as TT\n"
        "from torchvision.transforms import InterpolationMode\n"
        "from torchvision.transforms.functional import resize\n"
        "def shrink(frames):\n"
        "    frames = resize(frames, size=[4, 8], interpolation=InterpolationMode.BICUBIC)\n"
        "    return TT.functional.crop(frames, top=1, left=2, height=2, width=4)\n"
    )
    frames = torch.linspace(0, 1, 16).expand(2, 3, 8, 16)  # a ramp from left to right
    shrunk = reference.load_reference(script).shrink(frames)
    assert shrunk.shape == (2, 3, 2, 4)
    centres = frames[0, 0, 0].reshape(8, 2).mean(1)[2:6]  # antialiasing keeps a ramp a ramp
    assert torch.allclose(shrunk, centres.expand_as(shrunk), atol=1e-3)
    assert not transformers.utils.is_torchvision_available()


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_one_run_in_numbers():
    at, cpu, peaks = [110.0, 119.0, 120.0, 122.0, 125.0], [5.0, 6.0, 6.5, 7.5, 9.0], [9.0, 4.0, 5.0, 6.0, 5.5]
    updates = [{"at": a, "cpu": c, "peak_gib": p} for a, c, p in zip(at, cpu, peaks)]
    found = versus.summarize("ours", {"updates": updates, "device": "CPU"}, start=100.0, warmup=2)
    assert found["seconds_of_each_update"] == [1.0, 2.0, 3.0]
    assert (found["seconds_per_update"], found["mean_seconds_per_update"]) == (2.0, 2.0)
    assert found["cpu_seconds_per_update"] == 1.0
    assert found["seconds_to_first_update"] == 10.0
    assert (found["peak_gib"], found["peak_gib_of_updates"]) == (9.0, 6.0)
    assert found["device"] == "CPU" and "updates" not in found


def made_up(who, value):
    return {"who": who, **dict.fromkeys(versus.COLUMNS, value)}


@pytest.mark.parametrize(
    "values, ratio, noise",
    [
        ([1.0, 2.0, 2.0, 1.0, 1.0, 1.0], 0.5, 1.0),
        ([1.0, 2.1, 2.2, 1.3, 3.0, 2.0], 0.5349, 1.5),
        ([1.1, 1.2, 1.3, 1.4, 1.5, 1.6], 1.0, 0.9375),  # an even drift says nothing
        ([1.0, 2.0, 2.0, 1.0, 2.0, 4.0, 4.0, 2.0, 1.0, 1.0], 0.5, 1.0),  # two rounds
    ],
)
def test_ratios_are_of_the_rounds_and_the_noise_is_of_the_last_two(values, ratio, noise):
    order = (*versus.ROUND * (len(values) // 4), "ours", "ours")
    found = versus.ratios([made_up(who, value) for who, value in zip(order, values, strict=True)])
    assert found["ours_over_theirs"] == dict.fromkeys(versus.COLUMNS, ratio)
    assert found["ours_over_ours"] == dict.fromkeys(versus.COLUMNS, noise)


def test_the_table_has_a_row_per_run_and_the_two_ratios():
    trials = [made_up(who, 1.0 + (who == "theirs")) for who in (*versus.ROUND, "ours", "ours")]
    lines = versus.table({"trials": trials} | versus.ratios(trials)).splitlines()
    assert [line.split("  ")[0] for line in lines[1:7]] == [
        "1 ours", "2 theirs", "3 theirs", "4 ours", "5 ours", "6 ours"
    ]  # fmt: skip
    assert lines[2].split()[2:] == ["2.0000"] * len(versus.COLUMNS)
    assert lines[7].split()[:4] == ["ours", "/", "theirs", "0.500"] and lines[8].split()[:3] == ["last", "two", "1.000"]


@pytest.fixture
def lines(monkeypatch):
    """Command lines of all runs by their names; none is run, each leaves what it would have left."""
    one, lines = torch.ones(1), {}
    record = dict.fromkeys(("hidden_states", "encoder_hidden_states", "timesteps"), one) | {"loss": 1.0}
    record |= {"before": {"weight": 0 * one}, "after": {"weight": one}, "gradients": {"weight": one}}

    def run_trial(folder, name, mode, script, options):
        lines[name] = [script.name, *options]
        if mode[0] == "times":
            updates = [{"at": time.time() + i, "cpu": 1.0 * i, "peak_gib": 1.0} for i in range(1, 400)]
            (folder / mode[1]).write_text(json.dumps({"updates": updates}))
        else:
            torch.save([record], folder / mode[-1])

    monkeypatch.setattr(versus, "run_trial", run_trial)
    return lines


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_options_for_ours_alone_reach_its_runs_and_no_other(precision, lines, tmp_path):
    options = ["--compile", "--attention_backend", "math"]
    result = versus.compare(parse("--mixed_precision", precision, "--ours_options", *options), tmp_path)
    ours = {name for name, line in lines.items() if line[0] == versus.OURS.name}
    assert ours == {"1-ours", "4-ours", "5-ours", "6-ours", "gate-ours"} | (
        {"gate-float32"} if precision == "bf16" else set()
    )
    for name, line in lines.items():
        given = [word for word in line if word in options]
        assert given == (options if name in ours - {"gate-float32"} else []), name  # which is the plain computation
    for name in ours:
        assert train_cogvideox_lora.parse_args(lines[name][1:]).compile == (name != "gate-float32")
    assert result["ours_options"] == options
    assert "--compile" in result["command_lines"]["ours"] and "--compile" not in result["command_lines"]["theirs"]


def test_what_does_not_fit_into_the_gpu_is_not_begun(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24 << 30))
    file = tmp_path / "versus.json"
    words = ["--reference", __file__, "--size", "2b", "--mixed_precision", "bf16", "--output", str(file)]
    with pytest.raises(SystemExit, match="a step needs 30.3 GiB, as predicted, and this GPU has 24.0"):
        versus.main(words)
    assert json.loads(file.read_text())["does_not_fit"]["gpu_gib"] == 24 and not lines
    versus.check_memory(versus.parse_args([*words, "--gradient_checkpointing"]))


def test_what_was_measured_before_a_run_fails_is_kept(lines, tmp_path, monkeypatch):
    time_trial = versus.time_trial

    def third_fails(args, folder, number, who):
        if number == 3:
            raise RuntimeError("out of memory")
        return time_trial(args, folder, number, who)

    monkeypatch.setattr(versus, "time_trial", third_fails)
    with pytest.raises(RuntimeError):
        versus.compare(parse("--output", str(tmp_path / "result.json")), tmp_path)
    kept = json.loads((tmp_path / "result.json").read_text())
    assert [trial["who"] for trial in kept["trials"]] == ["ours", "theirs"] and kept["gate"]["shifts"]


# ---- the comparison itself -------------------------------------------------------------------------------------------


@pytest.mark.skipif("COGVIDEOX_REFERENCE" not in os.environ, reason="COGVIDEOX_REFERENCE names no script to compare")
@pytest.mark.parametrize("precision, further", [("no", []), ("bf16", []), ("no", ["--ours_options", "--compile"])])
def test_both_scripts_run_and_agree(precision, further, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    file = tmp_path / "result.json"
    line = ["--reference", os.environ["COGVIDEOX_REFERENCE"], "--steps", "2", "--warmup", "1", "--output", str(file)]
    versus.main([*line, "--mixed_precision", precision, *further])
    result = json.loads(file.read_text())
    assert [trial["who"] for trial in result["trials"]] == [*versus.ROUND, "ours", "ours"]
    assert all(len(trial["seconds_of_each_update"]) == 2 for trial in result["trials"])
    assert len(result["gate"]["shifts"]) == 3
    assert set(result["gate"].get("from_float32", {})) == ({"ours", "theirs"} if precision == "bf16" else set())
    assert capsys.readouterr().out.startswith("gate, ours from theirs, largest relative difference")
