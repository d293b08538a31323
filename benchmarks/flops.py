"""Floating-point operations of one clip's training step, from a transformer's config alone, and what GPUs can do.

    python benchmarks/flops.py --model 5b --rank 128

Matrix products count, two operations for each number that is multiplied and added. What works number by number does not
(norms, RoPE, GELU, the loss, the optimizer), nor does the VAE that encodes the image of image-to-video, nor DoRA. In
the backward pass a product costs, in forward passes of it:

    frozen linear layer     1, for the gradient of its input
    all weights (SFT)       1 more, for that of its weight
    LoRA matrix             2
    attention               2.5, five products instead of two: flash kernels compute the scores again
                            (Dao 2023, arXiv:2307.08691, section 4.1)

and none of it for a gradient that nobody asks for: with a LoRA, the input of the first block needs none. That is what
autograd computes, operation by operation (tests/test_flops.py). "model FLOP" are forward and backward pass, of which
MFU is the share; "hardware FLOP" are also what --gradient_checkpointing computes again, of which HFU is the share. The
scores that flash kernels compute again are in both, also for --attention_backend math, which keeps them.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cogvideox.compute import LEVELS

# Dense bfloat16 TFLOP/s of the tensor cores with float32 sums, as NVIDIA's data sheets and whitepapers have them, by
# what torch.cuda.get_device_name says without "NVIDIA ". Whole names: a slice of a GPU (MIG) is named after it, too.
PEAK_TFLOPS = {
    "H200": 989, "H100 80GB HBM3": 989, "H100 PCIe": 756,
    "A100-SXM4-40GB": 312, "A100-SXM4-80GB": 312, "A100-PCIE-40GB": 312, "A100 80GB PCIe": 312,
    "A10": 125, "A30": 165, "A40": 149.7, "L4": 121, "L40S": 362,
    "GeForce RTX 3090": 71, "GeForce RTX 4090": 165,
}  # fmt: skip


def peak_tflops(device_name: str) -> float | None:
    """Of a GPU; None for one that is not in the table, and for a CPU."""
    return PEAK_TFLOPS.get(device_name.removeprefix("NVIDIA "))


class Trained(NamedTuple):
    """What is trained; the training script's options of these names."""

    training_type: str
    rank: int
    lora_target_modules: tuple[str, ...]

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Trained":
        return cls(args.training_type, args.rank, tuple(args.lora_target_modules))

    @property
    def sft(self) -> bool:
        return self.training_type == "sft"

    def has_lora(self, layer: str) -> bool:
        """Whether it has LoRA matrices: PEFT looks at the last words of its name."""
        targets = self.lora_target_modules
        return not self.sft and any(layer == target or layer.endswith(f".{target}") for target in targets)


class Flops(NamedTuple):
    """Of one clip's step."""

    forward: int
    backward: int
    attention: int  # of the forward pass
    recomputed: dict[str, int]  # by each level of --gradient_checkpointing

    @property
    def model(self) -> int:
        return self.forward + self.backward

    def hardware(self, level: str) -> int:
        return self.model + self.recomputed[level]


