"""The Python code of the documents runs as it stands there."""

import re

import pytest

from tests.runs import ROOT


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL))
def test_code_of_the_data_page_gives_episodes(code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    names["data"].setup("fit")
    episode = next(iter(names["data"].train_dataloader()))
    assert episode.tasks == len(episode.query_targets)
    assert list(tmp_path.iterdir()) == []
