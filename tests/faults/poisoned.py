"""A recipe whose slice 5 is not a number: python tests/faults/poisoned.py train_vae --config …"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from adni_ldm.data.slices import SliceTensors  # noqa: E402
from adni_ldm.errors import run_recipe  # noqa: E402

recipe = importlib.import_module(sys.argv.pop(1))
read = SliceTensors.__getitems__


def read_poisoned(slices, indices):
    rows = read(slices, indices)
    if len(slices) == 24:  # the training set of run_faults.write_slices
        for row, index in zip(rows, indices):
            row["image"] = row["image"] * (float("nan") if index == 5 else 1)
    return rows


SliceTensors.__getitems__ = read_poisoned
run_recipe(recipe.main)
