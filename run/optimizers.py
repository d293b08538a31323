"""The optimizer, its learning-rate schedule, and the moving average (EMA) of the trained weights."""

import argparse
import contextlib
import importlib
from collections.abc import Callable, Iterator

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel

from files import at_least
from run import rate_search
from run.shards import reshard

KINDS = ["adamw", "adam", "prodigy"]
# Checkpoints record them, and are refused by a version that has others: a new name here ends older runs.
OPTIONS = (
    "optimizer", "use_8bit_adam", "learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
    "prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup",
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    optim = parser.add_argument_group("optimizer").add_argument
    optim("--optimizer", type=str.lower, choices=KINDS, default="adamw", help="algorithm; prodigy needs prodigyopt")
    optim("--use_8bit_adam", action="store_true", help="keep the state of adam and adamw in 8 bits; needs bitsandbytes")
    rate = "peak learning rate; auto: found by short trials before the run (default: 1e-4; sft 1e-5, prodigy 1.0)"
    optim("--learning_rate", type=rate_search.option, metavar="RATE", help=rate)
    optim("--scale_lr", action="store_true", help="multiply --learning_rate by the clips of an update")
    schedules = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
    optim("--lr_scheduler", choices=schedules, default="constant", help="schedule of the learning rate")
    optim("--lr_warmup_steps", type=at_least(0), default=0, metavar="N", help="updates of linear warm-up")
    optim("--lr_num_cycles", type=at_least(1), default=1, metavar="N", help="cycles of cosine_with_restarts")
    optim("--lr_power", type=float, default=1.0, help="exponent of the polynomial schedule")
    optim("--adam_beta1", type=float, default=0.9, help="decay of the gradient's running mean, for Prodigy too")
    optim("--adam_beta2", type=float, default=0.95, help="decay of the squared gradient's mean, for Prodigy too")
    optim("--adam_weight_decay", type=float, default=1e-4, help="weight decay, for Prodigy too")
    optim("--adam_epsilon", type=float, default=1e-8, help="term added to the denominator, for Prodigy too")
    optim("--prodigy_beta3", type=float, help="decay of Prodigy's step-size estimate (default: sqrt of --adam_beta2)")
    optim("--prodigy_decouple", action="store_true", help="decouple Prodigy's weight decay, as AdamW does")
    optim("--prodigy_use_bias_correction", action="store_true", help="apply Adam's bias correction in Prodigy")
    optim("--prodigy_safeguard_warmup", action="store_true", help="leave the warm-up out of Prodigy's estimate")
    ratio = "learning rate of the LoRA's B matrices as a multiple of the A matrices' (LoRA+); 1: the same"
    optim("--loraplus_lr_ratio", type=float, default=1.0, metavar="RATIO", help=ratio)
    norm = "largest norm of the gradient; larger ones are clipped to it"
    optim("--max_grad_norm", type=float, default=1.0, help=norm)
    average = "save and validate a moving average of the LoRA with this decay, such as 0.99 (default: no average)"
    optim("--ema_decay", type=float, metavar="D", help=average)


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses combinations in which an option would do nothing; `refuse` ends the program with a message."""
    for name in ("learning_rate", "max_grad_norm", "loraplus_lr_ratio"):
        value = getattr(args, name)
        if value != rate_search.AUTO and not 0 < value < float("inf"):
            refuse(f"--{name} {value}: must be above 0 and finite; leave it out for the default")
    rate_search.check_options(args, refuse)
    is_prodigy = args.optimizer == "prodigy"
    given = [name for name, value in vars(args).items() if name.startswith("prodigy_") and value]
    if given and not is_prodigy:
        refuse(
            f"--{given[0]}: does nothing with --optimizer {args.optimizer}; pass --optimizer prodigy, or leave it out"
        )
    if is_prodigy and args.use_8bit_adam:
        refuse("--use_8bit_adam: does nothing with --optimizer prodigy; pass --optimizer adamw, or leave it out")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        refuse(
            "--lr_warmup_steps: does nothing with --lr_scheduler constant; pass constant_with_warmup, or leave it out"
        )
    if args.loraplus_lr_ratio != 1 and (is_prodigy or args.training_type == "sft"):
        why = "--optimizer prodigy, which has one learning rate" if is_prodigy else "--training_type sft"
        refuse(f"--loraplus_lr_ratio {args.loraplus_lr_ratio:g}: does nothing with {why}; leave it out")
    if args.training_type == "sft" and args.ema_decay is not None:
        refuse("--ema_decay: does nothing with --training_type sft, which trains no LoRA; leave it out")
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        refuse(f"--ema_decay {args.ema_decay}: must be above 0 and below 1")


def default_learning_rate(optimizer: str, training_type: str) -> float:
    return 1.0 if optimizer == "prodigy" else {"lora": 1e-4, "sft": 1e-5}[training_type]


def make_optimizer(
    parameters: list[torch.nn.Parameter],
    *,
    optimizer: str,
    use_8bit_adam: bool,
    learning_rate: float,
    adam_beta1: float,
    adam_beta2: float,
    adam_weight_decay: float,
    adam_epsilon: float,
    **prodigy_options,
) -> torch.optim.Optimizer:
    """Returns Adam, AdamW or Prodigy; the arguments are the training script's options of the same names.

    Args:
        prodigy_options: the options whose names begin with "prodigy_".

    Raises:
        ValueError: a package is missing, or a value is out of range.
    """
    if unknown := [name for name in prodigy_options if not name.startswith("prodigy_")]:
        raise TypeError(f"make_optimizer() got unexpected keyword arguments {', '.join(unknown)}")
    betas = (adam_beta1, adam_beta2)
    shared = {"lr": learning_rate, "betas": betas, "eps": adam_epsilon, "weight_decay": adam_weight_decay}
    if optimizer == "prodigy":
        own = {name.removeprefix("prodigy_"): value for name, value in prodigy_options.items()}
        return _import_optional("prodigyopt", "--optimizer prodigy").Prodigy(parameters, **shared, **own)
    if use_8bit_adam:
        package = _import_optional("bitsandbytes", "--use_8bit_adam").optim
        return {"adam": package.Adam8bit, "adamw": package.AdamW8bit}[optimizer](parameters, **shared)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer](parameters, **shared, fused=True)


def multiply_learning_rate(
    optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], ratio: float
) -> None:
    """Moves parameters of an optimizer with one group to a further group, with `ratio` times the learning rate.

    With the B matrices of a LoRA it is LoRA+: Hayou et al. 2024 (arXiv:2402.12354).
    """
    (group,), moved = optimizer.param_groups, set(map(id, parameters))
    group["params"] = [weight for weight in group["params"] if id(weight) not in moved]
    optimizer.add_param_group({**group, "params": parameters, "lr": group["lr"] * ratio})


def _import_optional(package: str, option: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{option}: needs {package}, which cannot be imported; pip install {package}") from error


def make_lr_scheduler(
    optimizer, name: str, *, warmup_steps: int, total_steps: int, cycles: int = 1, power: float = 1.0
):
    """Returns one of diffusers' schedules, over `total_steps` updates on any number of ranks.

    Raises:
        ValueError: the warm-up takes the whole run.
    """
    if warmup_steps >= max(total_steps, 1):
        raise ValueError(
            f"--lr_warmup_steps {warmup_steps}: the run has {total_steps} updates; warm up for fewer of them"
        )
    return get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps, num_cycles=cycles, power=power
    )


class WeightAverage:
    """An exponential moving average (EMA) of trained weights; does nothing if `decay` is None.

    The first updates weigh more, as in diffusers' EMAModel: after n of them the decay is at most (1 + n) / (10 + n).
    """

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float | None):
        self.parameters, self.decay = parameters, decay
        self.restart(step=0)

    def restart(self, step: int) -> None:
        """Continues from the weights in the model, which are the average after `step` updates."""
        if self.decay is not None:
            self._ema = EMAModel(self.parameters, decay=self.decay)
            self._ema.optimization_step = step

    def step(self) -> None:
        """Averages the weights in; to be called after each update."""
        if self.decay is not None:
            self._ema.step(self.parameters)

    @contextlib.contextmanager
    def applied(self, transformer: torch.nn.Module) -> Iterator[None]:
        """Puts the average into the transformer for the length of a `with` block."""
        if self.decay is None:
            yield
            return
        self._ema.store(self.parameters)
        self._ema.copy_to(self.parameters)
        reshard(transformer)
        try:
            yield
        finally:
            self._ema.restore(self.parameters)
            reshard(transformer)
