import os
import subprocess
import sys

import torch

from maml_lightning.engine import memory
from tests.runs import ROOT

# Prints the peak before and after holding 400 MB that are given back.
PEAKS = """
import psutil, torch
from maml_lightning.engine.memory import peak_bytes
resident = psutil.Process().memory_info().rss
print(resident, peak_bytes(torch.device("cpu")))
held = b"1" * 400_000_000
del held
print(peak_bytes(torch.device("cpu")))
"""


def test_free_bytes_are_the_systems():
    assert 0 < memory.free_bytes(torch.device("cpu")) < 2**50


def test_peak_is_of_this_process_and_stays():
    held = b"1" * 1_500_000_000  # by the one that launches it
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PEAKS]
    printed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=True).stdout
    resident, before, after = map(int, printed.split())
    assert 0.99 * resident < before < len(held)
    assert resident + 390_000_000 < after < len(held)


def test_c_library_without_the_switch_is_left_alone(monkeypatch):
    memory.keep_freed_memory.cache_clear()
    memory._c_library.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory() is memory.return_freed_memory() is None
    memory.keep_freed_memory.cache_clear()
    memory._c_library.cache_clear()


def test_switches_are_set_once(monkeypatch):
    calls = []
    names = ("mallopt", "malloc_trim")
    library = type("Library", (), {n: lambda self, *call, n=n: calls.append((n, *call)) for n in names})()
    memory.keep_freed_memory.cache_clear()
    memory._c_library.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    for _ in range(2):
        memory.keep_freed_memory()
    memory.return_freed_memory()
    assert calls == [("mallopt", -3, 2**25), ("mallopt", -1, -1), ("malloc_trim", 0)]
    memory.keep_freed_memory.cache_clear()
    memory._c_library.cache_clear()
