"""Masks: what of a clip counts in the loss."""

import json
import re
import subprocess

import imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import reset_accelerate, training_options
from diffusers import CogVideoXDDIMScheduler
from make_example import draw_clip, make_clips, make_scheduler, make_vae, tiny_t5_config
from PIL import Image
from safetensors.torch import load_file
from test_training import losses

import dataset
import train_cogvideox_lora
from clips import check, export
from clips.facts import examine
from clips.frames import View, read_frames
from clips.known import look_at
from clips.listing import Clip, Columns, Folder, read_listing
from clips.masks import latent_mask, read_mask
from clips.selection import Selection
from cogvideox.base_model import read_base_model
from cogvideox.encoders import encode_videos
from cogvideox.lora import Lora
from cogvideox.objective import Masking, preservation_loss, training_loss, velocity_loss
from cogvideox.rehearsal import Settings, models_of, rehearse
from pages import preview

MASKS = {"mask_column": "m"}
VIEW = View(64, 96, 8, 9, 0, 0, "center", 0)
SMALL = ["--height", "64", "--width", "96", "--max_num_frames", "9"]
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


def write_video(path, frames, fps=24):
    imageio.mimsave(path, frames, fps=fps, macro_block_size=1)
    return path


def half_white(path, height=96, width=128, white=slice(None, 64)):
    picture = np.zeros((height, width), np.uint8)
    picture[:, white] = 255
    Image.fromarray(picture).save(path)
    return path


def masked(clip, view=VIEW, *, mirrored=False):
    return read_mask(clip, look_at(clip.mask), view, mirrored=mirrored, file=look_at(clip.video))


