"""The Python code of the documents runs as it stands there, links lead somewhere, and flags exist."""

import importlib.util
import inspect
import json
import re
import shlex
import sys
import types
from types import SimpleNamespace

import pytest
import torch
import yaml

import maml_lightning
from maml_lightning import MAML
from maml_lightning.command_line.exporting import main as export
from tests.data.test_support_query import symbol
from tests.runs import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))  # `mkdocs build` runs them
MODULES = [value for name, value in vars(maml_lightning).items() if name.endswith("DataModule")]
NOT_A_SETTING = {"help"}  # --data.help NAME


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def cells(notebook, kind):
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


def text_of(page):
    """What a reader reads: of a notebook, its cells of text."""
    if page.suffix == ".md":
        return page.read_text()
    return "\n\n".join("".join(cell["source"]) for cell in cells(page, "markdown"))


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)


def test_code_of_the_data_page_gives_episodes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks(ROOT / "docs" / "data.md"):
        exec(code, names)
        names["data"].setup("fit")
        episode = next(iter(names["data"].train_dataloader()))
        assert episode.tasks == len(episode.query_targets)
    assert names["classifier"](torch.from_numpy(names["series"][10, 5:6])).shape == (1, 4)
    assert list(tmp_path.iterdir()) == []


def executed(name, folder):
    """The names after all code of a page ran, in a folder with drawings, each training one batch long."""
    for kind in range(3):
        (folder / "support" / f"{kind}").mkdir(parents=True)
        symbol(kind, (40, 40), kind).save(folder / "support" / f"{kind}" / "picture.png")
    symbol(1, (40, 40), 7).save(folder / "drawing.png")
    for command in re.findall(r"^maml-lightning export (.*)$", (ROOT / name).read_text(), re.MULTILINE):
        export(shlex.split(command))
    names = {}
    for code in blocks(ROOT / name):
        exec(code.replace("Trainer(", "Trainer(fast_dev_run=True, enable_progress_bar=False, "), names)
    return names


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_code_of_the_readme_runs(folder, capsys):
    names = executed("README.md", folder)
    assert "\n1\n" in f"\n{capsys.readouterr().out}"  # what drawing.png shows
    task = names["task"]
    assert names["classifier"](task.query_inputs[0]).shape == (len(task.query_targets[0]), 5)
    assert names["data"].ways == 4


# Of other pages, the code is run by the tests that are named here.
OWN_TESTS = {"README.md": "here", "data.md": "here", "finetuning.md": "tests/zoo/test_lora.py"}


@pytest.mark.parametrize("name", [page.name for page in PAGES if page.name not in OWN_TESTS and blocks(page)])
def test_code_of_a_page_runs(name, folder):
    names = executed(f"docs/{name}", folder)
    if name == "your-network.md":
        assert all(value.grad is not None for value in names["maml"].net.parameters())
    elif name == "faq.md":
        adapted, again = names["classifier"].state_dict(), names["again"].state_dict()
        assert all(value.equal(again[key]) for key, value in adapted.items())
    elif name == "your-images.md":
        predicted = names["classifier"]("drawing.png")
        assert predicted.name == "1"
        assert names["probabilities"] == pytest.approx(predicted.probabilities, abs=1e-6)


def test_all_code_is_of_a_kind_that_tests_run():
    fence = re.compile(r"^```(\w*)\n.*?^```$", re.MULTILINE | re.DOTALL)
    kinds = {(page.name, kind) for page in PAGES for kind in fence.findall(page.read_text())}
    assert {kind for _, kind in kinds} <= {"bash", "python", ""}
    assert [name for name, kind in kinds if not kind] == ["architecture.md"]  # a drawing


