"""Image files under the names that exporters write."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balanced_learning.training.data.coco import read_split
from balanced_learning.training.data.file_names import find_file, tell_found
from balanced_learning.training.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A folder of files, with a file beside it."""
    for name in ("in/1.png", "in/images/2.png", "in/images/a b.png", "in/a%20b.png", "in/caf\u00e9.png", "out/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("1.png", "1.png"),
        ("./images//2.png", "./images//2.png"),
        ("images\\2.png", "images/2.png"),
        ("images/1.png", "1.png"),
        ("in/images/2.png", "images/2.png"),
        ("images/in/2.png", None),
        ("2.png", None),
        ("C:\\data\\images\\2.png", "images/2.png"),
        ("\\\\server\\share\\images\\2.png", "images/2.png"),
        ("/abs/elsewhere/1.png", "1.png"),
        ("..\\images\\2.png", "images/2.png"),
        ("../../nowhere/1.png", "1.png"),
        ("../out/3.png", "../out/3.png"),
        ("..\\out\\3.png", "../out/3.png"),
        ("file:///home/me/images/2.png", "images/2.png"),
        ("file:///C:/data/images/a%20b.png", "images/a b.png"),
        ("http://localhost:8080/data/upload/1/1.png", "1.png"),
        ("s3://bucket/images/2.png?versionId=3", "images/2.png"),
        ("/data/upload/1/1.png", "1.png"),
        ("/data/local-files/?d=images%5C2.png", "images/2.png"),
        ("/data/local-files/?d=set/images/a%20b.png&x=1", "images/a b.png"),
        ("http://localhost/data/local-files/?d=images%2F2.png", "images/2.png"),
        ("images%5Ca%20b.png", "images/a b.png"),
        ("images%2fa b.png", "images/a b.png"),
        ("a%20b.png", "a%20b.png"),
        ("images/a%20b.png", "images/a b.png"),  # longer than a%20b.png
        ("cafe\u0301.png", "caf\u00e9.png"),
        ("caf%C3%A9.png", "caf\u00e9.png"),
        ("%2e%2e/out/3.png", None),
        ("..%5Cout%5C3.png", None),
        ("images/../../out/9.png", None),
        ("x/images", None),
        ("3.png", None),
        ("1.png\0", None),
        (300 * "x" + "/1.png", "1.png"),
        (300 * "x", None),
        ("\ud800.png", None),
        ("%", None),
        ("?d=%", None),
    ],
)
def test_a_file_is_found_under_the_name_that_an_exporter_gave_it(folder, written, found):
    assert find_file(folder, written) == find_file(str(folder), written) == found


def test_an_absolute_name_is_one_as_written(folder):
    name = str(folder.parent / "out" / "3.png")
    assert find_file(folder, name) == name
    assert find_file(folder, name.replace("out", "nowhere")) is None


def test_the_longest_end_of_the_path_goes_first(folder):
    (folder / "2.png").touch()
    assert find_file(folder, "C:\\images\\2.png") == "images/2.png"
    assert find_file(folder, "C:\\other\\2.png") == "2.png"


def test_a_folder_named_as_written_is_found_for_its_fault_to_be_told(folder):
    assert find_file(folder, "images") == "images"


@given(
    st.lists(st.sampled_from(["..", "%2e%2e", "/", "\\", "%5C", "%2F", "?d=", "in", "out", "secret", "a"]), max_size=9)
)
def test_only_a_name_as_written_leads_out_of_the_folder(tmp_path_factory, parts):
    root = tmp_path_factory.getbasetemp() / "names"
    for name in ("in/a", "in/out/secret", "out/secret", "secret"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    written = "".join(parts)
    found = find_file(root / "in", written)
    if found is not None and found.replace("\\", "/") != written.replace("\\", "/"):
        assert (root / "in") in (root / "in" / found).resolve().parents


def test_names_as_written_are_passed_over(capsys):
    tell_found(Path("a.json"), ["1.png", "1.png"], ["1.png", "1.png"])
    assert capsys.readouterr() == ("", "")


def test_files_of_two_folders_are_not_one_file():
    with pytest.raises(UserError, match=r"a\.json: file names 1/x\.png and 2/x\.png both lead to x\.png"):
        tell_found(Path("a.json"), ["y.png", "1/x.png", "2/x.png"], ["y.png", "x.png", "x.png"])


def test_one_file_written_with_either_slash_is_one_file(capsys):
    tell_found(Path("a.json"), ["a/x.png", "a\\x.png"], ["a/x.png", "a/x.png"])
    assert "1 of 2 images" in capsys.readouterr().err


def test_a_split_says_which_files_it_found_otherwise(coco_root, edit, capsys):
    (coco_root / "train2017" / "images").mkdir()
    (coco_root / "train2017" / "11.png").rename(coco_root / "train2017" / "images" / "11.png")
    file = edit(lambda content: content["images"][0].update(file_name="images\\11.png"))
    split = read_split(coco_root, "train2017")
    assert [image["file_name"] for image in split.images] == ["images/11.png", "12.png"]
    assert capsys.readouterr().err == (
        f"warning: {file}: 1 of 2 images were found under other names than written, the first as images/11.png for "
        "images\\11.png\n"
    )
