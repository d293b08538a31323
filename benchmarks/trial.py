"""Runs a training script as it is in this process, and writes down what its updates cost or what they computed.

    python benchmarks/trial.py times times.json train_cogvideox_lora.py --rank 8 ...
    python benchmarks/trial.py capture theirs.pt path/to/diffusers/train_cogvideox_lora.py ...
    python benchmarks/trial.py replay theirs.pt ours.pt train_cogvideox_lora.py ...

`times`: time and peak memory at every update. `capture`, for diffusers' example: latents, noise, timesteps, embeddings,
the LoRA before and after, loss and gradients of every update. `replay`, for ours: the same of it when its loss is given
the LoRA and the draws of such a file.
"""

import contextlib
import functools
import json
import resource
import runpy
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from reference import stand_in_for_torchvision
from torch.optim.optimizer import register_optimizer_step_post_hook


def run_script(script: Path, argv: list[str]) -> None:
    """As `python script argv...` would, but in this process; modules are found in the folder of the script."""
    sys.argv, sys.path[0] = [str(script), *argv], str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


# ---- what updates cost -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def update_times(rows: list[dict]):
    """Appends a row per optimizer step: the time of day "at" its end and the "cpu" time so far, in seconds, "peak_gib".

    On a GPU the peak is that of the time since the row before, so that the first one holds loading and encoding; on a
    CPU it is the largest resident size so far. The clock waits for the GPU; both scripts read their loss there anyway.
    """

    def after_step(optimizer, args, kwargs):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append({"at": time.time(), "cpu": time.process_time(), "peak_gib": peak})

    hook = register_optimizer_step_post_hook(after_step)
    try:
        yield
    finally:
        hook.remove()


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_initialized() else "CPU"


# ---- what updates compute --------------------------------------------------------------------------------------------


def copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def lora_of(transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}


@contextlib.contextmanager
def wrapped(owner, name: str, wrapper):
    """`owner.name` is a function that calls `wrapper(original, ...)`, for the length of a `with` block."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(lambda *args, **options: wrapper(original, *args, **options)))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def update_values(records: list[dict]):
    """Fills a record per update: what the transformer is given, "loss", "gradients" before clipping, LoRA "after"."""
    from accelerate import Accelerator
    from diffusers import CogVideoXTransformer3DModel

    weights = {}

    def forward(original, transformer, **inputs):
        weights.update(lora_of(transformer))
        records[-1]["before"] = {name: copied(weight) for name, weight in weights.items()}
        for name in ("hidden_states", "encoder_hidden_states"):
            records[-1][name] = copied(inputs[name])
        return original(transformer, **inputs)

    def backward(original, accelerator, loss, **options):
        original(accelerator, loss, **options)
        records[-1]["loss"] = loss.item()
        records[-1]["gradients"] = {name: copied(weight.grad) for name, weight in weights.items()}

    def after_step(optimizer, args, kwargs):
        records[-1]["after"] = {name: copied(weight) for name, weight in weights.items()}

    hook = register_optimizer_step_post_hook(after_step)
    try:
        with wrapped(CogVideoXTransformer3DModel, "forward", forward), wrapped(Accelerator, "backward", backward):
            yield
    finally:
        hook.remove()


@contextlib.contextmanager
def captured_draws(records: list[dict]):
    """Begins a record with what diffusers' example draws for an update; it draws all before it adds the noise."""
    from diffusers import CogVideoXDPMScheduler

    def add_noise(original, scheduler, latents, noise, timesteps):
        draws = {"latents": latents, "noise": noise, "timesteps": timesteps}
        records.append({name: copied(tensor) for name, tensor in draws.items()})
        return original(scheduler, latents, noise, timesteps)

    with wrapped(CogVideoXDPMScheduler, "add_noise", add_noise):
        yield


@contextlib.contextmanager
def replayed_draws(records: list[dict], theirs: list[dict], folder: Path):
    """Our loss gets their LoRA, latents, noise, timesteps and embeddings instead of its own.

    Args:
        folder: where our modules lie.
    """
    sys.path.insert(0, str(folder))
    objective = import_module("cogvideox.objective")
    sys.path.pop(0)

    def velocity_loss(original, transformer, scheduler, latents, prompt_embeds, *args, **options):
        update, device = theirs[len(records)], latents.device
        records.append({})
        with torch.no_grad():
            for name, weight in lora_of(transformer).items():
                weight.copy_(update["before"][name])
        noise = update["noise"].to(device, latents.dtype)
        options["timesteps"] = update["timesteps"].to(device)
        with wrapped(objective, "randn_tensor", lambda *_, **__: noise):
            return original(
                transformer, scheduler, update["latents"].to(device, latents.dtype),
                update["encoder_hidden_states"].to(device), *args, **options,
            )  # fmt: skip

    with wrapped(objective, "velocity_loss", velocity_loss):
        yield


# ---- the three uses --------------------------------------------------------------------------------------------------


def times(output: Path, script: Path, argv: list[str]) -> None:
    has_stand_in = stand_in_for_torchvision()
    rows = []
    with update_times(rows):
        run_script(script, argv)
    about = {"device": device_name(), "threads": torch.get_num_threads(), "stand_in_for_torchvision": has_stand_in}
    output.write_text(json.dumps(about | {"updates": rows}))


def capture(output: Path, script: Path, argv: list[str]) -> None:
    stand_in_for_torchvision()
    records = []
    with captured_draws(records), update_values(records):
        run_script(script, argv)
    torch.save(records, output)


def replay(draws: Path, output: Path, script: Path, argv: list[str]) -> None:
    theirs, records = torch.load(draws, weights_only=True), []
    with replayed_draws(records, theirs, script.resolve().parent), update_values(records):
        run_script(script, argv)
    torch.save(records, output)


if __name__ == "__main__":
    use, *rest = sys.argv[1:]
    function = {"times": times, "capture": capture, "replay": replay}[use]
    files = 2 if use == "replay" else 1
    function(*map(Path, rest[: files + 1]), rest[files + 1 :])