@pytest.fixture
def moving(tmp_path):
    """A clip of 32 frames of noise at 24 fps, 128x96 pixels, every frame of which differs, and grey."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 12, 16), np.uint8)
    frames = [np.array(Image.fromarray(grey).resize((128, 96)))[..., None].repeat(3, -1) for grey in noise]
    return write_video(tmp_path / "moving.mp4", frames)


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"height": 80, "width": 48},
        {"crop": "random", "width": 32, "seed": 3},
        {"start": 0.25, "fps": 16},
        {"skip_frames_start": 5, "skip_frames_end": 4, "max_num_frames": 5},
    ],
    ids=["plain", "portrait", "cropped at random", "a window", "frames left out"],
)
def test_a_mask_is_seen_exactly_as_the_frames_are(moving, changes, mirrored):
    """A clip that is its own mask: each frame of the mask is the frame at the same time, in the same place."""
    view = VIEW._replace(**changes)
    frames = read_frames(moving, view, mirrored=mirrored)
    mask = masked(Clip(moving, "a", 1, mask=moving), view, mirrored=mirrored)
    assert mask.dtype == torch.uint8 and torch.equal(mask, frames.float().mean(-1).round().byte())


def test_a_mask_of_another_size_and_container_is_as_good_as_one_of_the_same(moving, tmp_path):
    small = tmp_path / "small.mkv"
    subprocess.run([FFMPEG, "-v", "error", "-i", moving, "-vf", "scale=64:48", "-c:v", "ffv1", small], check=True)
    same, scaled = (masked(Clip(moving, "a", 1, mask=mask)).float() for mask in (moving, small))
    assert scaled.shape == same.shape and (scaled - same).abs().mean() < 8


def test_an_image_is_the_mask_of_the_whole_clip(moving, tmp_path):
    clip = Clip(moving, "a", 1, mask=half_white(tmp_path / "m.png", 192, 256, white=slice(None, 128)))
    mask, mirrored = masked(clip), masked(clip, mirrored=True)
    assert mask.shape == (9, 64, 96) and len(mask.unique(dim=0)) == 1
    assert (mask[:, :, :46] == 255).all() and (mask[:, :, 50:] == 0).all()
    assert torch.equal(mirrored, mask.flip(2))


def test_a_turned_clip_takes_a_mask_of_what_a_player_shows(moving, tmp_path):
    turned, stretched = tmp_path / "turned.mp4", tmp_path / "stretched.mp4"
    run = [FFMPEG, "-v", "error"]
    subprocess.run([*run, "-display_rotation", "90", "-i", moving, "-c", "copy", turned], check=True)
    subprocess.run([*run, "-i", moving, "-vf", "setsar=2", stretched], check=True)
    for video, (height, width) in {turned: (128, 96), stretched: (96, 256)}.items():
        mask = half_white(tmp_path / "m.png", height, width, white=slice(None, width // 2))
        view = VIEW._replace(height=64, width=48)
        seen = masked(Clip(video, "a", 1, mask=mask), view)
        assert (seen[:, :, :22] > 250).all() and (seen[:, :, 26:] < 5).all()
        wrong = half_white(tmp_path / "w.png", 96, 128)
        assert "which is another shape" in examine(Clip(video, "a", 1, mask=wrong), Selection(VIEW)).problem


def test_each_window_of_a_clip_has_the_frames_of_its_own_mask(tmp_path):
    """White comes in from the left, a column of blocks later in every frame."""
    video = write_video(tmp_path / "a.mp4", draw_clip("circle", "red", "left", 36, 64, 96), fps=8)
    steps = np.zeros((36, 64, 96, 3), np.uint8)
    for number in range(36):
        steps[number, :, : 2 * number + 2] = 255
    clip = Clip(video, "a", 1, mask=write_video(tmp_path / "m.mp4", steps, fps=8))
    windows = examine(clip, Selection(VIEW, clip_mode="chunks")).windows
    assert [facts.view.start for facts in windows] == [0, 9 / 8, 18 / 8, 27 / 8]
    for number, facts in enumerate(windows):
        seen = masked(clip, facts.view).float().mean((1, 2)) / 255
        expected = [(2 * (9 * number + frame) + 2) / 96 for frame in range(9)]
        assert seen.tolist() == pytest.approx(expected, abs=0.02)


# ---- at the size of the latents --------------------------------------------------------------------------------------


def test_the_mask_of_the_latents_is_the_mean_of_their_pixels():
    mask = torch.randint(0, 256, (9, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = latent_mask(mask, 3, 8, 12)
    for latent_frame, frames in enumerate([slice(0, 1), slice(1, 5), slice(5, 9)]):
        for y in range(8):
            for x in range(12):
                block = mask[frames, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].double().mean() / 255
                assert found[latent_frame, y, x].item() == pytest.approx(block.item(), abs=1e-6)
    assert latent_mask(mask[:1], 1, 8, 12).shape == (1, 8, 12) and found.dtype == torch.float32


def test_the_vae_compresses_frames_as_masks_are():
    """The first latent frame that a frame changes is the one whose mask it is in: the VAE looks back only."""
    torch.manual_seed(0)
    vae = make_vae().double()
    for module in list(vae.encoder.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, torch.nn.GroupNorm):  # mixes all frames of a chunk, a little
                setattr(module, name, torch.nn.Identity())
    frames = torch.randint(0, 256, (1, 17, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    before = encode_videos(vae, frames)[0, :4]
    for frame in range(17):
        changed, mask = frames.clone(), torch.zeros(17, 16, 16, dtype=torch.uint8)
        changed[:, frame] = 255 - changed[:, frame]
        mask[frame] = 255
        by_frame = (encode_videos(vae, changed)[0, :4] != before).any(0).any(1).any(1)
        assert by_frame.nonzero()[0] == latent_mask(mask, 5, 2, 2).nonzero()[0, 0]


# ---- problems --------------------------------------------------------------------------------------------------------


def write_noise(path, num_frames, fps=24, size=(96, 128)):
    noise = np.random.default_rng(1).integers(0, 256, (num_frames, *size, 3), np.uint8)
    return write_video(path, noise, fps=fps)


MISFITS = {
    "another shape": (lambda path: half_white(path, 100, 100), ".png", "has 100x100 pixels and its video 128x96, "),
    "turned": (lambda path: half_white(path, 128, 96), ".png", "has 96x128 pixels and its video 128x96, which"),
    "too short": (lambda path: write_noise(path, 16), ".mp4", "has 16 frames and its video 32; make it from"),
    "too long": (lambda path: write_noise(path, 33), ".mp4", "has 33 frames and its video 32; make it from"),
    "slower": (lambda path: write_noise(path, 32, 12), ".mp4", "shows its frames up to 1.29 s apart from those of"),
    "no picture": (lambda path: path.write_bytes(b"no"), ".png", "holds no frame that FFmpeg can decode; play it"),
    "empty": (lambda path: path.write_bytes(b""), ".png", "the file is empty; copy it again"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_a_mask_that_does_not_fit_its_clip_is_refused_by_name(moving, tmp_path, name):
    make, suffix, message = MISFITS[name]
    path = tmp_path / f"mask{suffix}"
    make(path)
    problem = examine(Clip(moving, "a", 3, mask=path), Selection(VIEW)).problem
    assert problem.startswith(f"line 3: {path}: this mask {message}") and "; " in problem


def test_a_mask_that_is_black_where_the_model_looks_is_refused_and_a_white_one_remarked_on(moving, tmp_path, capsys):
    def listed(mask):
        folder = tmp_path / "clips"
        folder.mkdir(exist_ok=True)
        rows = {"videos.txt": moving, "prompts.txt": "a cat", "masks.txt": mask}
        for name, line in rows.items():
            (folder / name).write_text(f"{line}\n")
        return [str(folder), *SMALL, "--mask_column", "masks.txt"]

    for name, white in {"black.png": slice(0), "edge.png": slice(4)}.items():
        mask = half_white(tmp_path / name, white=white)
        with pytest.raises(SystemExit) as stop:
            check.main([*listed(mask), "--width", "32"])
        assert stop.value.code == 2 and f"line 1: {mask}: this mask is black wherever the mo" in capsys.readouterr().err
    check.main(listed(half_white(tmp_path / "white.png", white=slice(None))))
    said = capsys.readouterr().out
    assert "with a mask: 1 clip\n" in said
    assert "masks that are white everywhere, and so leave nothing out: line 1\n" in said
    check.main(listed(half_white(tmp_path / "half.png")))
    assert "leave nothing out" not in capsys.readouterr().out


def test_of_a_clip_with_one_black_window_no_window_is_used(tmp_path, capsys):
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", draw_clip("circle", "red", "left", 27, 64, 96), fps=8)
    late = np.zeros((27, 64, 96, 3), np.uint8)
    late[12:] = 255
    write_video(tmp_path / "late.mp4", late, fps=8)
    rows = [{"file_name": "a.mp4", "text": "a", "mask": "late.mp4"}, {"file_name": "b.mp4", "text": "b"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = [str(tmp_path), *SMALL, "--mask_column", "mask", "--clip_mode", "chunks"]
    for program in (check, preview):
        with pytest.raises(SystemExit):
            program.main(line)
        said = capsys.readouterr()
        assert said.err.count("metadata.jsonl:1: ") == 1 and "late.mp4: this mask is black wherever the mo" in said.err
        assert "1 clip of 96x64 at 8 fps in 3 windows" in said.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_floor": 0.5}, "--mask_floor 0.5: does nothing without --mask_column, which names masks; pass both, or"),
        ({"mask_floor": 2, "mask_column": "m"}, "--mask_floor 2: must be at most 1, the weight of what is white; pass"),
        ({"mask_floor": 1, "mask_column": "m"}, "--mask_floor 1: with it, black counts as white does"),
        ({"mask_floor": -1, "mask_column": "m"}, "-1: must be at least 0"),
        ({"mask_floor": "nan", "mask_column": "m"}, "nan: must be at least 0"),
        ({"mask_preserve": 1}, "--mask_preserve 1: does nothing without --mask_column, which names masks; pass both"),
        (MASKS | {"mask_preserve": 1, "training_type": "sft"}, "--mask_preserve 1: --training_type sft changes the"),
        (MASKS | {"mask_preserve": 1, "init_lora_weights": "pissa"}, "--mask_preserve 1: --init_lora_weights pissa"),
        ({"video_decoder": "decord", "mask_column": "m"}, "--video_decoder decord: (reads no masks|is not installed)"),
    ],
)
def test_options_of_masks_that_cannot_work_are_refused(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        train_cogvideox_lora.parse_args(training_options("model", "data", tmp_path, **options))
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)
    reset_accelerate()


def test_where_weights_are_sharded_masks_preserve_nothing(tmp_path):
    options = MASKS | {"mask_preserve": 1, "gradient_checkpointing": "full"}
    args = train_cogvideox_lora.parse_args(training_options("model", "data", tmp_path, **options))
    with pytest.raises(ValueError, match="--mask_preserve: sharded GPUs compute together"):
        train_cogvideox_lora.check_sharding(args)


# ---- lists and tables ------------------------------------------------------------------------------------------------

ROWS = [("a.mp4", "m.png"), ("b.mp4", ""), ("c.mp4", "m.mp4"), ("d.mp4", "")]


def write_jsonl(folder, rows, without):
    lines = [{"file_name": video, "text": "x"} | ({"mask": mask or without} if mask or without is not ... else {})
             for video, mask in rows]  # fmt: skip
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Columns(mask="mask")


def write_csv(folder, rows):
    (folder / "metadata.csv").write_text(
        "file_name,text,mask\n" + "".join(f"{video},x,{mask}\n" for video, mask in rows)
    )
    return Columns(mask="mask")


def write_lists(folder, rows, end="\n"):
    columns = {"videos.txt": [video for video, _ in rows], "prompts.txt": "x" * len(rows)}
    columns["masks.txt"] = [mask for _, mask in rows]
    for name, lines in columns.items():
        (folder / name).write_text("\n".join(lines) + end)
    return Columns(mask="masks.txt")


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_jsonl(folder, ROWS, None),
        lambda folder: write_jsonl(folder, ROWS, " "),
        lambda folder: write_jsonl(folder, ROWS, ...),
        lambda folder: write_csv(folder, ROWS),
        lambda folder: write_lists(folder, ROWS),
        lambda folder: write_lists(folder, ROWS, end=""),
        lambda folder: write_lists(folder, ROWS, end="\n\n\n"),
    ],
    ids=["null", "blank", "absent", "csv", "lists", "lists without an end", "lists with blank lines at the end"],
)
def test_each_layout_names_masks_and_a_clip_may_have_none(tmp_path, write):
    listed = read_listing([Folder(tmp_path)], write(tmp_path))
    assert listed.problems == []
    assert [(clip.video.name, clip.mask and clip.mask.name) for clip in listed.clips] == [
        (video, mask or None) for video, mask in ROWS
    ]
    assert all(clip.mask.parent == tmp_path for clip in listed.clips if clip.mask)


def test_a_list_of_masks_has_a_line_for_each_clip(tmp_path):
    columns = write_lists(tmp_path, ROWS)
    (tmp_path / "masks.txt").write_text("m.png\n\nm.mp4")
    (problem,) = read_listing([Folder(tmp_path)], columns).problems
    assert problem.startswith("prompts.txt has 4 lines and videos.txt 4 and masks.txt 3: line n of one")


def test_pictures_that_are_masks_are_not_called_unused(tmp_path):
    columns = write_lists(tmp_path, [("a.mp4", "m.png")])
    for name in ("a.mp4", "m.png"):
        (tmp_path / name).touch()
    assert "m.png" in str(read_listing([Folder(tmp_path)], Columns()).remarks)
    assert read_listing([Folder(tmp_path)], columns).remarks == []


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked_clips(tmp_path_factory):
    """Three clips: with an image over the left half as its mask, with a video, and without a mask."""
    folder = make_clips(tmp_path_factory.mktemp("masked"), count=3)
    half_white(folder / "left.png")
    (folder / "moving").mkdir()
    white = np.zeros((32, 96, 128, 3), np.uint8)
    for number in range(32):
        white[number, :, : 4 * number + 4] = 255
    write_video(folder / "wipe.mp4", white)
    (folder / "masks.txt").write_text("left.png\nwipe.mp4\n\n")
    return folder


def test_the_cache_holds_the_mask_only_of_clips_that_have_one(tiny_checkpoint, masked_clips, tmp_path, train):
    options = {"instance_data_root": masked_clips, "encode_only": True, "random_flip": True}
    cache = {name: tmp_path / name for name in ("with", "without")}
    train(tiny_checkpoint, tmp_path / "a", latents_cache_dir=cache["without"], **options)
    train(tiny_checkpoint, tmp_path / "b", latents_cache_dir=cache["with"], mask_column="masks.txt", **options)
    entries = {
        name: {path.name: path.read_bytes() for path in (folder / "latents").iterdir()}
        for name, folder in cache.items()
    }
    same = entries["with"].keys() & entries["without"].keys()
    assert len(entries["with"]) == len(entries["without"]) == 6 and len(same) == 2  # of the clip without a mask
    assert all(entries["with"][name] == entries["without"][name] for name in same)
    found = [load_file(path) for path in (cache["with"] / "latents").iterdir() if path.name not in same]
    assert len(found) == 4 and all(tensors["mask"].shape == (3, 8, 12) for tensors in found)
    sides = [(tensors["mask"][1, 0, 0].item(), tensors["mask"][1, 0, 11].item()) for tensors in found]
    assert (0, 1) in sides and (1, 0) in sides  # the half, mirrored and as it is
    clips = read_listing([Folder(masked_clips)], Columns(mask="masks.txt")).clips
    for clip in clips[:2]:
        expected = latent_mask(masked(clip), 3, 8, 12)
        assert any(torch.equal(tensors["mask"], expected) for tensors in found)


def test_the_record_of_a_run_changes_with_its_masks_and_only_then(moving, tmp_path):
    def record(mask):
        facts = examine(Clip(moving, "a", 1, mask=mask), Selection(VIEW)).windows
        return dataset.content_record([Clip(moving, "a", 1)], facts, Selection(VIEW), random_flip=False)["videos"]

    left, right = half_white(tmp_path / "l.png"), half_white(tmp_path / "r.png", white=slice(64, None))
    content = look_at(moving).content
    assert record(None) == dataset.hash_of([[content, None]])
    assert len({record(None), record(left), record(right)}) == 3


def test_a_damaged_entry_is_encoded_again_with_its_mask(tiny_checkpoint, masked_clips, tmp_path, train, capsys):
    options = {"instance_data_root": masked_clips, "latents_cache_dir": tmp_path / "cache", "mask_column": "masks.txt"}
    rows = train(tiny_checkpoint, tmp_path / "a", **options)
    whole = {path: path.read_bytes() for path in (tmp_path / "cache" / "latents").iterdir()}
    for path, content in whole.items():
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert losses(train(tiny_checkpoint, tmp_path / "b", **options)) == losses(rows)
    assert {path: path.read_bytes() for path in whole} == whole
    assert capsys.readouterr().err.count("(checksum); it is encoded again") == 3


# ---- the loss --------------------------------------------------------------------------------------------------------


def batch_of(base, count=2, **others):
    generator = torch.Generator().manual_seed(5)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    length, width = base.transformer["max_text_seq_length"], base.transformer["text_embed_dim"]
    channels = base.transformer["out_channels"]
    batch = {"parameters": random(count, 2 * channels, 3, 8, 12), "prompt_embeds": random(count, length, width)}
    if base.takes_image:
        batch["image"] = torch.zeros(count, 64, 96, 3, dtype=torch.uint8)
    return batch | others


def predictor(calls):
    """A transformer that predicts a multiple of what it gets, with a weight for each place."""

    def transformer(hidden_states, **_):
        scale = torch.full((1, *hidden_states.shape[1:]), 0.5, requires_grad=True)
        calls.append(scale)
        return (scale * hidden_states,)

    return transformer


def test_each_squared_error_counts_by_the_mask_its_floor_and_what_is_preserved():
    torch.manual_seed(0)
    latents, mask = torch.randn(2, 3, 4, 8, 12), torch.rand(2, 3, 8, 12)
    scheduler, timesteps = make_scheduler(CogVideoXDDIMScheduler), torch.tensor([100, 900])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    target, noisy = (compute(latents, noise, timesteps) for compute in (scheduler.get_velocity, scheduler.add_noise))

    def loss(mask, masking=None):
        predict, generator = (lambda hidden_states, **_: (0.3 * hidden_states,)), torch.Generator().manual_seed(3)
        return velocity_loss(
            predict, scheduler, latents, torch.zeros(2, 1, 1), None, generator, torch.float32, timesteps=timesteps,
            mask=mask, masking=masking or Masking(),
        ).item()  # fmt: skip

    def base_model(hidden_states, **_):
        assert not torch.is_grad_enabled()
        return (hidden_states.sin(),)

    for floor, preserve in ((0, 0), (0.25, 0), (1, 0), (0, 2), (0.5, 0.1)):
        total = 0.0
        for b in range(2):
            for f in range(3):
                white = mask[b, f].double()
                total += ((floor + (1 - floor) * white) * (0.3 * noisy[b, f] - target[b, f]) ** 2).sum().item()
                total += (preserve * (1 - white) * (0.3 * noisy[b, f] - noisy[b, f].sin()) ** 2).sum().item()
        found = loss(mask[:, :, None], Masking(floor, preserve, base_model))
        assert found == pytest.approx(total / latents.numel(), rel=1e-5)
    assert loss(torch.ones(2, 3, 1, 8, 12)) == pytest.approx(loss(None), rel=1e-6)


@pytest.mark.parametrize("variant", ["2b", "1.5-5B"])
def test_what_is_black_has_no_gradient_without_a_floor(checkpoint_of, variant):
    """In the padded latent frames of 1.5, which repeat the first, the mask repeats as well."""
    base, mask = read_base_model(str(checkpoint_of(variant))), torch.zeros(2, 3, 8, 12)
    mask[..., :6], mask[:, 0, 4:] = 1, 0.5
    batch = batch_of(base, mask=mask)
    for floor in (0, 0.1):
        calls = []
        generator = torch.Generator().manual_seed(0)
        loss = training_loss(base, predictor(calls), batch, generator, torch.float32, masking=Masking(floor))
        (gradient,) = torch.autograd.grad(loss, calls)
        has_gradient = (gradient[0] != 0).all(1)  # [f, h, w]
        expected = torch.ones(3, 8, 12, dtype=torch.bool) if floor else mask[0] > 0
        if variant == "1.5-5B":
            expected = torch.cat([expected[:1], expected])
        assert torch.equal(has_gradient, expected)


def test_what_is_black_shows_what_the_base_model_predicts_where_it_is_preserved(tiny_checkpoint):
    """The base model, here one that predicts zeros, is kept on latents of its own; what is white is the clip's."""
    base, seen, given = read_base_model(str(tiny_checkpoint)), [], []

    def towards_zeros(hidden_states, timestep, **_):
        a = base.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1, 1)
        given.append(hidden_states)
        return (a.sqrt() / (1 - a).sqrt() * hidden_states,)

    def record(hidden_states, timestep, **inputs):
        seen.append((hidden_states, timestep))
        return towards_zeros(hidden_states, timestep)

    mask = torch.zeros(2, 3, 8, 12)
    mask[..., :6] = 1
    batch = batch_of(base) | {"mask": mask}
    spread = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        training_loss(base, record, batch, generator, torch.float32, masking=Masking(0, 1, towards_zeros))
        (noisy, timestep), first, second = seen.pop(), given[0], given[1]
        assert torch.equal(noisy, second) and not torch.equal(first, second)
        given.clear()
        noise_level = (1 - base.scheduler.alphas_cumprod[timestep]).sqrt().view(-1, 1, 1, 1, 1)
        spread.append((noisy[..., 6:] / noise_level).std().item())
    assert sum(spread) / len(spread) == pytest.approx(1, abs=0.02), "black: noise on zeros"


