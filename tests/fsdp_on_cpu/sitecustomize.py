"""Lets accelerate 1.15 run FSDP2 on CPU ranks, which it allows on accelerators alone. For tests.

Python imports this at its start where PYTHONPATH names the folder; ACCELERATE_TORCH_DEVICE=cpu belongs to it.
"""

import os

if "LOCAL_RANK" in os.environ:  # a rank, not the launcher
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
