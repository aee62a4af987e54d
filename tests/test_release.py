"""What a release says of itself in more than one place is the same in all of them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_newest_change_is_unreleased_or_of_this_version():
    version = re.search(r'^version = "(.+)"$', PROJECT, re.MULTILINE)[1]
    newest, *older = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    dated = rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d"
    assert re.fullmatch(f"Unreleased|{dated}", newest)
    if newest == "Unreleased" and older:
        assert re.fullmatch(dated, older[0])


@pytest.mark.parametrize("file", ["pyproject.toml", "CITATION.cff"])
def test_addresses_are_in_the_repository(file):
    source = re.search(r'^Source = "(.+)"$', PROJECT, re.MULTILINE)[1]
    owner, name = source.split("/")[-2:]
    addresses = re.findall(r"https://[^\s\"]+", (ROOT / file).read_text())
    ours = [address for address in addresses if name in address or owner in address]
    assert ours
    assert all(address == source or address.startswith(f"{source}/") for address in ours)