def test_where_a_mask_is_black_the_base_model_may_be_preserved_also_by_swapped_blocks(
    tiny_checkpoint, masked_clips, tmp_path, train
):
    options = {"instance_data_root": masked_clips, "mask_column": "masks.txt", "max_train_steps": 9}
    free, kept = (
        losses(train(tiny_checkpoint, tmp_path / str(weight), **options, mask_preserve=weight)) for weight in (0, 1)
    )
    assert len(kept) == 9 and kept != free
    again = options | {
        "checkpointing_steps": 5,
        "mask_preserve": 1,
        "blocks_to_swap": 1,
        "gradient_checkpointing": "full",
    }
    swapped = losses(train(tiny_checkpoint, tmp_path / "swapped", **again))
    assert swapped == pytest.approx(kept, rel=1e-4)


def test_a_run_without_masks_computes_what_it_did(tiny_checkpoint):
    base = read_base_model(str(tiny_checkpoint))
    loss = lambda **options: training_loss(  # noqa: E731
        base, predictor([]), batch_of(base), torch.Generator().manual_seed(0), torch.float32, **options
    )
    assert torch.equal(loss(), loss(masking=Masking(0.5)))


def test_what_is_preserved_is_not_masked(tiny_checkpoint):
    base = read_base_model(str(tiny_checkpoint))

    def loss(**others):
        batch = batch_of(base, **others)
        batch["plain_prompt_embeds"] = batch["prompt_embeds"]
        generator = torch.Generator().manual_seed(0)
        teacher = lambda hidden_states, **_: (hidden_states,)  # noqa: E731
        return preservation_loss(base, predictor([]), batch, generator, torch.float32, None, teacher)

    assert torch.equal(loss(), loss(mask=torch.zeros(2, 3, 8, 12))) and loss() > 0


