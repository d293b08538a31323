"""Training's formulas against diffusers' own pipelines and against the formulas of the papers."""

import json
import shutil

import pytest
import torch
from diffusers import (
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from make_example import VARIANTS, make_clips
from PIL import Image

import cli_demo
from clips.frames import View, read_frames
from cogvideox import base_model
from cogvideox.base_model import (
    PUBLISHED,
    check_training,
    download_weights,
    published_as,
    read_base_model,
    read_text_encoder_config,
)
from cogvideox.budget import MemoryPlan
from cogvideox.encoders import (
    _fingerprint,
    caption_encoder,
    describe_cut_captions,
    encode_videos,
    image_encoder,
    text_fingerprint,
    vae_fingerprint,
    video_encoder,
)
from cogvideox.objective import (
    condition_on_images,
    generator_for,
    noisy_images,
    sample_latents,
    training_loss,
    velocity_loss,
)

HEIGHT, WIDTH, PROMPT = 64, 96, "a red circle moves left"


@pytest.fixture
def frames():
    generator = torch.Generator().manual_seed(1)
    return lambda count: torch.randint(0, 256, (count, HEIGHT, WIDTH, 3), generator=generator, dtype=torch.uint8)


class Recorder(torch.nn.Module):
    """Stands for the transformer, remembers what it is given, and predicts zeros."""

    def __init__(self, config):
        super().__init__()
        self.config, self.dtype, self.calls = config, torch.float32, []

    def forward(self, hidden_states, **inputs):
        self.calls.append({"hidden_states": hidden_states} | inputs)
        return (torch.zeros_like(hidden_states[:, :, : self.config["out_channels"]]),)


def record(transformer):
    """What the transformer of a pipeline receives, call by call."""
    calls = []

    def hook(module, args, kwargs):
        assert not args
        calls.append({name: value for name, value in kwargs.items() if value is not None})

    transformer.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


def assert_same_inputs(ours, theirs):
    ours = {name: value for name, value in ours.items() if value is not None}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        for mine, its in zip(*((x if isinstance(x, tuple) else (x,)) for x in (ours[name], value))):
            if isinstance(its, torch.Tensor):
                assert mine.dtype == its.dtype and mine.shape == its.shape, name
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(its)), name


@pytest.mark.parametrize(("variant", "num_frames"), [("2b", 9), ("2b", 1), ("5b", 9), ("5b", 17), ("1.5-5B", 5)])
def test_what_training_feeds_the_transformer_is_what_the_pipeline_feeds_it(
    checkpoint_of, frames, monkeypatch, variant, num_frames
):
    """Bit for bit, for the same clip, prompt, timestep and seed; the video-to-video pipeline noises a clip as well."""
    folder, clip = checkpoint_of(variant), frames(num_frames)
    pipeline = CogVideoXVideoToVideoPipeline.from_pretrained(folder)
    theirs = record(pipeline.transformer)
    pipeline(
        video=[Image.fromarray(frame.numpy()) for frame in clip], prompt=PROMPT, height=HEIGHT, width=WIDTH,
        num_inference_steps=4, strength=0.5, guidance_scale=1, generator=torch.Generator().manual_seed(3),
        output_type="latent",
    )  # fmt: skip

    checkpoint = read_base_model(str(folder))
    with video_encoder(checkpoint, torch.float32, "cpu", tiling=False, slicing=False) as encode:
        parameters = encode(clip[None])
    with caption_encoder(checkpoint, torch.float32, "cpu") as encode:
        prompt_embeds = encode([PROMPT])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: theirs[0]["timestep"])
    recorder = Recorder(checkpoint.transformer)
    batch = {"parameters": parameters, "prompt_embeds": prompt_embeds}
    training_loss(checkpoint, recorder, batch, torch.Generator().manual_seed(3), torch.float32)
    assert_same_inputs(recorder.calls[0], theirs[0])


