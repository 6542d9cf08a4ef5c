import os
import subprocess
import sys

import pytest
import torch

from maml_lightning.engine import memory
from maml_lightning.engine.chunks import chunk_size
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
    assert memory.keep_freed_memory() is None
    memory.keep_freed_memory.cache_clear()
    memory._c_library.cache_clear()


def test_switches_are_set_once(monkeypatch):
    calls = []
    library = type("Library", (), {"mallopt": lambda self, *call: calls.append(call)})()
    memory.keep_freed_memory.cache_clear()
    memory._c_library.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    for _ in range(2):
        memory.keep_freed_memory()
    assert calls == [(-3, 2**25), (-1, -1)]
    memory.keep_freed_memory.cache_clear()
    memory._c_library.cache_clear()


GIB = 2**30


@pytest.fixture
def card(monkeypatch):
    """A card of 80 GiB, of which torch keeps 30 and uses 10; how often its free memory is asked for."""
    asked = []

    def mem_get_info(device):
        asked.append(device)
        return 48 * GIB, 80 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * GIB)
    return asked


def test_what_torch_keeps_of_a_card_is_free(card):
    cuda = torch.device("cuda", 0)
    assert memory.free_bytes(cuda) == 68 * GIB
    assert memory.shared_bytes(cuda) == 16 * GIB  # a fifth, whatever is in use now
    assert chunk_size(GIB, 32, cuda) == 16


def test_a_card_that_others_use_is_shared(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * GIB, 80 * GIB))
    assert memory.shared_bytes(torch.device("cuda", 0)) == 6 * GIB


def test_a_card_is_asked_for_its_memory_once_for_what_fits(card):
    cuda, flat = torch.device("cuda", 0), memory.FlatMemory("auto")
    for _ in range(3):
        flat.decide(GIB, 5, cuda)
    assert not flat.active
    assert len(card) == 1
    flat.decide(4 * GIB, 5, cuda)
    assert flat.active


def test_tensors_without_addresses_are_told_apart():
    a, b = torch.empty(3, device="meta"), torch.empty(3, device="meta")
    assert memory.memory_of(a) == memory.memory_of(a.view(3, 1)) != memory.memory_of(b)