def test_a_batch_has_a_mask_if_one_of_its_clips_has_one():
    plain = {"parameters": torch.zeros(8, 3, 2, 2), "prompt_embeds": torch.zeros(4, 2)}
    assert "mask" not in dataset.stacked([plain, plain])
    batch = dataset.stacked([plain, plain | {"mask": torch.full((3, 2, 2), 0.25)}])
    assert batch["mask"].shape == (2, 3, 2, 2) and batch["mask"].unique(dim=0).flatten().unique().tolist() == [0.25, 1]
    assert (batch["mask"][0] == 1).all()


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["2b", "5b", "5b-I2V", "1.5-5B", "1.5-5B-I2V"])
def test_every_variant_trains_with_masks(checkpoint_of, masked_clips, tmp_path, train, variant):
    options = {"instance_data_root": masked_clips, "mask_column": "masks.txt", "train_batch_size": 3}
    options |= {"validation_split": 1, "id_token": "FILM", "preserve": 1, "max_train_steps": 2}
    rows = losses(train(checkpoint_of(variant), tmp_path / "run", **options))
    assert len(rows) == 2 and all(np.isfinite(rows))


def test_masks_and_their_floor_change_losses_and_a_white_mask_does_not(tiny_checkpoint, masked_clips, tmp_path, train):
    def run(name, **options):
        options |= {"instance_data_root": masked_clips, "max_train_steps": 3, "learning_rate": 1e-30}
        return losses(train(tiny_checkpoint, tmp_path / name, **options))

    plain, masked_0 = run("plain"), run("masked", mask_column="masks.txt")
    assert sum(a == b for a, b in zip(plain, masked_0)) == 1  # the clip without a mask
    assert all(a <= b for a, b in zip(masked_0, plain))
    floor = run("floor", mask_column="masks.txt", mask_floor=0.5)
    assert floor == pytest.approx([(a + b) / 2 for a, b in zip(plain, masked_0)], rel=1e-5)
    assert run("one", mask_column="masks.txt", mask_floor=1 - 1e-6) == pytest.approx(plain, rel=1e-5)


