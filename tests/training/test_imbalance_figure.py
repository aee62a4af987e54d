import math
from dataclasses import replace

import pytest
from PIL import Image

from balanced_learning.training.config import Config
from balanced_learning.training.errors import UserError
from balanced_learning.training.evaluation import ErrorKind, Evaluation
from balanced_learning.training.imbalance.advice import advise
from balanced_learning.training.reporting.imbalance_figure import GREEN, VERDICTS, save_imbalance
from balanced_learning.training.tide import KINDS
from tests.training.imbalance_data import feature_level, measurements, objective_level

CONFIG = Config.of({"sampler": False, "pyramid": False, "box_loss": False})
UNKNOWN = measurements(  # of a RetinaNet without a box
    sample=None,
    feature=replace(feature_level([[math.nan] * 2] * 2, math.nan, math.nan), boxes=[math.nan] * 2),
    objective=objective_level(**dict.fromkeys(vars(objective_level()), math.nan)),
    evaluation=Evaluation({"AP50": None, "AP75": None}, {kind: ErrorKind(0, None) for kind in KINDS}, []),
)


def colors_in(path, left, right):
    """Of the pixels between two shares of the width."""
    with Image.open(path) as picture:
        part = picture.convert("RGB").crop((int(left * picture.width), 0, int(right * picture.width), picture.height))
        return {f"#{red:02x}{green:02x}{blue:02x}" for _, (red, green, blue) in part.getcolors(maxcolors=2**24)}


@pytest.mark.parametrize("measured", [measurements(), UNKNOWN], ids=["known", "unknown"])
def test_each_level_has_a_column_with_its_verdict(tmp_path, measured):
    advices = [replace(advice, verdict="little") for advice in advise(measured, CONFIG)]
    advices[1] = replace(advices[1], verdict="nothing")
    save_imbalance(tmp_path / "page.png", "title", measured, advices)
    columns = [colors_in(tmp_path / "page.png", i / 3, (i + 1) / 3) for i in range(3)]
    assert [VERDICTS["little"] in colors for colors in columns] == [True, False, True]
    assert VERDICTS["nothing"] in columns[1]
    assert (GREEN in columns[0]) == (measured.sample is not None)  # its bars of IoU-balanced sampling


def test_a_page_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        save_imbalance(tmp_path / "none" / "page.png", "title", UNKNOWN, advise(UNKNOWN, CONFIG))
