"""The tables are those of the paper."""

import pytest

from balanced_learning.training.errors import UserError
from balanced_learning.training.recipe import Recipe
from balanced_learning.training.reproduction.published import NUMBERS, read_table

TABLE_1 = """
| Faster R-CNN* | R-50-FPN | 1x | 36.2 | 58.5 | 38.9 | 21.0 | 38.9 | 45.3 |
| Faster R-CNN* | R-101-FPN | 1x | 38.8 | 60.9 | 42.1 | 22.6 | 42.4 | 48.5 |
| Faster R-CNN* | R-101-FPN | 2x | 39.7 | 61.3 | 43.4 | 22.1 | 43.1 | 50.3 |
| Faster R-CNN* | X-101-FPN | 1x | 41.9 | 63.9 | 45.9 | 25.0 | 45.3 | 52.3 |
| RetinaNet* | R-50-FPN | 1x | 35.8 | 55.3 | 38.6 | 20.0 | 39.0 | 45.1 |
| Libra R-CNN | R-50-FPN | 1x | 38.7 | 59.9 | 42.0 | 22.5 | 41.1 | 48.7 |
| Libra R-CNN | R-101-FPN | 1x | 40.3 | 61.3 | 43.9 | 22.9 | 43.1 | 51.0 |
| Libra R-CNN | R-101-FPN | 2x | 41.1 | 62.1 | 44.7 | 23.4 | 43.7 | 52.5 |
| Libra R-CNN | X-101-FPN (64x4d) | 1x | 43.0 | 64.0 | 47.0 | 25.3 | 45.6 | 54.6 |
| Libra RetinaNet | R-50-FPN | 1x | 37.8 | 56.9 | 40.5 | 21.2 | 40.9 | 47.7 |
"""
TABLE_2 = """
| | | | 35.9 | 58.0 | 38.4 | 21.2 | 39.5 | 46.4 |
| x | | | 36.8 | 58.0 | 40.0 | 21.1 | 40.3 | 48.2 |
| x | x | | 37.7 | 59.4 | 40.9 | 22.4 | 41.3 | 49.3 |
| x | x | x | 38.5 | 59.3 | 42.0 | 22.9 | 42.1 | 50.5 |
"""
TABLE_3 = """
| RPN* | R-50-FPN | 42.5 | 51.2 | 57.1 |
| RPN* | R-101-FPN | 45.4 | 53.2 | 58.7 |
| RPN* | X-101-FPN | 47.8 | 55.0 | 59.8 |
| Libra RPN | R-50-FPN | 52.1 | 58.3 | 62.5 |
"""
TABLE_4 = """
| baseline | 35.9 | 58.0 | 38.4 | 21.2 | 39.5 | 46.4 |
| Pos Balance | 36.1 | 58.2 | 38.2 | 21.3 | 40.2 | 47.3 |
| K = 2 | 36.7 | 57.8 | 39.9 | 20.5 | 39.9 | 48.9 |
| K = 3 | 36.8 | 57.9 | 39.8 | 21.4 | 39.9 | 48.7 |
| K = 5 | 36.7 | 57.7 | 39.9 | 19.9 | 40.1 | 48.7 |
"""
TABLE_5 = """
| baseline | 35.9 | 58.0 | 38.4 | 21.2 | 39.5 | 46.4 |
| integration only | 36.3 | 58.8 | 38.8 | 21.2 | 40.1 | 46.3 |
| + refinement | 36.8 | 59.5 | 39.5 | 22.3 | 40.6 | 46.5 |
| PAFPN | 36.3 | 58.4 | 39.0 | 21.7 | 39.9 | 46.3 |
| Balanced PAFPN | 37.2 | 60.0 | 39.8 | 22.7 | 40.8 | 47.4 |
"""
TABLE_6 = """
| baseline (smooth L1, weight 1) | 35.9 | 58.0 | 38.4 | 21.2 | 39.5 | 46.4 |
| weight 1.5 | 36.4 | 58.0 | 39.7 | 20.8 | 39.9 | 47.5 |
| weight 2.0 | 36.2 | 57.3 | 39.5 | 20.2 | 40.0 | 47.5 |
| L1 (1.0) | 36.4 | 57.4 | 39.1 | 21.0 | 39.7 | 47.9 |
| L1 (1.5) | 36.6 | 57.2 | 39.8 | 20.2 | 40.0 | 48.2 |
| L1 (2.0) | 36.4 | 56.5 | 39.6 | 20.1 | 39.8 | 48.2 |
| .2 1.0 | 36.7 | 58.1 | 39.5 | 21.4 | 40.4 | 47.4 |
| .3 1.0 | 36.5 | 58.2 | 39.2 | 21.6 | 40.2 | 47.2 |
| .5 1.0 | 36.5 | 58.2 | 39.2 | 21.5 | 39.9 | 47.2 |
| .5 1.5 | 37.2 | 58.0 | 40.0 | 21.3 | 40.9 | 47.9 |
| .5 2.0 | 37.0 | 58.0 | 40.0 | 21.2 | 40.8 | 47.6 |
"""
PRINTED = {1: TABLE_1, 2: TABLE_2, 3: TABLE_3, 4: TABLE_4, 5: TABLE_5, 6: TABLE_6}