def test_held_out_clips_are_measured_by_their_masks(tiny_checkpoint, masked_clips, tmp_path, train):
    def held_out(name, **options):
        options |= {"instance_data_root": masked_clips, "validation_split": 2, "max_train_steps": 1}
        rows = train(tiny_checkpoint, tmp_path / name, **options)
        return next(row["validation_loss"] for row in rows if "validation_loss" in row)

    plain, half = held_out("plain"), held_out("masked", mask_column="masks.txt")
    assert 0 < half < plain


def test_a_resumed_run_with_masks_equals_a_straight_one_and_other_masks_are_told(
    tiny_checkpoint, masked_clips, tmp_path, train, capsys
):
    options = {"instance_data_root": masked_clips, "mask_column": "masks.txt", "max_train_steps": 4}
    options |= {"checkpointing_steps": 2, "random_flip": True, "train_batch_size": 2}
    straight = losses(train(tiny_checkpoint, tmp_path / "a", **options))
    first = tmp_path / "a" / "checkpoint-2"
    resumed = train(tiny_checkpoint, tmp_path / "b", **options, resume_from_checkpoint=first)
    assert losses(resumed)[-2:] == straight[2:]
    (masked_clips / "others.txt").write_text("wipe.mp4\nleft.png\n\n")
    other = options | {"mask_column": "others.txt", "resume_from_checkpoint": first}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(tiny_checkpoint, tmp_path / "c", **other)
    reset_accelerate()
    assert stop.value.code == 2 and "the clips are not those of checkpoint-2 (videos " in capsys.readouterr().err
    train(tiny_checkpoint, tmp_path / "c", **other, change="data", mask_floor=0.1)
    assert "--mask_floor 0.1 (was 0)" in capsys.readouterr().out


