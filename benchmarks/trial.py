"""Runs an unmodified training script in this process, and records what its updates cost or compute.

    python benchmarks/trial.py times times.json train_cogvideox_lora.py --rank 8 ...
    python benchmarks/trial.py capture theirs.pt path/to/diffusers/train_cogvideox_lora.py ...
    python benchmarks/trial.py replay theirs.pt ours.pt train_cogvideox_lora.py ...
    python benchmarks/trial.py curve curve.pt 10,20,40 train_cogvideox_lora.py ...

times:   time and peak memory of every update
capture: for diffusers' example: latents, noise, timesteps, embeddings, LoRA before and after, loss and gradients of
         every update
replay:  for our script: the same, with the LoRA and the draws of a captured file in place of its own
curve:   the LoRA after each of some updates, and when that was
"""

import contextlib
import functools
import json
import resource
import runpy
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path

import torch
from reference import stand_in_for_torchvision
from torch.optim.optimizer import register_optimizer_step_post_hook


def run_script(script: Path, argv: list[str]) -> None:
    """Runs a script in this process as `python script argv...` would, with imports from the script's folder."""
    sys.argv, sys.path[0] = [str(script), *argv], str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


@contextlib.contextmanager
def after_updates(call: Callable[[torch.optim.Optimizer], None]):
    """Calls `call` after every optimizer step in a `with` block, but not in our script's rehearsal."""

    def after_step(optimizer, args, kwargs) -> None:
        sizes = [weight.numel() for group in optimizer.param_groups for weight in group["params"]]
        if sizes != [2**14]:  # the weight in cogvideox.rehearsal.optimizer_bytes
            call(optimizer)

    hook = register_optimizer_step_post_hook(after_step)
    try:
        yield
    finally:
        hook.remove()


# ---- what updates cost -----------------------------------------------------------------------------------------------


def update_times(rows: list[dict]) -> AbstractContextManager[None]:
    """Appends a row per optimizer step: time of day "at" its end, "cpu" time so far, both in seconds, and "peak_gib".

    On a GPU, the peak since the previous row; the first one includes loading and encoding. On a CPU, the largest
    resident size so far. The clock waits for the GPU; both scripts read their loss there anyway.
    """

    def append_row(_) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append({"at": time.time(), "cpu": time.process_time(), "peak_gib": peak})

    return after_updates(append_row)


# ---- what updates compute --------------------------------------------------------------------------------------------


def cpu_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def lora_weights(transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}


@contextlib.contextmanager
def wrapped(owner, name: str, wrapper):
    """Replaces the function `owner.name` by `wrapper(original, ...)` for the length of a `with` block."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(lambda *args, **options: wrapper(original, *args, **options)))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def update_values(records: list[dict]):
    """Adds to the record of each update the transformer's inputs, loss, unclipped gradients, LoRA before and after."""
    from accelerate import Accelerator
    from diffusers import CogVideoXTransformer3DModel

    weights = {}

    def forward(original, transformer, **inputs):
        if inputs["hidden_states"].is_meta:
            return original(transformer, **inputs)
        weights.update(lora_weights(transformer))
        records[-1]["before"] = {name: cpu_copy(weight) for name, weight in weights.items()}
        for name in ("hidden_states", "encoder_hidden_states"):
            records[-1][name] = cpu_copy(inputs[name])
        return original(transformer, **inputs)

    def backward(original, accelerator, loss, **options):
        original(accelerator, loss, **options)
        records[-1]["loss"] = loss.item()
        records[-1]["gradients"] = {name: cpu_copy(weight.grad) for name, weight in weights.items()}

    def after_step(_) -> None:
        records[-1]["after"] = {name: cpu_copy(weight) for name, weight in weights.items()}

    in_forward = wrapped(CogVideoXTransformer3DModel, "forward", forward)
    in_backward = wrapped(Accelerator, "backward", backward)
    with in_forward, in_backward, after_updates(after_step):
        yield


