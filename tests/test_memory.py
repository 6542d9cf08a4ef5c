import torch

from maml_lightning import memory


def test_free_bytes_are_the_systems():
    assert 0 < memory.free_bytes(torch.device("cpu")) < 2**50


def test_c_library_without_the_switch_is_left_alone(monkeypatch):
    memory.keep_freed_memory.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory() is None
    memory.keep_freed_memory.cache_clear()


def test_switches_are_set_once(monkeypatch):
    calls = []
    library = type("Library", (), {"mallopt": lambda self, *call: calls.append(call)})()
    memory.keep_freed_memory.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    for _ in range(2):
        memory.keep_freed_memory()
    assert calls == [(-4, 0), (-1, -1)]
    memory.keep_freed_memory.cache_clear()
