"""Recipes as files: bases, notes, and what is wrong with them."""

import re

import pytest

from balanced_learning.training.command_line import read_command_line
from balanced_learning.training.errors import UserError
from balanced_learning.training.flags import make_parser
from balanced_learning.training.recipe import Recipe, list_recipes


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return name

    return write


def test_a_recipe_goes_before_its_base(write):
    write("base.toml", 'about = "base"\nnote = "careful"\n[training]\nepochs = 3\nlr = 0.1\n[model]\nsampler = false\n')
    own = write("own.toml", 'base = "base.toml"\n[training]\nepochs = 5\n')
    recipe = Recipe.read(own)
    assert recipe.settings == {"epochs": 5, "lr": 0.1, "sampler": False}
    assert (recipe.about, recipe.note) == ("", "careful")


def test_the_base_may_be_one_of_the_library(write):
    own = write("own.toml", 'base = "shapes"\nnote = ""\n[model]\nsmall = false\n')
    assert Recipe.read(own).settings == Recipe.read("shapes").settings | {"small": False}


def test_a_base_lies_beside_its_recipe(tmp_path, write):
    (tmp_path / "deep").mkdir()
    write("deep/base.toml", "[training]\nepochs = 7\n")
    assert Recipe.read(write("deep/own.toml", 'base = "base.toml"')).settings == {"epochs": 7}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "magic"', "--recipe magic: no such file"),
        ('base = "own.toml"', r"--recipe own.toml: its bases lead in a circle, own.toml > own.toml"),
        ("base = 3", "--recipe own.toml: base must be a text, got 3"),
        ("[base]\nname = 1", "--recipe own.toml: base must be a text, got {'name': 1}"),
        ('bases = "shapes"', "'bases' is none of its keys, base, about, note, and no table"),
    ],
)
def test_a_wrong_base_is_told_by_name(write, text, message):
    with pytest.raises(UserError, match=message):
        Recipe.read(write("own.toml", text))


def test_a_note_is_said_when_a_run_starts(write, capsys, monkeypatch):
    own = write("own.toml", 'note = "newer weights"')
    given = make_parser().parse_args(["--recipe", own, "--data-path", "coco"])
    read_command_line(given)
    assert capsys.readouterr().err == "warning: --recipe own.toml: newer weights\n"
    monkeypatch.setenv("RANK", "1")
    read_command_line(given)
    assert capsys.readouterr().err == ""


def test_the_recipes_are_listed(capsys):
    with pytest.raises(SystemExit) as end:
        read_command_line(make_parser().parse_args(["--list-recipes"]))
    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    assert "\n".join(lines) == list_recipes()
    named = {line.split()[0]: line for line in lines}
    assert {"shapes", "paper/libra_faster_rcnn_r50_1x", "modern/retinanet_r50_1x"} <= named.keys()
    assert "paper/base" not in named
    assert all(re.fullmatch(r"\S+  +\S.{10,90}", line) for line in lines)