@pytest.mark.parametrize(("variant", "num_frames"), [("5b-I2V", 9), ("1.5-5B-I2V", 9), ("1.5-5B-I2V", 5)])
def test_what_image_to_video_training_feeds_the_transformer_is_what_the_pipeline_feeds_it(
    checkpoint_of, frames, monkeypatch, variant, num_frames
):
    """Bit for bit at the first two timesteps, for the same video, prompt and image.

    The pipeline starts from noise alone, so that at its second step it is given the noisy clip. It knows neither the
    image's noise nor its dropout (their tests are below), and it draws from the encodings in another order, so here
    every draw is the mean.
    """
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda distribution, generator: distribution.mode())
    monkeypatch.setattr("cogvideox.objective.noisy_images", lambda images, generator: images)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.ones(shape))
    folder, clip = checkpoint_of(variant), frames(num_frames)
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(folder)
    channels, mean = 4, pipeline.vae.encode(clip.permute(3, 0, 1, 2)[None] / 127.5 - 1).latent_dist.mode()

    checkpoint = read_base_model(str(folder))
    with video_encoder(checkpoint, torch.float32, "cpu", tiling=False, slicing=False) as encode:
        parameters = encode(clip[None])
    with caption_encoder(checkpoint, torch.float32, "cpu") as encode:
        prompt_embeds = encode([PROMPT])
    batch = {"parameters": parameters, "prompt_embeds": prompt_embeds, "image": clip[:1]}
    recorder = Recorder(checkpoint.transformer)
    with image_encoder(checkpoint, torch.float32, "cpu", tiling=False, slicing=False) as encode:
        for timestep in (999, 499):
            monkeypatch.setattr(torch, "randint", lambda *_, t=timestep, **__: torch.tensor([t]))
            training_loss(checkpoint, recorder, batch, torch.Generator().manual_seed(3), torch.float32, encode)
    noise, noisy = (call["hidden_states"][:, :, :channels] for call in recorder.calls)
    assert torch.equal(noise, torch.randn(noise.shape, generator=torch.Generator().manual_seed(3)))
    latents = mean.transpose(1, 2) * pipeline.vae.config.scaling_factor
    latents = torch.cat([latents[:, : noise.shape[1] - latents.shape[1]], latents], dim=1)  # the even number of 1.5
    assert torch.equal(noisy, pipeline.scheduler.add_noise(latents, noise, torch.tensor([499])))

    theirs = record(pipeline.transformer)
    pipeline(
        image=Image.fromarray(clip[0].numpy()), prompt=PROMPT, height=HEIGHT, width=WIDTH, num_frames=num_frames,
        num_inference_steps=2, guidance_scale=1, latents=noise, output_type="latent",
        callback_on_step_end=lambda *_: {"latents": noisy},
    )  # fmt: skip
    for ours, its in zip(recorder.calls, theirs, strict=True):
        assert_same_inputs(ours, its)
    assert recorder.calls[0]["hidden_states"][:, 0, channels:].abs().max() > 0


# The video-to-video pipeline of 1.5 takes even numbers of latents. Its positions end at 64x96; 5b-I2V has no others.
BUCKETS_OF = {
    "2b": ["9x64x96", "9x96x64", "1x48x80"],
    "5b": ["9x64x96", "5x96x96", "1x80x48"],
    "5b-I2V": ["9x64x96"],
    "1.5-5B": ["5x64x96", "5x64x48", "5x48x80"],
    "1.5-5B-I2V": ["9x64x96", "9x64x64", "5x48x80"],
}