def test_what_is_wrong_with_masks_is_told_with_the_rest(tiny_checkpoint, masked_clips, tmp_path, train, capsys):
    half_white(masked_clips / "square.png", 96, 96)
    (masked_clips / "wrong.txt").write_text("square.png\nnone.png\n\n")
    with pytest.raises(SystemExit) as stop:
        train(tiny_checkpoint, tmp_path / "run", instance_data_root=masked_clips, mask_column="wrong.txt")
    reset_accelerate()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "2 problems in the dataset, nothing is trained" in said
    assert f"line 1: {masked_clips}/square.png: this mask has 96x96 pixels and its video 128x96" in said
    assert f"line 2: {masked_clips}/none.png: no such file; correct the path" in said


def test_a_black_mask_ends_a_run_before_it_trains(tiny_checkpoint, masked_clips, tmp_path, train, capsys):
    half_white(masked_clips / "black.png", white=slice(0))
    (masked_clips / "blacks.txt").write_text("black.png\n\n\n")
    for _ in range(2):  # also once the others are encoded
        with pytest.raises(SystemExit) as stop:
            train(tiny_checkpoint, tmp_path / "run", instance_data_root=masked_clips, mask_column="blacks.txt")
        reset_accelerate()
        assert stop.value.code == 2
        assert (
            f"line 1: {masked_clips}/black.png: this mask is black wherever the model looks" in capsys.readouterr().err
        )