class Walk:
    """Adds up products on the way through the transformer; of each tensor it knows whether its gradient is needed."""

    def __init__(self, trained: Trained):
        self.trained = trained
        self.forward = self.backward = self.attention = 0

    def linear(self, name: str, needed: bool, rows: int, inputs: int, outputs: int) -> bool:
        """A linear layer, or a convolution whose patches do not overlap; returns whether its output needs a gradient.

        Args:
            needed: whether its input does.
        """
        sft, lora = self.trained.sft, self.trained.has_lora(name)
        product = 2 * rows * inputs * outputs
        self.forward += product
        self.backward += product * (needed + sft)
        if lora:
            down, up = 2 * rows * inputs * self.trained.rank, 2 * rows * self.trained.rank * outputs
            self.forward += down + up
            self.backward += down * (1 + needed) + up * 2  # what comes between the two always needs one
        return needed or sft or lora

    def attend(self, needed: bool, tokens: int, width: int) -> bool:
        """Attention of all tokens to all; kernels compute the gradients of queries, keys and values together."""
        product = 2 * tokens * tokens * width
        self.forward += 2 * product
        self.attention += 2 * product
        self.backward += 5 * product * needed
        return needed

    def block(self, needed: bool, conditioned: bool, tokens: int, width: int, time_width: int) -> bool:
        """CogVideoXBlock; `needed` is of its tokens, `conditioned` of the embedding of the timestep."""
        needed |= self.linear("norm1.linear", conditioned, 1, time_width, 6 * width)
        heads = [self.linear(f"attn1.{name}", needed, tokens, width, width) for name in ("to_q", "to_k", "to_v")]
        needed |= self.attend(any(heads), tokens, width)
        needed |= self.linear("attn1.to_out.0", needed, tokens, width, width)
        needed |= self.linear("norm2.linear", conditioned, 1, time_width, 6 * width)
        needed |= self.linear("ff.net.0.proj", needed, tokens, width, 4 * width)
        return self.linear("ff.net.2", needed, tokens, 4 * width, width)

    def embedding(self, name: str, inputs: int, outputs: int) -> bool:
        """Of a timestep, or of CogVideoX 1.5's ofs."""
        needed = self.linear(f"{name}.linear_1", False, 1, inputs, outputs)
        return self.linear(f"{name}.linear_2", needed, 1, outputs, outputs)


def step_flops(config: dict, tokens: int, trained: Trained) -> Flops:
    """Of a CogVideoXTransformer3DModel with that config (diffusers 0.42.1), for a clip of so many tokens with text."""
    walk, text, time_width = Walk(trained), config["max_text_seq_length"], config["time_embed_dim"]
    width, video = config["num_attention_heads"] * config["attention_head_dim"], tokens - text
    patch = config["patch_size"] ** 2 * (config["patch_size_t"] or 1)

    conditioned = walk.embedding("time_embedding", width, time_width)
    if ofs_width := config["ofs_embed_dim"]:
        conditioned |= walk.embedding("ofs_embedding", ofs_width, ofs_width)
    needed = walk.linear("patch_embed.text_proj", False, text, config["text_embed_dim"], width)
    needed |= walk.linear("patch_embed.proj", False, video, config["in_channels"] * patch, width)

    before = walk.forward
    for _ in range(config["num_layers"]):
        needed = walk.block(needed, conditioned, tokens, width, time_width)
    blocks = (walk.forward - before) * needed  # nobody goes back into blocks that need no gradient

    needed |= walk.linear("norm_out.linear", conditioned, 1, time_width, 2 * width)
    walk.linear("proj_out", needed, video, width, config["out_channels"] * patch)
    recomputed = {"none": 0, "attention": blocks and blocks - walk.attention, "full": blocks}
    return Flops(walk.forward, walk.backward, walk.attention, recomputed)


# ---- the table -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    import step  # which imports this module

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    option = parser.add_argument
    option("--model", choices=list(step.MODELS), default="2b", help="as in benchmarks/step.py, with clips of its size")
    option("--training_type", choices=["lora", "sft"], default="lora", help="a LoRA, or all weights")
    option("--rank", type=int, metavar="N", help="of the LoRA matrices (default: 128)")
    options = parser.parse_args(argv)

    given = [f"--{name}={value}" for name, value in vars(options).items() if value is not None]
    args = step.training_args(step.parse_args(given))
    checkpoint = step.random_base_model(options.model)
    tokens = checkpoint.num_tokens(*checkpoint.latent_shape(args.max_num_frames, args.height, args.width))
    print(f"{options.model}, {args.training_type}, {tokens:,} tokens a clip; TFLOP of its step:")
    for name, count in rows(step_flops(checkpoint.transformer, tokens, Trained.of(args))).items():
        print(f"{name:<24}{count / 1e12:10,.1f}")


def rows(flops: Flops) -> dict[str, int]:
    parts = {"forward": flops.forward, "  attention in it": flops.attention, "backward": flops.backward}
    return parts | {"model": flops.model} | {f"hardware, {level}": flops.hardware(level) for level in LEVELS}


if __name__ == "__main__":
    main()