@pytest.mark.parametrize(("variant", "bucket"), [(name, size) for name, sizes in BUCKETS_OF.items() for size in sizes])
def test_what_the_training_script_feeds_a_transformer_is_what_the_pipeline_feeds_it(
    checkpoint_of, tmp_path, train, monkeypatch, variant, bucket
):
    """The whole script on a real clip, from its file through the cache, recorded on the model's own forward.

    As above without the image's noise and with the mean of every encoding, so that both draw the noise first. The clip
    is encoded alone, as those of published sizes always are: beside others, small ones differ by rounding.
    """
    calls = []
    forward = CogVideoXTransformer3DModel.forward

    def watch(transformer, *args, **inputs):
        assert not args
        calls.append({name: value for name, value in inputs.items() if value is not None})
        return forward(transformer, **inputs)

    no_rehearsal = MemoryPlan("none", tile_encoding=False, tile_decoding=False)  # it would be recorded, too
    monkeypatch.setattr("train_cogvideox_lora.plan_memory", lambda *_: no_rehearsal)
    monkeypatch.setattr(CogVideoXTransformer3DModel, "forward", watch)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda distribution, generator: distribution.mode())
    monkeypatch.setattr("cogvideox.objective.noisy_images", lambda images, generator: images)
    clips, takes_image = make_clips(tmp_path / "clips", count=1), variant.endswith("I2V")
    num_frames, height, width = map(int, bucket.split("x"))
    timestep = 999 if takes_image else 499  # the image-to-video pipeline begins with noise alone
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **_: torch.ones(shape))
        patch.setattr(torch, "randint", lambda *_, **__: torch.tensor([timestep]))
        train(
            checkpoint_of(variant), tmp_path / "run", instance_data_root=clips, buckets=bucket, max_train_steps=1,
            id_token="STYLE", enable_slicing=True,
        )  # fmt: skip
    view = View(height, width, 8, num_frames, 0, 0, "center", 0)
    frames = read_frames(clips / (clips / "videos.txt").read_text().strip(), view, mirrored=False)
    images = [Image.fromarray(frame.numpy()) for frame in frames]
    options = {"height": height, "width": width, "guidance_scale": 1, "output_type": "latent"}
    options["prompt"] = "STYLE " + (clips / "prompts.txt").read_text().strip()
    options["generator"] = generator_for(torch.device("cpu"), 3407, 0)
    if takes_image:
        pipeline = CogVideoXImageToVideoPipeline.from_pretrained(checkpoint_of(variant))
        pipeline(image=images[0], num_frames=num_frames, num_inference_steps=1, **options)
    else:
        pipeline = CogVideoXVideoToVideoPipeline.from_pretrained(checkpoint_of(variant))
        pipeline(video=images, num_inference_steps=2, strength=0.5, **options)
    assert len(calls) == 2 and calls[1]["timestep"].item() == timestep
    assert_same_inputs(calls[0] | {"attention_kwargs": None}, calls[1])


def test_the_image_gets_noise_of_a_scale_of_its_own():
    """exp(N(-3, 0.5)), other for each image and each draw."""
    images = torch.zeros(400, 8, 8, 3)
    noisy = noisy_images(images, torch.Generator().manual_seed(0))
    scales = noisy.flatten(1).std(dim=1).log()
    assert scales.mean().item() == pytest.approx(-3, abs=0.1) and scales.std().item() == pytest.approx(0.5, abs=0.1)
    assert not torch.equal(noisy, noisy_images(images, torch.Generator().manual_seed(1)))


def test_one_image_in_twenty_is_dropped_whole(checkpoint_of):
    checkpoint = read_base_model(str(checkpoint_of("5b-I2V")))
    images = torch.zeros(2000, 2, 2, 3, dtype=torch.uint8)
    encode = lambda images: torch.ones(len(images), 8, 1, 2, 2)  # noqa: E731
    latents = condition_on_images(checkpoint, encode, images, 3, torch.Generator().manual_seed(0))
    assert latents.shape == (2000, 3, 4, 2, 2) and not latents[:, 1:].any()
    empty = [not latent.any() for latent in latents]
    assert 70 < sum(empty) < 130
    assert all(latent[0].all() for latent, none in zip(latents, empty) if not none)


SIZES = [(64, 96, 9), (64, 64, 17), (48, 96, 1)]