def captured_draws(records: list[dict]) -> AbstractContextManager[None]:
    """Appends a record with what diffusers' example draws for an update; it has drawn all when it adds the noise."""
    from diffusers import CogVideoXDPMScheduler

    def add_noise(original, scheduler, latents, noise, timesteps):
        if latents.is_meta:
            return original(scheduler, latents, noise, timesteps)
        draws = {"latents": latents, "noise": noise, "timesteps": timesteps}
        records.append({name: cpu_copy(tensor) for name, tensor in draws.items()})
        return original(scheduler, latents, noise, timesteps)

    return wrapped(CogVideoXDPMScheduler, "add_noise", add_noise)


def replayed_draws(records: list[dict], theirs: list[dict], folder: Path) -> AbstractContextManager[None]:
    """Gives our loss their LoRA, latents, noise, timesteps and embeddings in place of its own.

    Args:
        theirs: records of `captured_draws` and `update_values`.
        folder: the folder of our modules.
    """
    sys.path.insert(0, str(folder))
    objective = import_module("cogvideox.objective")
    sys.path.pop(0)

    def velocity_loss(original, transformer, scheduler, latents, prompt_embeds, *args, **options):
        if latents.is_meta:
            return original(transformer, scheduler, latents, prompt_embeds, *args, **options)
        update, device = theirs[len(records)], latents.device
        records.append({})
        with torch.no_grad():
            for name, weight in lora_weights(transformer).items():
                weight.copy_(update["before"][name])
        noise = update["noise"].to(device, latents.dtype)
        options["timesteps"] = update["timesteps"].to(device)
        with wrapped(objective, "randn_tensor", lambda *_, **__: noise):
            return original(
                transformer,
                scheduler,
                update["latents"].to(device, latents.dtype),
                update["encoder_hidden_states"].to(device),
                *args,
                **options,
            )

    return wrapped(objective, "velocity_loss", velocity_loss)


# ---- what updates have learned ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def learning_curve(curve: dict, updates: set[int]):
    """Copies the LoRA aside after some of the updates; the clock is stopped meanwhile.

    The count of updates starts again when the optimizer does, as in a search for a learning rate, so that what is left
    are the updates of the run itself; "steps" counts all of them.

    Args:
        curve: receives "begin", the time of day of the first forward pass of training, "rows" with "update", "steps"
            so far and the time of day "at" its end, and "weights" [of each row] by name.
    """
    from diffusers import CogVideoXTransformer3DModel

    transformer, update, steps, copying = None, 0, 0, 0.0

    def forward(original, model, **inputs):
        nonlocal transformer
        if torch.is_grad_enabled() and not inputs["hidden_states"].is_meta:
            transformer = model
            curve.setdefault("begin", time.time())
        return original(model, **inputs)

    def after_step(optimizer) -> None:
        nonlocal update, steps, copying
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        at = time.time()
        weight = optimizer.param_groups[0]["params"][0]
        if optimizer.state[weight]["step"] == 1:
            update = 0
            curve.update(rows=[], weights=[])
        update, steps = update + 1, steps + 1
        if update in updates:
            curve["rows"].append({"update": update, "steps": steps, "at": at - copying})
            curve["weights"].append({name: cpu_copy(weight) for name, weight in lora_weights(transformer).items()})
        copying += time.time() - at

    with wrapped(CogVideoXTransformer3DModel, "forward", forward), after_updates(after_step):
        yield


# ---- modes -----------------------------------------------------------------------------------------------------------


def times(output: Path, script: Path, argv: list[str]) -> None:
    has_stand_in = stand_in_for_torchvision()
    rows = []
    with update_times(rows):
        run_script(script, argv)
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "CPU"
    about = {"device": device, "threads": torch.get_num_threads(), "stand_in_for_torchvision": has_stand_in}
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


def curve(output: Path, updates: set[int], script: Path, argv: list[str]) -> None:
    stand_in_for_torchvision()
    curve = {}
    with learning_curve(curve, updates):
        run_script(script, argv)
    torch.save(curve | {"threads": torch.get_num_threads()}, output)


if __name__ == "__main__":
    mode, *words = sys.argv[1:]
    if mode == "replay":
        draws, output, script, *argv = words
        replay(Path(draws), Path(output), Path(script), argv)
    elif mode == "curve":
        output, updates, script, *argv = words
        curve(Path(output), set(map(int, updates.split(","))), Path(script), argv)
    else:
        output, script, *argv = words
        {"times": times, "capture": capture}[mode](Path(output), Path(script), argv)
