"""diffusers' examples/cogvideo/train_cogvideox_lora.py, run as it is, on machines without torchvision too.

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
    """Frames [F, C, H, W], float, in another size as torchvision does it: with antialiasing, without clamping."""
    if list(frames.shape[-2:]) == list(size):
        return frames
    return F.interpolate(frames, size=size, mode=interpolation.value, align_corners=False, antialias=True)


def crop(frames: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    return frames[..., top : top + height, left : left + width]


def stand_in_for_torchvision() -> bool:
    """Puts what the script takes from torchvision into sys.modules; False where torchvision itself is installed."""
    # They look once whether torchvision is there, and must not find the stand-in.
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    found = importlib.util.find_spec("torchvision")
    if found and found.loader:  # the stand-in has none
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
    """The script as a module, of which nothing has run but its imports and definitions."""
    stand_in_for_torchvision()
    spec = importlib.util.spec_from_file_location("reference_train_cogvideox_lora", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sha256(path: Path) -> str:
    """Says which of its versions a result was measured against."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