@pytest.mark.parametrize(
    ("variant", "height", "width", "num_frames"),
    [(variant, *size) for variant in ("2b", "5b", "1.5-5B") for size in SIZES]
    + [("2b", 96, 80, 25), ("5b", 96, 80, 25)],  # the positions of 1.5 end at the size in its config
)
def test_shapes_and_positions_are_those_of_the_text_to_video_pipeline(
    checkpoint_of, variant, height, width, num_frames
):
    folder = checkpoint_of(variant)
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    theirs = record(pipeline.transformer)
    pipeline(
        PROMPT, height=height, width=width, num_frames=num_frames, num_inference_steps=1, guidance_scale=1,
        output_type="latent",
    )  # fmt: skip
    checkpoint = read_base_model(str(folder))
    recorder = Recorder(checkpoint.transformer)
    batch = {
        "parameters": torch.zeros(1, 8, (num_frames - 1) // 4 + 1, height // 8, width // 8),
        "prompt_embeds": theirs[0]["encoder_hidden_states"],
    }
    training_loss(checkpoint, recorder, batch, torch.Generator(), torch.float32)
    ours = recorder.calls[0]
    assert ours["hidden_states"].shape == theirs[0]["hidden_states"].shape
    assert_same_inputs(*({k: v for k, v in x.items() if k == "image_rotary_emb" and v} for x in (ours, theirs[0])))


def test_latents_decode_to_the_clip_that_they_came_from(tiny_checkpoint, frames):
    """The scale that training applies is the one that the pipeline takes off."""
    pipeline = CogVideoXPipeline.from_pretrained(tiny_checkpoint)
    parameters = encode_videos(pipeline.vae, frames(9)[None])
    mean = parameters.chunk(2, dim=1)[0]
    latents = sample_latents(
        torch.cat([mean, torch.full_like(mean, -30.0)], 1), pipeline.vae.config.scaling_factor, torch.Generator()
    )
    assert torch.allclose(pipeline.decode_latents(latents), pipeline.vae.decode(mean).sample, atol=1e-4)


def test_cached_parameters_give_fresh_latents_of_the_right_spread():
    parameters = torch.cat([torch.full((1, 4, 3, 16, 16), 2.0), torch.full((1, 4, 3, 16, 16), -2.0)], 1)
    draws = [sample_latents(parameters, 0.7, torch.Generator().manual_seed(seed)) for seed in range(2)]
    assert draws[0].shape == (1, 3, 4, 16, 16) and not torch.equal(*draws)
    assert draws[0].mean().item() == pytest.approx(1.4, abs=0.05)
    assert draws[0].std().item() == pytest.approx(0.7 * torch.tensor(-1.0).exp().item(), abs=0.02)


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_the_loss_is_the_weighted_denoising_loss_of_the_reference(checkpoint_of, variant):
    """mean((x0_predicted - x0)^2 / (1 - a)) in float64 on the same draws."""
    scheduler = read_base_model(str(checkpoint_of(variant))).scheduler
    latents = torch.randn(4, 3, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    prediction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    seen = {}

    def transformer(hidden_states, timestep, **_):
        seen.update(noisy=hidden_states.double(), timestep=timestep)
        return (prediction,)

    args = latents, torch.zeros(4, 226, 32), None, torch.Generator().manual_seed(2), torch.float32
    loss = velocity_loss(transformer, scheduler, *args)
    a = scheduler.alphas_cumprod.double()[seen["timestep"]].view(-1, 1, 1, 1, 1)
    predicted = a.sqrt() * seen["noisy"] - (1 - a).sqrt() * prediction.double()
    reference = ((predicted - latents.double()) ** 2 / (1 - a)).mean()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-4)


def test_noising_stays_in_float32_under_a_half_precision_transformer(tiny_checkpoint):
    """In bfloat16 the first timesteps would get no noise at all."""
    scheduler = read_base_model(str(tiny_checkpoint)).scheduler
    seen = {}

    def transformer(hidden_states, **_):
        seen["dtype"] = hidden_states.dtype
        return (torch.zeros_like(hidden_states),)

    latents = torch.zeros(64, 1, 4, 8, 12)
    losses = [
        velocity_loss(
            transformer, scheduler, latents, torch.zeros(64, 226, 32), None, torch.Generator().manual_seed(2), dtype
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert seen["dtype"] == torch.bfloat16
    assert losses[0] == losses[1]  # the target does not depend on the compute dtype


def test_timesteps_cover_the_schedule_one_per_sample(tiny_checkpoint):
    scheduler = read_base_model(str(tiny_checkpoint)).scheduler
    seen = []

    def transformer(hidden_states, timestep, **_):
        seen.append(timestep)
        return (torch.zeros_like(hidden_states),)

    for number in range(40):
        generator = generator_for(torch.device("cpu"), 42, number)
        velocity_loss(
            transformer, scheduler, torch.zeros(50, 1, 4, 2, 2), torch.zeros(50, 1, 32), None, generator, torch.float32
        )
    drawn = torch.cat(seen)
    assert drawn.dtype == torch.int64 and 0 <= drawn.min() < 10 and 990 <= drawn.max() <= 999
    assert len(seen[0].unique()) > 30
    assert torch.histc(drawn.float(), 10, 0, 1000).min() > 140  # 200 on average


def test_captions_that_are_too_long_are_cut_with_one_line_for_all_of_them(tiny_checkpoint):
    checkpoint, cut = download_weights(read_base_model(str(tiny_checkpoint))), {}
    with caption_encoder(checkpoint, torch.float32, "cpu", cut=cut) as encode:
        embeds = encode(["a circle", "a circle " * 150])
        assert embeds.shape == (2, 226, 32)
    line = "CogVideoX reads 226 tokens of a caption; 1 caption is longer and cut off: the last 75 of: a circle a"
    assert line in describe_cut_captions(cut, 226)
    cut = {}
    with caption_encoder(checkpoint, torch.float32, "cpu", cut=cut) as encode:
        for number in (160, 130, 150, 170, 150):  # the last one is encoded twice, as in a batch that is filled up
            encode(["a circle " * number])
    said = describe_cut_captions(cut, 226)
    assert "4 captions are longer and cut off, such as: the last 115 of: a circle" in said
    assert said.count("; the last") == 2 and "the last 75 of" in said and "the last 35 of" not in said
    cut = {}
    with caption_encoder(checkpoint, torch.float32, "cpu", cut=cut) as encode:
        encode(["a circle"])
    assert cut == {}


# ---- what a base model is


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path, monkeypatch):
    """huggingface_hub 2.4 itself would ask six times, for 23 seconds."""
    requests, loads = [], []
    load_config = base_model.DiffusionPipeline.load_config

    class Session:
        def head(self, url, **options):
            requests.append(url)
            raise base_model.httpx.ConnectError("no network")

    def load(name, **options):
        loads.append(options["local_files_only"])
        return load_config(name, **options)

    monkeypatch.setattr(base_model, "get_session", Session)
    monkeypatch.setattr(base_model.DiffusionPipeline, "load_config", load)
    with pytest.raises(ValueError, match="no/such-model: .*no such folder; the hub cannot be reached"):
        read_base_model("no/such-model", cache_dir=tmp_path)
    assert len(requests) == 1 and loads == [True]


def test_a_folder_is_read_without_asking_the_hub(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(base_model, "get_session", lambda: pytest.fail("the hub was asked"))
    read_text_encoder_config(read_base_model(str(tiny_checkpoint)))


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("2b", "CogVideoX-2b"),
        ("5b-I2V", "CogVideoX-5b-I2V"),
        ("1.5-5B", "CogVideoX1.5-5B"),
        ("1.5-5B-I2V", "CogVideoX1.5-5B-I2V"),
    ],
)
def test_a_base_model_is_compared_with_the_published_one_of_its_kind(checkpoint_of, variant, name):
    base = read_base_model(str(checkpoint_of(variant)))
    assert base.published == published_as(f"zai-org/{name}") == published_as(f"THUDM/{name}")
    assert [bool(base.remarks({"": (9, 64, 96)}, fps)) for fps in (8, 16)] == [variant.startswith("1.5"), False]


def test_a_size_far_from_the_base_model_s_is_remarked_on(checkpoint_of):
    base = read_base_model(str(checkpoint_of("5b")))
    (said,) = base.remarks({"--buckets 9x480x720": (9, 480, 720)}, 8)
    assert said.startswith("--buckets 9x480x720: the base model was made for 64x96")
    assert len(base.remarks({"a": (9, 32, 80), "b": (9, 96, 144), "c": (9, 64, 96)}, 8)) == 2
    for height, width in ((64, 96), (96, 64), (80, 112), (48, 80)):
        assert base.remarks({"": (9, height, width)}, 8) == [], (height, width)
    large = base._replace(transformer=base.transformer | {"sample_height": 300, "sample_width": 300})  # as 1.5-I2V
    assert large.remarks({"": (9, 480, 720)}, 8) == []


def test_only_the_publishers_names_are_published_models():
    assert len({row.name for row in PUBLISHED}) == 5
    assert published_as("someone/CogVideoX-2b") is None and published_as("CogVideoX-2b") is None


@pytest.mark.parametrize(
    ("variant", "text"),
    [
        ("2b", "text-to-video, 2 layers of 2 heads, sin-cos"),
        ("5b", "rotary"),
        ("5b-I2V", "image-to-video, 2 layers of 2 heads, rotary and learned"),
        ("1.5-5B-I2V", "image-to-video"),
    ],
)
def test_the_variant_is_read_from_the_configs(checkpoint_of, variant, text, tmp_path):
    (tmp_path / "CogVideoX-2b-really").symlink_to(checkpoint_of(variant))
    assert text in read_base_model(str(tmp_path / "CogVideoX-2b-really")).describe()


@pytest.mark.parametrize(
    ("variant", "dtype", "size", "options", "message"),
    [
        ("1.5-5B", torch.float16, (9, 64, 96), [], "NaN in float16"),
        ("1.5-5B", torch.bfloat16, (9, 64, 112), [], "--height 64 --width 112: the positions of .* end at 64x96"),
        ("2b", torch.bfloat16, (9, 64, 96), ["--image_column"], "--image_column: .* text-to-video model .4 input"),
        ("5b-I2V", torch.bfloat16, (9, 64, 112), [], "learned positions for 9 frames of 64x96 pixels only"),
        ("5b-I2V", torch.bfloat16, (17, 64, 96), [], "--max_num_frames 17 .* learned positions for 9 frames"),
    ],
)
def test_what_a_checkpoint_cannot_do_is_refused(checkpoint_of, variant, dtype, size, options, message):
    checkpoint = read_base_model(str(checkpoint_of(variant)))
    with pytest.raises(ValueError, match=message):
        named = f"--max_num_frames {size[0]} --height {size[1]} --width {size[2]}"
        check_training(checkpoint, dtype, {named: size}, options)


FOREIGN = {  # name: (base model to start from, fields of its configs that are changed, parts of the message)
    "Fun Control": (
        "5b",
        {"model_index": {"_class_name": "CogVideoXFunControlPipeline"}, "transformer/config": {"in_channels": 8}},
        ["holds a CogVideoXFunControlPipeline (CogVideoX-Fun, ", "not a CogVideoXPipeline or a ", "use a base model"],
    ),
    "Fun Control as a text-to-video pipeline": (
        "5b",
        {"transformer/config": {"in_channels": 8}},
        ["8 input channels for 4 output", "text-to-video pipeline, which takes 4", "probably CogVideoX-Fun Control"],
    ),
    "Fun Control as a video-to-video pipeline": (
        "5b",
        {"model_index": {"_class_name": "CogVideoXVideoToVideoPipeline"}, "transformer/config": {"in_channels": 8}},
        ["8 input channels for 4 output", "which takes 4: probably CogVideoX-Fun Control, which sees a second video"],
    ),
    "Fun InP": (
        "5b",
        {"model_index": {"_class_name": "CogVideoXFunInpaintPipeline"}, "transformer/config": {"in_channels": 9}},
        ["holds a CogVideoXFunInpaintPipeline (CogVideoX-Fun, "],
    ),
    "Fun InP as a text-to-video pipeline": (
        "5b",
        {"transformer/config": {"in_channels": 9}},
        ["9 input channels for 4 output", "which takes 4: probably CogVideoX-Fun InP, which sees a masked video"],
    ),
    "Fun InP as an image-to-video pipeline, with another scheduler": (
        "5b-I2V",
        {"model_index": {"scheduler": ["diffusers", "DDIMScheduler"]}, "transformer/config": {"in_channels": 9}},
        ["9 input channels for 4 output", "image-to-video pipeline, which takes 8: probably CogVideoX-Fun InP"],
    ),
    "text-to-video as an image-to-video pipeline": (
        "2b",
        {"model_index": {"_class_name": "CogVideoXImageToVideoPipeline"}},
        ["4 input channels", "which takes 8: probably a text-to-video transformer with the model_index.json"],
    ),
    "image-to-video as a text-to-video pipeline": (
        "1.5-5B-I2V",
        {"model_index": {"_class_name": "CogVideoXPipeline"}},
        ["8 input channels", "which takes 4: ", "or an image-to-video transformer with the model_index.json"],
    ),
    "three inputs": (
        "2b",
        {"transformer/config": {"in_channels": 12}},
        ["12 input channels", "which takes 4: probably a model for another task; use a base model such as THUDM/"],
    ),
    "another VAE": (
        "2b",
        {"vae/config": {"latent_channels": 16}},
        ["has a VAE of 16 latent channels, but the transformer has 4 output", "take vae/ and transformer/ from the sa"],
    ),
    "another transformer": (
        "5b-I2V",
        {"transformer/config": {"_class_name": "ConsisIDTransformer3DModel"}},
        ["transformer/config.json is of a ConsisIDTransformer3DModel, not of a CogVideoXTransformer3DModel; use a"],
    ),
    "another pipeline": (
        "5b-I2V",
        {"model_index": {"_class_name": "ConsisIDPipeline"}},
        ["holds a ConsisIDPipeline, not a CogVideoXPipeline or a ", "; use a base model such as THUDM/CogVideoX-2b"],
    ),
    "no pipeline": ("2b", {"model_index": {"_class_name": None}}, ["holds a None, not a CogVideoXPipeline or a "]),
}  # fmt: skip


def changed(folder, target, changes):
    """Copies a base model with other fields in its configs; returns the copy."""
    shutil.copytree(folder, target)
    for name, fields in changes.items():
        path = target / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return target


@pytest.mark.parametrize(("part", "field"), [
    ("transformer/config", "num_layers"),
    ("vae/config", "layers_per_block"),
    ("scheduler/scheduler_config", "num_train_timesteps"),
    ("text_encoder/config", "num_layers"),
])  # fmt: skip
def test_a_config_that_would_take_hours_to_build_is_refused_by_name(
    checkpoint_of, tmp_path, train, capsys, part, field
):
    folder = changed(checkpoint_of("2b"), tmp_path / "base", {part: {field: 10**9}})
    with pytest.raises(SystemExit) as stop:
        train(folder, tmp_path / "run")
    assert stop.value.code == 2
    expected = f"{folder}: {part.split('/')[0]}/ has {field} 1,000,000,000 in its config, and no base model has more"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("script", ["training", "cli_demo.py"])
@pytest.mark.parametrize("name", FOREIGN)
def test_another_base_model_is_refused_by_name(checkpoint_of, tmp_path, train, capsys, name, script):
    variant, changes, parts = FOREIGN[name]
    folder = changed(checkpoint_of(variant), tmp_path / "base", changes)
    with pytest.raises(SystemExit) as stop:
        if script == "training":
            train(folder, tmp_path / "run")
        else:
            cli_demo.main(cli_demo.parse_args(["--prompt", "a cat", "--model_path", str(folder)]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert all(part in error for part in [f"{folder}: ", *parts]), error


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_save_pretrained_makes_of_a_base_model_is_read_as_the_same(checkpoint_of, tmp_path, variant):
    pipeline = CogVideoXImageToVideoPipeline if variant.endswith("I2V") else CogVideoXVideoToVideoPipeline
    pipeline.from_pretrained(checkpoint_of(variant)).save_pretrained(tmp_path)
    base, again = read_base_model(str(checkpoint_of(variant))), read_base_model(str(tmp_path))
    assert (base.identity, base.published) == (again.identity, again.published)
    assert base.published.task == ("image-to-video" if variant.endswith("I2V") else "text-to-video")


def test_encoders_that_encode_differently_have_different_fingerprints(checkpoint_of):
    two, five = (read_base_model(str(checkpoint_of(variant))) for variant in ("2b", "5b"))
    prints = [
        vae_fingerprint(two, torch.float32, tiling=False),
        vae_fingerprint(two, torch.float32, tiling=True),
        vae_fingerprint(two, torch.bfloat16, tiling=False),
        vae_fingerprint(five, torch.float32, tiling=False),
        text_fingerprint(two, torch.float32),
        text_fingerprint(two, torch.bfloat16),
    ]
    assert len(set(prints)) == len(prints)


def test_a_large_weight_file_that_changed_in_part_has_another_fingerprint(tmp_path):
    path = tmp_path / "model.safetensors"
    content = bytearray(torch.arange(5_000_000).numpy().tobytes())
    path.write_bytes(content)
    before = _fingerprint(tmp_path)
    content[10_000_000:11_000_000] = bytes(1_000_000)
    path.write_bytes(content)
    assert _fingerprint(tmp_path) != before
