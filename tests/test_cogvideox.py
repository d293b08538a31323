"""Training's formulas against diffusers' own pipelines and against the formulas of the papers."""

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXVideoToVideoPipeline
from PIL import Image

import cogvideox

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
        return (torch.zeros_like(hidden_states),)


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

    checkpoint = cogvideox.read_checkpoint(str(folder))
    with cogvideox.video_encoder(checkpoint, torch.float32, "cpu", False, False) as encode:
        parameters = encode(clip)
    with cogvideox.caption_encoder(checkpoint, torch.float32, "cpu") as encode:
        prompt_embeds = encode(PROMPT)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: theirs[0]["timestep"])
    recorder = Recorder(checkpoint.transformer)
    batch = {"parameters": parameters[None], "prompt_embeds": prompt_embeds[None]}
    cogvideox.training_loss(checkpoint, recorder, batch, torch.Generator().manual_seed(3), torch.float32)
    assert_same_inputs(recorder.calls[0], theirs[0])


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
    checkpoint = cogvideox.read_checkpoint(str(folder))
    recorder = Recorder(checkpoint.transformer)
    batch = {
        "parameters": torch.zeros(1, 8, (num_frames - 1) // 4 + 1, height // 8, width // 8),
        "prompt_embeds": theirs[0]["encoder_hidden_states"],
    }
    cogvideox.training_loss(checkpoint, recorder, batch, torch.Generator(), torch.float32)
    ours = recorder.calls[0]
    assert ours["hidden_states"].shape == theirs[0]["hidden_states"].shape
    assert_same_inputs(*({k: v for k, v in x.items() if k == "image_rotary_emb" and v} for x in (ours, theirs[0])))


def test_latents_decode_to_the_clip_that_they_came_from(tiny_checkpoint, frames):
    """The scale that training applies is the one that the pipeline takes off."""
    pipeline = CogVideoXPipeline.from_pretrained(tiny_checkpoint)
    parameters = cogvideox.encode_video(pipeline.vae, frames(9))[None]
    mean = parameters.chunk(2, dim=1)[0]
    latents = cogvideox.sample_latents(
        torch.cat([mean, torch.full_like(mean, -30.0)], 1), pipeline.vae.config.scaling_factor, torch.Generator()
    )
    assert torch.allclose(pipeline.decode_latents(latents), pipeline.vae.decode(mean).sample, atol=1e-4)


def test_cached_parameters_give_fresh_latents_of_the_right_spread():
    parameters = torch.cat([torch.full((1, 4, 3, 16, 16), 2.0), torch.full((1, 4, 3, 16, 16), -2.0)], 1)
    draws = [cogvideox.sample_latents(parameters, 0.7, torch.Generator().manual_seed(seed)) for seed in range(2)]
    assert draws[0].shape == (1, 3, 4, 16, 16) and not torch.equal(*draws)
    assert draws[0].mean().item() == pytest.approx(1.4, abs=0.05)
    assert draws[0].std().item() == pytest.approx(0.7 * torch.tensor(-1.0).exp().item(), abs=0.02)


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_the_loss_is_the_weighted_denoising_loss_of_the_reference(checkpoint_of, variant):
    """mean((x0_predicted - x0)^2 / (1 - a)) in float64 on the same draws."""
    scheduler = cogvideox.read_checkpoint(str(checkpoint_of(variant))).scheduler
    latents = torch.randn(4, 3, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    prediction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    seen = {}

    def transformer(hidden_states, timestep, **_):
        seen.update(noisy=hidden_states.double(), timestep=timestep)
        return (prediction,)

    args = latents, torch.zeros(4, 226, 32), None, torch.Generator().manual_seed(2), torch.float32
    loss = cogvideox.velocity_loss(transformer, scheduler, *args)
    a = scheduler.alphas_cumprod.double()[seen["timestep"]].view(-1, 1, 1, 1, 1)
    predicted = a.sqrt() * seen["noisy"] - (1 - a).sqrt() * prediction.double()
    reference = ((predicted - latents.double()) ** 2 / (1 - a)).mean()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-4)


def test_noising_stays_in_float32_under_a_half_precision_transformer(tiny_checkpoint):
    """In bfloat16 the first timesteps would get no noise at all."""
    scheduler = cogvideox.read_checkpoint(str(tiny_checkpoint)).scheduler
    seen = {}

    def transformer(hidden_states, **_):
        seen["dtype"] = hidden_states.dtype
        return (torch.zeros_like(hidden_states),)

    latents = torch.zeros(64, 1, 4, 8, 12)
    losses = [
        cogvideox.velocity_loss(
            transformer, scheduler, latents, torch.zeros(64, 226, 32), None, torch.Generator().manual_seed(2), dtype
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert seen["dtype"] == torch.bfloat16
    assert losses[0] == losses[1]  # the target does not depend on the compute dtype


def test_timesteps_cover_the_schedule_one_per_sample(tiny_checkpoint):
    scheduler = cogvideox.read_checkpoint(str(tiny_checkpoint)).scheduler
    seen = []

    def transformer(hidden_states, timestep, **_):
        seen.append(timestep)
        return (torch.zeros_like(hidden_states),)

    for number in range(40):
        generator = cogvideox.generator_for(torch.device("cpu"), 42, number)
        cogvideox.velocity_loss(
            transformer, scheduler, torch.zeros(50, 1, 4, 2, 2), torch.zeros(50, 1, 32), None, generator, torch.float32
        )
    drawn = torch.cat(seen)
    assert drawn.dtype == torch.int64 and 0 <= drawn.min() < 10 and 990 <= drawn.max() <= 999
    assert len(seen[0].unique()) > 30
    assert torch.histc(drawn.float(), 10, 0, 1000).min() > 140  # 200 on average


def test_a_caption_that_is_too_long_is_cut_with_a_word(tiny_checkpoint):
    checkpoint = cogvideox.download(cogvideox.read_checkpoint(str(tiny_checkpoint)))
    with cogvideox.caption_encoder(checkpoint, torch.float32, "cpu") as encode:
        with pytest.warns(UserWarning, match="the last 75 are cut off of: a circle"):
            embeds = encode("a circle " * 150)
        assert embeds.shape == (226, 32)


# ---- LoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lora_weights_are_float32_over_any_base(tiny_checkpoint, dtype):
    transformer = cogvideox.load_transformer(cogvideox.read_checkpoint(str(tiny_checkpoint)), dtype)
    cogvideox.add_lora(transformer, 4, 8, ["to_q", "to_k", "to_v", "to_out.0"])
    trained = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 4 * 2  # A and B of four layers in two blocks
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert {w.dtype for name, w in transformer.named_parameters() if name not in trained} == {dtype}


def test_full_size_adapters_have_the_published_number_of_weights():
    for layers, heads, expected in ((30, 30, 58_982_400), (42, 48, 132_120_576)):
        transformer = cogvideox.empty_transformer(
            {"num_layers": layers, "num_attention_heads": heads, "use_rotary_positional_embeddings": heads == 48}
        )
        with torch.device("meta"):
            cogvideox.add_lora(transformer, 128, 128, ["to_q", "to_k", "to_v", "to_out.0"])
        assert sum(weight.numel() for weight in transformer.parameters() if weight.requires_grad) == expected


@pytest.mark.parametrize("targets", [["to_q", "to_typo"], ["norm_q"], ["transformer_blocks"]])
def test_a_target_that_is_no_linear_layer_is_named(tiny_checkpoint, targets):
    config = cogvideox.read_checkpoint(str(tiny_checkpoint)).transformer
    with pytest.raises(ValueError, match=f"--lora_target_modules {targets[-1]}: .* ff.net.0.proj"):
        cogvideox.check_lora_targets(config, targets)


# ---- what a checkpoint is


@pytest.mark.parametrize(
    ("variant", "text"),
    [("2b", "text-to-video, 2 layers of 2 heads, sin-cos"), ("5b", "rotary"), ("5b-I2V", "image-to-video")],
)
def test_the_variant_is_read_from_the_configs(checkpoint_of, variant, text, tmp_path):
    (tmp_path / "CogVideoX-2b-really").symlink_to(checkpoint_of(variant))
    assert text in cogvideox.read_checkpoint(str(tmp_path / "CogVideoX-2b-really")).describe()


def test_what_a_checkpoint_cannot_do_is_refused(checkpoint_of):
    with pytest.raises(ValueError, match="image-to-video checkpoint .8 input channels"):
        cogvideox.check_text_to_video(cogvideox.read_checkpoint(str(checkpoint_of("5b-I2V"))), torch.bfloat16, 64, 96)
    with pytest.raises(ValueError, match="NaN in float16"):
        cogvideox.check_text_to_video(cogvideox.read_checkpoint(str(checkpoint_of("1.5-5B"))), torch.float16, 64, 96)
    with pytest.raises(ValueError, match="--height 64 --width 112: the positions of .* end at 64x96"):
        cogvideox.check_text_to_video(cogvideox.read_checkpoint(str(checkpoint_of("1.5-5B"))), torch.bfloat16, 64, 112)


def test_encoders_that_encode_differently_have_different_fingerprints(checkpoint_of):
    two, five = (cogvideox.read_checkpoint(str(checkpoint_of(variant))) for variant in ("2b", "5b"))
    prints = [
        cogvideox.vae_fingerprint(two, torch.float32, False),
        cogvideox.vae_fingerprint(two, torch.float32, True),
        cogvideox.vae_fingerprint(two, torch.bfloat16, False),
        cogvideox.vae_fingerprint(five, torch.float32, False),
        cogvideox.text_fingerprint(two, torch.float32),
        cogvideox.text_fingerprint(two, torch.bfloat16),
    ]
    assert len(set(prints)) == len(prints)


def test_a_large_weight_file_that_changed_in_part_has_another_fingerprint(tmp_path):
    path = tmp_path / "model.safetensors"
    content = bytearray(torch.arange(5_000_000).numpy().tobytes())
    path.write_bytes(content)
    before = cogvideox._fingerprint(tmp_path)
    content[10_000_000:11_000_000] = bytes(1_000_000)
    path.write_bytes(content)
    assert cogvideox._fingerprint(tmp_path) != before
