"""The optimizer, and the course of its learning rate."""

import importlib

import torch
from diffusers.optimization import get_scheduler

KINDS = ["adamw", "adam", "prodigy"]


def make_optimizer(
    weights: list[torch.nn.Parameter],
    *,
    optimizer: str,
    use_8bit_adam: bool,
    learning_rate: float,
    adam_beta1: float,
    adam_beta2: float,
    adam_weight_decay: float,
    adam_epsilon: float,
    prodigy_beta3: float | None,
    prodigy_decouple: bool,
    prodigy_use_bias_correction: bool,
    prodigy_safeguard_warmup: bool,
) -> torch.optim.Optimizer:
    """Adam, AdamW or Prodigy; the arguments are the training script's options of the same names.

    Raises:
        ValueError: a package is missing, or a value is out of range.
    """
    options = {"lr": learning_rate, "betas": (adam_beta1, adam_beta2), "eps": adam_epsilon}
    options["weight_decay"] = adam_weight_decay
    if optimizer == "prodigy":
        return _optional("prodigyopt", "--optimizer prodigy").Prodigy(
            weights, **options, beta3=prodigy_beta3, decouple=prodigy_decouple,
            use_bias_correction=prodigy_use_bias_correction, safeguard_warmup=prodigy_safeguard_warmup,
        )  # fmt: skip
    if use_8bit_adam:
        package = _optional("bitsandbytes", "--use_8bit_adam").optim
        return {"adam": package.Adam8bit, "adamw": package.AdamW8bit}[optimizer](weights, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer](weights, **options)


def _optional(package: str, option: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{option}: needs {package}, which cannot be imported; pip install {package}") from error


def make_lr_scheduler(optimizer, name: str, warmup_steps: int, total_steps: int, cycles: int, power: float):
    """One of diffusers' schedules over `total_steps` updates, whatever the number of ranks."""
    if warmup_steps >= max(total_steps, 1):
        raise ValueError(
            f"--lr_warmup_steps {warmup_steps}: the run has {total_steps} updates; warm up for fewer of them"
        )
    return get_scheduler(name, optimizer, None, warmup_steps, total_steps, cycles, power)
