"""``python -m benchmarks {speed,memory,batch,family,fit,scale,data}``; without a name, all of them run in turn.

``python -m benchmarks {accuracy,ensemble,again,results}`` trains and records an accuracy or that of an ensemble,
repeats a record, prints all records as the table of docs/results.md;
``python -m benchmarks networks`` compares the zoo of networks with a plain loop and writes docs/networks.md;
``python -m benchmarks rejection`` prints how often data.reject is right;
``python -m benchmarks gpu`` proves and measures all of it on a GPU, in less than eight minutes (docs/scaling.md).

Peers from the package index: ``pip install higher torchopt jax``; learn2learn if it builds.
"""

import platform
import sys

import torch
from jsonargparse import auto_cli

from benchmarks.gpu import gpu

if __name__ == "__main__" and sys.argv[1:2] == ["gpu"]:  # which needs no package for tests
    sys.exit(auto_cli(gpu, args=sys.argv[2:]))

from benchmarks.accuracy import accuracy, again, ensemble, results
from benchmarks.data import data
from benchmarks.measure import batch, family, fit, memory, scale, speed
from benchmarks.networks import networks
from benchmarks.rejection import rejection

PARTS = [speed, memory, batch, family, fit, scale, data]

if __name__ == "__main__":
    if len(sys.argv) > 1:
        auto_cli([*PARTS, accuracy, ensemble, again, results, networks, rejection, gpu])
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
        for part in PARTS:
            print()
            part()
