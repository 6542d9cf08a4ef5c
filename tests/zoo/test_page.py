"""docs/networks.md is written from measurements."""

import torch

from benchmarks import networks
from tests.zoo.case import VECTOR, Case
from tests.zoo.memory import peak_bytes
from tests.zoo.python_state import Perceptron
from tests.zoo.test_zoo import TOLERANCE


def test_the_page_has_a_row_for_each_network(tmp_path, monkeypatch, capsys):
    cases = [Case("perceptron", Perceptron, VECTOR), Case("broken", lambda: torch.nn.Linear(5, 3), VECTOR)]
    monkeypatch.setattr(networks.test_zoo, "CASES", cases)
    monkeypatch.setattr(networks, "GROUPS", {"Small": ("perceptron", "broken")})
    monkeypatch.setattr(networks.logging, "disable", lambda level: None)
    networks.networks("^(perceptron|broken)$", tasks=4, rounds=1, out=tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    perceptron, broken = (next(row for row in rows if row[0] == case.name) for case in cases)
    assert perceptron[1].startswith("yes")
    assert float(perceptron[1].split()[1]) < TOLERANCE
    assert perceptron[2] in {"traced", "vectorized", "loop"}
    assert all(float(number.split()[0]) > 0 for number in perceptron[3:])
    assert broken[1].startswith("**fails**")
    assert "1 of 1 that run are exact" in page
    assert perceptron[0] in capsys.readouterr().out


def test_a_network_whose_calls_change_its_buffers_is_compared_with_each_usual_loop():
    case = networks.test_zoo.BY_NAME["running mean in use"]
    assert case.stateful
    assert networks.error(case) < TOLERANCE


def test_complex_parameters_stay_complex_and_real_ones_real():
    net, episode = networks.single(networks.test_zoo.BY_NAME["complex parameters"], False, 2)
    assert net.weight.dtype == torch.complex128
    assert net.head.weight.dtype == episode.query_inputs.dtype == torch.float64


def test_a_refused_network_is_listed_with_the_remedy():
    rows = [networks.Row("scripted", note="refused: it has TorchScript; give the module.")]
    assert "- scripted: it has TorchScript; give the module." in networks.page(rows, 4, "a day")


def test_each_row_of_the_page_is_a_network_that_is_measured():
    names = {case.name for case, _ in networks.chosen("")} | {case.name for case in networks.families.CASES}
    assert {name for group in networks.GROUPS.values() for name in group} <= names


def test_an_inexact_network_is_shown_as_such():
    assert "**no, 1e-03**" in networks.Row("wrong", 1e-3, "traced", 1.0, 1.0, 1.0).cells()


def test_peak_bytes_counts_what_is_held_at_once():
    def run() -> None:
        for _ in range(3):
            torch.ones(1000, dtype=torch.float64).add_(1)

    assert 8000 <= peak_bytes(run) < 9000
