"""Loads diffusers' examples/cogvideo/train_cogvideox_lora.py unmodified, on machines without torchvision too.

The script is not part of this repository; its path is an option of the benchmarks that compare with it.
"""

import enum
import hashlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F


class InterpolationMode(enum.Enum):
    BICUBIC = "bicubic"


def resize(frames: torch.Tensor, size: list[int], interpolation: InterpolationMode) -> torch.Tensor:
    """Resizes float frames [F, C, H, W] as torchvision does: with antialiasing, without clamping."""
    if list(frames.shape[-2:]) == list(size):
        return frames
    return F.interpolate(frames, size=size, mode=interpolation.value, align_corners=False, antialias=True)


def crop(frames: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    return frames[..., top : top + height, left : left + width]


def stand_in_for_torchvision() -> bool:
    """Puts what the script needs of torchvision into sys.modules; returns False where torchvision is installed."""
    # These look for torchvision when they are imported, and must not find the stand-in.
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    spec = importlib.util.find_spec("torchvision")
    if spec and spec.loader:  # the stand-in has no loader
        return False
    package, transforms, functional = (
        sys.modules.setdefault(name, ModuleType(name))
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    )
    for module in (package, transforms, functional):
        module.__spec__ = ModuleSpec(module.__name__, loader=None, is_package=module is not functional)
    package.transforms, transforms.functional = transforms, functional
    transforms.InterpolationMode = InterpolationMode
    functional.resize, functional.crop = resize, crop
    return True


def load_reference(path: Path) -> ModuleType:
    """Imports the script as a module, without running its main()."""
    stand_in_for_torchvision()
    spec = importlib.util.spec_from_file_location("reference_train_cogvideox_lora", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sha256(path: Path) -> str:
    """Returns the hash that tells which version of the script a result was measured against."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
