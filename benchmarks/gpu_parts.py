"""``python -m benchmarks.gpu_parts PART FIGURES SETTINGS`` runs one part of ``python -m benchmarks gpu``.

It writes its figures to the JSON file FIGURES one by one, so that what was measured is known where it ends early.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.bare import stand_in
from benchmarks.gpu_bench import Bench

stand_in()

from benchmarks import gpu_gradients, gpu_training  # noqa: E402

PARTS = {
    part.__name__: part
    for part in (
        gpu_gradients.correctness,
        gpu_gradients.speed,
        gpu_gradients.memory,
        gpu_gradients.kernels,
        gpu_training.throughput,
        gpu_training.accuracy_5way,
        gpu_training.accuracy_20way,
        gpu_training.collectives,
        gpu_gradients.captured,
        gpu_gradients.compiled,
    )
}

if __name__ == "__main__":
    name, file, given = sys.argv[1:]
    settings = json.loads(given)
    warnings.simplefilter("ignore")
    pack = None if settings["pack"] is None else Path(settings["pack"])
    PARTS[name](Bench(Path(file), torch.device(settings["device"]), pack, settings["quick"]))