# By row: the recipe, and the row that it is compared with.
RCNN = {
    "faster_rcnn_r50_1x": ("faster_rcnn_r50_1x", None),
    "faster_rcnn_r101_1x": ("faster_rcnn_r101_1x", None),
    "faster_rcnn_r101_2x": ("faster_rcnn_r101_2x", None),
    "faster_rcnn_x101_1x": ("faster_rcnn_x101_64x4d_1x", None),
    "retinanet_r50_1x": ("retinanet_r50_1x", None),
    "libra_rcnn_r50_1x": ("libra_faster_rcnn_r50_1x", "faster_rcnn_r50_1x"),
    "libra_rcnn_r101_1x": ("libra_faster_rcnn_r101_1x", "faster_rcnn_r101_1x"),
    "libra_rcnn_r101_2x": ("libra_faster_rcnn_r101_2x", "faster_rcnn_r101_2x"),
    "libra_rcnn_x101_1x": ("libra_faster_rcnn_x101_64x4d_1x", "faster_rcnn_x101_1x"),
    "libra_retinanet_r50_1x": ("libra_retinanet_r50_1x", "retinanet_r50_1x"),
}
MMDET_1 = [37.4, 39.4, 42.1, 36.5, 38.3, 40.1, 42.7, 37.6]
MMDET_3 = [58.2, 61.0]


def numbers_of(line: str) -> list[float]:
    """The numbers of a printed row that have one decimal and a cell of their own."""
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return [float(cell) for cell in cells if cell.replace(".", "", 1).isdigit() and "." in cell]


@pytest.mark.parametrize("number", PRINTED)
def test_published_numbers_are_those_that_were_printed(number):
    table = read_table(number)
    printed = [numbers_of(line) for line in PRINTED[number].strip().splitlines()]
    metrics = ["AR100", "AR300", "AR1000"] if number == 3 else ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert [list(row.published.values()) for row in table.rows] == printed
    assert {tuple(row.published) for row in table.rows} == {tuple(metrics)} == {table.metrics}
    assert table.split == ("test-dev" if number == 1 else "val2017")


@pytest.mark.parametrize("number", [2, 4, 5, 6])
def test_an_ablation_is_compared_with_its_first_row(number):
    first, *others = read_table(number).rows
    assert (first.name, first.recipe, first.baseline) == ("baseline", "paper/fast_rcnn_r50_1x", None)
    assert {row.baseline for row in others} == {"baseline"}
    assert len({row.recipe for row in others} | {first.recipe}) == len(others) + 1


def test_rows_of_detectors_have_their_recipes_and_baselines():
    rows = {row.name: (row.recipe.removeprefix("paper/"), row.baseline) for row in read_table(1).rows}
    assert rows == RCNN