def test_files_of_masks_are_not_read_again(masked_clips, monkeypatch):
    clips = read_listing([Folder(masked_clips)], Columns(mask="masks.txt")).clips
    notes = dataset.Notes()
    first = [examine(clip, Selection(VIEW), notes) for clip in clips]
    assert all(dataset.is_known(clip, notes) for clip in clips) and first[0].windows[0].mask
    assert not dataset.is_known(clips[0], dataset.Notes())
    monkeypatch.setattr("clips.known.examine_video", lambda *_: pytest.fail("read again"))
    assert [examine(clip, Selection(VIEW), notes) for clip in clips] == first


def test_the_rehearsal_counts_the_passes_of_the_base_model(tiny_checkpoint):
    base, kind = read_base_model(str(tiny_checkpoint)), Lora(16, 16, ("to_q", "to_k", "to_v", "to_out.0"))
    models = models_of(base, tiny_t5_config(300), lambda weights: torch.optim.AdamW(weights, fused=True))
    settings = Settings(64, 96, 9, kind, dtype=torch.float32, device_type="cpu")
    counted = [rehearse("training", models, settings._replace(mask_preserve=weight)) for weight in (0, 1)]
    assert 1.6 < counted[1].flops / counted[0].flops < 1.8  # two
    assert counted[1].peak_bytes < 1.05 * counted[0].peak_bytes


