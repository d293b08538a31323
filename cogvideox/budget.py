"""Decides what fits into memory: the recomputation level and VAE tiling, where an option is "auto"."""

from typing import NamedTuple

import torch

from cogvideox import compute
from cogvideox.lora import DEFAULT_RANK, DEFAULT_TARGETS, Lora
from cogvideox.rehearsal import PHASES, Models, Phase, Settings, rehearse

GIB = 2**30
SAFETY_SHARE, SAFETY_BYTES = 0.10, GIB  # what `needed` adds to a predicted peak
# Memory that is not taken through PyTorch's allocator of a GPU: by kernels, cuBLAS, NCCL, and on a CPU.
OUT_OF_MEMORY = (
    "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'", "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)  # fmt: skip
MOST_DIFFERENCE = 0.1  # largest relative difference between a measured and a predicted peak that is not reported


class Remedy(NamedTuple):
    phase: str
    options: str  # of the command line, with which it would fit
    peak_bytes: int


class MemoryPlan(NamedTuple):
    """The settings of a run, with "auto" options decided."""

    gradient_checkpointing: str  # of compute.LEVELS
    tile_encoding: bool
    tile_decoding: bool
    phases: tuple[Phase, ...] = ()  # as decided
    free_bytes: int | None = None  # on the device before anything is loaded; None if unknown
    level_peaks: tuple[tuple[str, int], ...] = ()  # levels that "auto" rehearsed, with their peaks in training
    tiles_where_needed: bool = False  # --enable_tiling auto
    remedies: tuple[Remedy, ...] = ()  # for phases that do not fit, where there is one

    @property
    def tight(self) -> tuple[Phase, ...]:
        """Phases that do not fit with the margin that `needed` adds."""
        return tuple(phase for phase in self.phases if not fits(phase, self.free_bytes))

    @property
    def impossible(self) -> tuple[Phase, ...]:
        """Phases that do not fit even if nothing else takes memory."""
        return tuple(phase for phase in self.tight if phase.peak_bytes > self.free_bytes)

    def as_json(self) -> dict:
        decided = ("gradient_checkpointing", "tile_encoding", "tile_decoding")
        return {name: getattr(self, name) for name in decided} | {
            "peak_gib": {phase.name: round(phase.peak_bytes / GIB, 3) for phase in self.phases},
            "free_gib": None if self.free_bytes is None else round(self.free_bytes / GIB, 3),
        }


def needed(peak_bytes: int) -> float:
    """Returns the free bytes that a predicted peak requires, with a margin for what is not predicted."""
    return peak_bytes * (1 + SAFETY_SHARE) + SAFETY_BYTES


def fits(phase: Phase, free_bytes: int | None) -> bool:
    return free_bytes is None or needed(phase.peak_bytes) <= free_bytes


def decide(models: Models, settings: Settings, *, tiling: str, free_bytes: int | None) -> MemoryPlan:
    """Returns the fastest settings that fit into the free memory; where none do, the smallest ones.

    Args:
        settings: `gradient_checkpointing` may be "auto".
        tiling: --enable_tiling; "auto" tiles the phases that do not fit otherwise.
    """
    level_peaks = []
    if settings.gradient_checkpointing == "auto":
        for level in compute.possible_levels(settings.attention_backend, settings.blocks_to_swap):
            settings = settings._replace(gradient_checkpointing=level)
            training = rehearse("training", models, settings)
            level_peaks.append((level, training.peak_bytes))
            if fits(training, free_bytes):
                break
    names = [name for name in PHASES if settings.samples or name != "validation"]
    for phase, option in {"clips": "tile_encoding", "validation": "tile_decoding"}.items():
        tiled = tiling == "always"
        if tiling == "auto" and phase in names:
            tiled = not fits(rehearse(phase, models, settings), free_bytes)
        settings = settings._replace(**{option: tiled})
    phases = tuple(rehearse(name, models, settings) for name in names)
    found = [_remedy(phase.name, models, settings, free_bytes) for phase in phases if not fits(phase, free_bytes)]
    return MemoryPlan(
        settings.gradient_checkpointing,
        settings.tile_encoding,
        settings.tile_decoding,
        phases,
        free_bytes,
        level_peaks=tuple(level_peaks),
        tiles_where_needed=tiling == "auto",
        remedies=tuple(filter(None, found)),
    )


def _remedy(phase: str, models: Models, settings: Settings, free_bytes: int) -> Remedy | None:
    """Returns the first options that together make the phase fit; None if none do."""
    options = []
    for option, change in _smaller(phase, settings, models.base.transformer["num_layers"]):
        changed = settings._replace(**change)
        if changed != settings:
            settings = changed
            options.append(option)
            rehearsed = rehearse(phase, models, settings)
            if fits(rehearsed, free_bytes):
                return Remedy(phase, " ".join(options), rehearsed.peak_bytes)
    return None


def _smaller(phase: str, settings: Settings, num_layers: int) -> list[tuple[str, dict]]:
    """Returns the options that make a phase smaller, with their settings, the cheapest first."""
    if phase == "text":
        return [
            ("--text_encoder_precision int8", {"text_encoder_precision": "int8"}),
            ("--text_encoder_device cpu", {"text_encoder_device": "cpu"}),
        ]
    if phase == "clips":
        return [("--enable_tiling", {"tile_encoding": True}), ("--enable_slicing", {"enable_slicing": True})]
    lora = settings.lora or Lora(DEFAULT_RANK, DEFAULT_RANK, DEFAULT_TARGETS)
    options = [("--enable_tiling", {"tile_decoding": True})]
    if phase == "training":
        options = [("--gradient_checkpointing full", {"gradient_checkpointing": "full"})]
    options.append(("--training_type lora", {"lora": lora}))
    if settings.device_type == "cuda":
        swap = f"--blocks_to_swap {num_layers}"
        if phase == "validation" and settings.gradient_checkpointing == "none":  # which training cannot swap with
            swap = f"--gradient_checkpointing full {swap}"
        options.append((swap, {"blocks_to_swap": num_layers}))
    if not (lora.use_dora or lora.changes_base):
        options.append(("--base_precision int8", {"lora": lora._replace(base_precision="int8")}))
    return options


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory is short; most libraries say it in a plain RuntimeError."""
    is_said = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return is_said or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def savings(phase: str, models: Models, settings: Settings) -> list[str]:
    """Returns the options that make a phase smaller, each with the predicted GiB that it saves by itself."""
    before, found = rehearse(phase, models, settings).peak_bytes, []
    for option, change in _smaller(phase, settings, models.base.transformer["num_layers"]):
        changed = settings._replace(**change)
        saved = before - rehearse(phase, models, changed).peak_bytes if changed != settings else 0
        if saved > 0:
            found.append(f"{option} ({saved / GIB:.1f} GiB less)")
    return found


def ways_out(phase: str, savings: list[str]) -> str:
    """Returns in words what makes a phase smaller; the options are those of `savings`."""
    if not savings:
        return f"no option needs less, so {_less(phase)}"
    return f"each by itself, the cheapest first: {', '.join([*savings, f'or {_less(phase)}'])}"


# ---- messages --------------------------------------------------------------------------------------------------------


def describe(plan: MemoryPlan) -> list[str]:
    """Returns lines on the predicted memory and on what was decided."""
    free, level, peaks = plan.free_bytes, plan.gradient_checkpointing, dict(plan.level_peaks)
    lines = []
    if plan.phases:
        numbers = ", ".join(f"{phase.name} {phase.peak_bytes / GIB:.1f}" for phase in plan.phases)
        lines.append(f"memory, predicted: {numbers} GiB" + ("" if free is None else f"; free: {free / GIB:.1f}"))
    if peaks:
        others = [f"; {other} would need {needed(peak) / GIB:.1f}" for other, peak in peaks.items() if other != level]
        lines.append(f"--gradient_checkpointing auto: {level} {_rule(peaks[level], free)}{''.join(others)}")
    if plan.tiles_where_needed:
        tiled = {"clips": plan.tile_encoding, "validation": plan.tile_decoding}
        names = " and ".join(phase for phase, is_tiled in tiled.items() if is_tiled)
        lines.append(f"--enable_tiling auto: {f'tiles for {names}' if names else 'no tiles, there is room'}")
    for phase in plan.tight:
        if phase not in plan.impossible:
            lines.append(f"{phase.name} may not fit: {_rule(phase.peak_bytes, free)}; {_way_out(phase, plan)}")
    return lines


def remark_on_peak(plan: MemoryPlan, measured_gib: float, *, is_largest: bool) -> str | None:
    """Returns a sentence if the peak of training is farther from the prediction than `MOST_DIFFERENCE`.

    Args:
        is_largest: whether the update that was measured is the one that was predicted: others may take less.
    """
    predicted = next((phase.peak_bytes / GIB for phase in plan.phases if phase.name == "training"), None)
    if predicted is None:
        return None
    difference = measured_gib / predicted - 1
    if difference <= MOST_DIFFERENCE and not (is_largest and difference < -MOST_DIFFERENCE):
        return None
    return (
        f"the first updates took {measured_gib:.1f} GiB at their peak, and {predicted:.1f} GiB were predicted; please "
        "report it with args.json"
    )


def refusal(plan: MemoryPlan) -> str:
    """Returns the message for a run that cannot fit: the phases, and what would fit."""
    phases = [
        f"{phase.name} needs {phase.peak_bytes / GIB:.1f} GiB, as predicted, and {plan.free_bytes / GIB:.1f} are free: "
        f"{_way_out(phase, plan)}"
        for phase in plan.impossible
    ]
    return "; ".join([*phases, "or pass --allow_oversubscription to try all the same"])


def _rule(peak_bytes: int, free: int | None) -> str:
    of_free = "" if free is None else f" of {free / GIB:.1f}"
    margin = f"{100 * SAFETY_SHARE:.0f} % and {SAFETY_BYTES / GIB:.0f} GiB"
    return f"needs {needed(peak_bytes) / GIB:.1f}{of_free} GiB (predicted {peak_bytes / GIB:.1f}, {margin})"


def _way_out(phase: Phase, plan: MemoryPlan) -> str:
    for remedy in plan.remedies:
        if remedy.phase == phase.name:
            return f"with {remedy.options} it would need {needed(remedy.peak_bytes) / GIB:.1f}; or {_less(phase.name)}"
    return _less(phase.name)


def _less(phase: str) -> str:
    is_text = phase == "text"
    return "use a machine with more memory" if is_text else "lower --max_num_frames, --height and --width"