def anchor(heading):
    """What GitHub and MkDocs call a heading in a link."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


def anchors(page):
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)}


def lost_links(page):
    """The relative links of a page that lead to no file, or to no heading of it."""
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (heading and heading not in anchors(target)):
            lost.append(link)
    return lost


def test_lost_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A b, c?\n[1](page.md) [2](#a-b-c) [3](page.md#b) [4](other.md) [5](x:y)\n```\n[6](code)\n```\n")
    assert lost_links(page) == ["page.md#b", "other.md"]


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    assert lost_links(page) == []


def parameters(*classes):
    """What the constructors of classes and of those that they inherit from take."""
    every = (base for each in classes for base in each.__mro__ if "__init__" in vars(base))
    return {name for base in every for name in inspect.signature(base).parameters}


def unknown_flags(text):
    known = {"model": parameters(MAML), "data": parameters(*MODULES)}
    named = set(re.findall(r"--(model|data)\.(\w+)", text))
    return sorted(f"{of}.{name}" for of, name in named if name not in known[of] | NOT_A_SETTING)


def test_unknown_flags_are_found():
    assert unknown_flags("`--model.inner_lr 1 --model.inner_rate 1` --data.root a --data.rot b --data.help X") == [
        "data.rot",
        "model.inner_rate",
    ]


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS, ids=lambda page: page.name)
def test_every_flag_exists(page):
    assert unknown_flags(text_of(page)) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_is_stored_as_it_ran(notebook):
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"display_data", "execute_result", "stream"}
    assert any("image/png" in output.get("data", {}) for output in outputs) or "scratch" in notebook.name
    printed = "".join("".join(output.get("text", ())) for output in outputs)
    assert not re.search(r"(^|\s)/\w+/|Warning", printed), printed  # paths of a machine


def test_the_readme_names_flags():
    assert len(re.findall(r"--(?:model|data)\.\w+", (ROOT / "README.md").read_text())) > 10


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def files_of(nav):
    """The pages that a navigation of MkDocs lists."""
    if isinstance(nav, str):
        return {nav}
    return {file for part in (nav.values() if isinstance(nav, dict) else nav) for file in files_of(part)}


def test_the_site_lists_every_page_and_every_public_name():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert files_of(settings["nav"]) == {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:] + NOTEBOOKS}
    listed = re.findall(r"^::: maml_lightning\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(set(maml_lightning.__all__) - {"__version__"})


def test_no_page_is_without_a_title():
    assert [page.name for page in PAGES + NOTEBOOKS if not text_of(page).startswith("# ")] == []


@pytest.fixture
def hooks(monkeypatch):
    """docs/hooks.py, with a stand-in for the converter of the extra "docs"."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    converter = types.ModuleType("latex2mathml.converter")
    converter.convert = lambda latex, display: f"<math {display}>{latex}</math>"
    monkeypatch.setitem(sys.modules, "latex2mathml", types.ModuleType("latex2mathml"))
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", converter)
    return module


def test_equations_outside_code_become_mathml(hooks):
    page = "<p>$a &lt; b$ costs 5 $.</p>\n<p>$$\\theta'\n= 1$$</p><pre>$x $y</pre><code>$z$</code> $K$"
    assert hooks.with_mathml(page) == (
        "<p><math inline>a < b</math> costs 5 $.</p>\n<p><math block>\\theta'\n= 1</math></p>"
        "<pre>$x $y</pre><code>$z$</code> <math inline>K</math>"
    )


def test_a_notebooks_stored_figures_agree_with_those_of_a_run(hooks, tmp_path):
    text = "MAML 55.7% in 34 s, error 2.1e-15\n"
    assert hooks.agree(text, "MAML 57.3% in 200 s, error 1e-12\n")
    assert not hooks.agree(text, "MAML 75.7% in 34 s, error 2.1e-15\n")
    assert not hooks.agree(text, "MAML 55.7% in 34 s, error 2.1e-5\n")
    assert not hooks.agree(text, "ANIL 55.7% in 34 s, error 2.1e-15\n")
    assert not hooks.agree(text, "")
    picture = {"output_type": "display_data", "data": {"image/png": "", "text/plain": ["<Figure>"]}}
    value = {"output_type": "execute_result", "data": {"text/plain": ["3"]}}
    stream = {"output_type": "stream", "text": ["a 1\n", "b\n"]}
    stored = {"cells": [{"cell_type": "code", "outputs": [stream, picture, value]}, {"cell_type": "markdown"}]}
    (tmp_path / "a.ipynb").write_text(json.dumps(stored))
    assert hooks.printed(tmp_path / "a.ipynb") == "a 1\nb\n3"
    file = SimpleNamespace(src_uri="a.ipynb", abs_src_path=tmp_path / "a.ipynb")
    shown = '<div class="jp-RenderedText jp-OutputArea-output" data-mime-type="a">\n<pre>{}</pre>'
    page = "<p>1</p>" + shown.format("a 1\nb\n") + shown.format("3")
    assert hooks.on_page_content(page, SimpleNamespace(file=file)) == page
    with pytest.raises(ValueError, match=r"a\.ipynb printed\na 2\n"):
        hooks.on_page_content(page.replace("a 1", "a 2"), SimpleNamespace(file=file))


def test_a_notebook_loads_nothing_from_elsewhere(hooks, tmp_path):
    (tmp_path / "a.ipynb").write_text('{"cells": []}')
    notebook = SimpleNamespace(file=SimpleNamespace(src_uri="a.ipynb", abs_src_path=tmp_path / "a.ipynb"))
    loaders = '<!-- Load mathjax --><script src="a.js"> </script><!-- End of mathjax configuration -->'
    loaders += '<script type="module">x(".jp-Mermaid"); import("https://a/b.mjs")</script>'
    page = f'{loaders}<a href="data.md#arrays">$1$</a>'
    assert hooks.on_page_content(page, notebook) == '<a href="../data/#arrays"><math inline>1</math></a>'
    other = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    assert hooks.on_page_content(page, other) == page
    with pytest.raises(ValueError, match=r"a\.ipynb loads from elsewhere"):
        hooks.on_page_content('<script async src="https://a/b.js"></script>', notebook)
