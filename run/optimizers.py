"""The optimizer, its learning-rate schedule, and the moving average (EMA) of the trained weights."""

import argparse
import contextlib
import importlib
from collections.abc import Callable, Iterator

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel

from files import at_least

KINDS = ["adamw", "adam", "prodigy"]
OPTIONS = (
    "optimizer", "use_8bit_adam", "learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
    "prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup",
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    optim = parser.add_argument_group("optimizer").add_argument
    optim("--optimizer", type=str.lower, choices=KINDS, default="adamw", help="prodigy needs prodigyopt")
    optim("--use_8bit_adam", action="store_true", help="adam and adamw with 8-bit state (needs bitsandbytes)")
    optim("--learning_rate", type=float, help="peak value (default: 1e-4; sft: 1e-5; prodigy: 1.0)")
    optim("--scale_lr", action="store_true", help="multiply it by GPUs x accumulation x batch size")
    schedules = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
    optim("--lr_scheduler", choices=schedules, default="constant", help="course of the learning rate")
    optim("--lr_warmup_steps", type=at_least(0), default=0, metavar="N", help="updates of linear warm-up")
    optim("--lr_num_cycles", type=at_least(1), default=1, metavar="N", help="restarts of cosine_with_restarts")
    optim("--lr_power", type=float, default=1.0, help="exponent of polynomial")
    optim("--adam_beta1", type=float, default=0.9, help="decay of the mean, Prodigy too")
    optim("--adam_beta2", type=float, default=0.95, help="decay of the square, Prodigy too")
    optim("--adam_weight_decay", type=float, default=1e-4, help="weight decay")
    optim("--adam_epsilon", type=float, default=1e-8, help="added to the denominator")
    optim("--prodigy_beta3", type=float, help="decay of Prodigy's step size (default: sqrt of beta2)")
    optim("--prodigy_decouple", action="store_true", help="AdamW's kind of weight decay")
    optim("--prodigy_use_bias_correction", action="store_true", help="Adam's bias correction")
    optim("--prodigy_safeguard_warmup", action="store_true", help="leave the warm-up out of its estimate")
    optim("--max_grad_norm", type=float, default=1.0, help="clip the norm of the gradient to this")


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses combinations in which an option would do nothing; `refuse` ends the program with a message."""
    for name in ("learning_rate", "max_grad_norm"):
        if not getattr(args, name) > 0:
            refuse(f"--{name} {getattr(args, name)}: must be above 0")
    prodigy = args.optimizer == "prodigy"
    given = [name for name, value in vars(args).items() if name.startswith("prodigy_") and value]
    if given and not prodigy:
        refuse(
            f"--{given[0]}: does nothing with --optimizer {args.optimizer}; pass --optimizer prodigy, or leave it out"
        )
    if prodigy and args.use_8bit_adam:
        refuse("--use_8bit_adam: does nothing with --optimizer prodigy; pass --optimizer adamw, or leave it out")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        refuse("--lr_warmup_steps: does nothing with --lr_scheduler constant; pass constant_with_warmup")


def default_learning_rate(optimizer: str, training_type: str) -> float:
    return 1.0 if optimizer == "prodigy" else {"lora": 1e-4, "sft": 1e-5}[training_type]


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
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer](weights, **options, fused=True)


def _optional(package: str, option: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{option}: needs {package}, which cannot be imported; pip install {package}") from error


def make_lr_scheduler(
    optimizer, name: str, *, warmup_steps: int, total_steps: int, cycles: int = 1, power: float = 1.0
):
    """One of diffusers' schedules over `total_steps` updates, whatever the number of ranks."""
    if warmup_steps >= max(total_steps, 1):
        raise ValueError(
            f"--lr_warmup_steps {warmup_steps}: the run has {total_steps} updates; warm up for fewer of them"
        )
    return get_scheduler(name, optimizer, None, warmup_steps, total_steps, cycles, power)


class WeightAverage:
    """A moving average of trained weights (EMA), or nothing if `decay` is None.

    The first updates weigh more, as in diffusers' EMAModel: decay is at most (1 + n) / (10 + n) after n of them.
    """

    def __init__(self, weights: list[torch.nn.Parameter], decay: float | None):
        self.weights, self.decay = weights, decay
        self.restart(0)

    def restart(self, step: int) -> None:
        """Goes on from what the model holds, which is the average after `step` updates."""
        if self.decay is not None:
            self._ema = EMAModel(self.weights, decay=self.decay)
            self._ema.optimization_step = step

    def step(self) -> None:
        """To be called after each update."""
        if self.decay is not None:
            self._ema.step(self.weights)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average, for as long as it is needed."""
        if self.decay is None:
            yield
            return
        self._ema.store(self.weights)
        self._ema.copy_to(self.weights)
        try:
            yield
        finally:
            self._ema.restore(self.weights)
