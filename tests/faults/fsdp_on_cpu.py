"""A recipe under FSDP on CPU, which accelerate itself starts on GPUs alone: for the tests of what is ours.

accelerate launch --config_file configs/accelerate/fsdp.yaml tests/faults/fsdp_on_cpu.py train_vae --config …
"""

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
use_fsdp = os.environ.pop("ACCELERATE_USE_FSDP", "false") == "true"

from accelerate import FullyShardedDataParallelPlugin, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

from adni_ldm.errors import run_recipe  # noqa: E402
from adni_ldm.training import run  # noqa: E402

recipe = importlib.import_module(sys.argv.pop(1))
start = run.start_accelerator


def start_sharded(**settings):
    accelerator = start(**settings)
    # both, since every new AcceleratorState takes up what PartialState holds
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    return accelerator


run.start_accelerator = start_sharded
try:
    run_recipe(recipe.main)
except SystemExit as end:
    # At once: gloo's threads under FSDP2, torn down as the interpreter ends, now and then abort the process
    # ("terminate called without an active exception") when all is written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code or 0)
