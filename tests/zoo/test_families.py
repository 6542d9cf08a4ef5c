"""The families of torchvision, and of timm, transformers and torch_geometric where they are installed."""

import pytest

from tests.zoo.families import CASES, OTHERS, installed
from tests.zoo.test_zoo import QUICK, check_adapt, check_steps, ids, refused

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("default"),  # what other packages warn of
]
SETTINGS = {
    "second order": QUICK,
    "first order": {**QUICK, "first_order": True},
    "auto": {"inner_steps": 1, "tasks_per_chunk": "auto"},
}


@pytest.fixture(autouse=True)
def _is_installed(request: pytest.FixtureRequest) -> None:
    package = request.node.callspec.params["case"].name.split()[0]
    if package in OTHERS and not installed(package):
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("case", CASES, **ids)
def test_meta_steps_are_those_of_the_plain_loop(case, settings):
    refused(case, lambda: check_steps(case, **SETTINGS[settings]))


@pytest.mark.parametrize("case", CASES, **ids)
def test_adapt_is_that_of_the_plain_loop(case):
    refused(case, lambda: check_adapt(case))