# ---- check, preview, export ------------------------------------------------------------------------------------------


def test_an_export_has_the_masks_beside_the_frames(masked_clips, tmp_path):
    export.main([str(masked_clips), *SMALL, "--mask_column", "masks.txt", "--output_dir", str(tmp_path / "seen")])
    clips = read_listing([Folder(masked_clips)], Columns(mask="masks.txt")).clips
    for number, clip in enumerate(clips, start=1):
        folder = tmp_path / "seen" / f"{number:05d}"
        about, written = json.loads((folder / "frames.json").read_text()), sorted(folder.glob("*-mask.png"))
        assert about.get("mask") == (clip.mask and str(clip.mask)) and len(written) == (9 if clip.mask else 0)
        if clip.mask:
            pictures = torch.from_numpy(np.stack([np.array(Image.open(path)) for path in written]))
            assert torch.equal(pictures, masked(clip))


def test_the_preview_dims_what_does_not_count(masked_clips, tmp_path, capsys):
    frames, mask = torch.full((2, 4, 4, 3), 200, dtype=torch.uint8), torch.zeros(2, 4, 4, dtype=torch.uint8)
    mask[:, :, :2] = 255
    dimmed = preview.dimmed(frames, mask)
    assert (dimmed[:, :, :2] == 200).all() and (dimmed[:, :, 2:] == 50).all()
    page = tmp_path / "preview.html"
    preview.main([str(masked_clips), *SMALL, "--mask_column", "masks.txt", "--output", str(page)])
    assert page.read_text().count("the film is dimmed where the mask is black") == 2
    assert "with a mask: 2 clips; of 1 clip everything counts" in capsys.readouterr().out