def test_rows_differ_in_what_the_paper_says():
    settings = {row.name: Recipe.read(row.recipe).settings for number in (4, 6) for row in read_table(number).rows}
    for name, bins in (("k2", 2), ("k3", 3), ("k5", 5)):
        assert (settings[name]["sampler"], settings[name].get("num_bins", 3)) == (True, bins)
    for name, (alpha, gamma) in {"a0.2_g1": (0.2, 1), "a0.3_g1": (0.3, 1), "a0.5_g1.5": (0.5, 1.5)}.items():
        assert settings[name]["box_loss"]
        assert (settings[name].get("alpha", 0.5), settings[name].get("gamma", 1.5)) == (alpha, gamma)
    for name, (beta, weight) in {"smooth_l1_w1.5": (1, 1.5), "l1_w2": (0, 2), "l1_w1": (0, 1)}.items():
        assert not settings[name]["box_loss"]
        assert (settings[name]["beta"], settings[name].get("box_loss_weight", 1)) == (beta, weight)


def test_modern_tables_have_one_published_number_a_row():
    one, three = read_table(1, "modern"), read_table(3, "modern")
    assert [row.published for row in one.rows] == [{"AP": value} for value in MMDET_1]
    assert [row.published for row in three.rows] == [{"AR1000": value} for value in MMDET_3]
    assert {row.recipe.split("/")[0] for row in (*one.rows, *three.rows)} == {"modern"}
    assert one.metrics == read_table(1).metrics
    with pytest.raises(UserError, match="--table 4: of the modern family there are 1 and 3 alone"):
        read_table(4, "modern")


def test_files_of_a_family_do_not_take_the_place_of_those_of_the_other():
    stems = [read_table(number, family).stem for family, numbers in NUMBERS.items() for number in numbers]
    assert stems == [*(f"table_{number}" for number in range(1, 7)), "table_1_modern", "table_3_modern"]
    assert read_table("study").stem == "table_study"


def test_rows_of_the_study_differ_in_what_they_say():
    """Its detectors differ in their parts and in their box loss alone."""
    table = read_table("study")
    base = Recipe.read("study/base").settings
    own = {row.name: Recipe.read(row.recipe).settings.items() - base.items() for row in table.rows}
    assert {name: dict(settings) for name, settings in own.items()} == {
        "plain": {},
        "sampler": {"sampler": True},
        "pyramid": {"pyramid": True},
        "balanced_l1": {"box_loss": True},
        "sampler_pyramid": {"sampler": True, "pyramid": True},
        "libra": {"sampler": True, "pyramid": True, "box_loss": True},
        "plain_beta_1": {"beta": 1.0},
        "smooth_l1_w1.5": {"beta": 1.0, "box_loss_weight": 1.5},
        "smooth_l1_w2": {"beta": 1.0, "box_loss_weight": 2.0},
        "l1": {"beta": 0.0},
    }
    assert not any(base[part] for part in ("sampler", "pyramid", "box_loss"))
    assert [row.baseline for row in table.rows] == [None, *["plain"] * 9]
    assert not any(row.published for row in table.rows)
    with pytest.raises(UserError, match="--table study: of the modern family there are 1 and 3 alone"):
        read_table("study", "modern")


def test_a_row_has_the_note_of_its_recipe():
    rows = {row.name: row.note for row in read_table(1).rows}
    assert "X-101" in rows["libra_rcnn_x101_1x"]
    assert not rows["faster_rcnn_r50_1x"]


@pytest.mark.parametrize(
    ("number", "family"),
    [*((n, family) for family, numbers in NUMBERS.items() for n in numbers), ("study", "paper")],
)
def test_rows_can_be_named_on_a_command_line(number, family):
    rows = read_table(number, family).rows
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert all(len(name.split()) == 1 for name in names)
    assert {row.baseline for row in rows} <= {None, *names}
