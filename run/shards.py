"""Shards of weights, and of a whole transformer's training state, which is read without running code.

torch 2.13's distributed checkpoints are tensors, which it reads safely, and two kinds of pickles, which it does not:
an index of what is in which file, and each value that is no tensor. A checkpoint may come from somebody else.
"""

import io
import pickle
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed import is_initialized
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.fsdp import FSDPModule

INDEX_FILE = ".metadata"
IN_AN_INDEX = {
    (metadata.__name__, "BytesStorageMetadata"), (metadata.__name__, "ChunkStorageMetadata"),
    (metadata.__name__, "Metadata"), (metadata.__name__, "MetadataIndex"), (metadata.__name__, "StorageMeta"),
    (metadata.__name__, "TensorProperties"), (metadata.__name__, "TensorStorageMetadata"),
    (metadata.__name__, "_MEM_FORMAT_ENCODING"), (filesystem.__name__, "_StorageInfo"),
    ("torch.serialization", "_get_layout"), ("torch", "Size"), ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"),
    ("collections", "OrderedDict"),
}  # fmt: skip


def save_shards(tensors: dict, folder: Path) -> None:
    """Writes a state, each rank its part. Every rank must call it."""
    dcp.save(tensors, checkpoint_id=folder, no_dist=not is_initialized())


def load_shards(tensors: dict, folder: Path) -> None:
    """Reads a state into `tensors`, on any number of ranks. Every rank must call it.

    Raises:
        ValueError: it holds something else than numbers and tensors, or its index is damaged.
    """
    check_index(folder / INDEX_FILE)
    try:
        dcp.load(tensors, checkpoint_id=folder, planner=_Planner(), no_dist=not is_initialized())
    except CheckpointException as error:
        refused = [failure for failure, _ in error.failures.values() if isinstance(failure, pickle.UnpicklingError)]
        if not refused:
            raise
        raise ValueError(
            f"{folder}: holds something that is neither a tensor nor a number, and that could run code "
            f"({str(refused[0]).splitlines()[0]}); resume from another checkpoint"
        ) from error


def reshard(transformer: torch.nn.Module) -> None:
    """Frees the whole weights that FSDP2 keeps after a forward pass, since the next one would use them.

    To be called after a change of the shards. It keeps those of the outermost module, and all of them with
    fsdp_reshard_after_forward: false.
    """
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_index(path: Path) -> None:
    """Refuses an index that names anything but the parts of an index; nothing that it names is called before."""
    try:
        with open(path, "rb") as file:
            _Index(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}; it is damaged or could run code: resume from another checkpoint") from error


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in IN_AN_INDEX and not is_dtype:
            raise pickle.UnpicklingError(f"names {module}.{name}, which is no part of an index")
        return super().find_class(module, name)


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # refuses what could run code
        value.seek(0)
        super().load_bytes(read_item, value)
