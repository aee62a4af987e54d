import pytest

from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.measuring import detector_and_images, origin_of_weights
from tests.training.coco_data import add_images
from tests.training.small import SMALL, config_of, save_untrained


@pytest.mark.parametrize(("batches", "positions"), [(1, [0, 3]), (2, [0, 1, 3, 5]), (4, list(range(7)))])
def test_images_to_measure_are_spread_over_the_data(coco_root, batches, positions):
    add_images(coco_root, "train", 5)
    _, dataset = detector_and_images(config_of("--data-path", coco_root, *SMALL), None, batches)
    assert dataset.positions.tolist() == positions


def test_what_is_measured_says_whose_weights_it_rests_on(tmp_path):
    path = save_untrained(tmp_path / "checkpoint.pth")
    config = config_of("--data-path", "-", *SMALL)
    assert origin_of_weights(config, Checkpoint.load(path)) == f"weights of {path}, after 1 of 1 epochs"
    assert "untrained" in origin_of_weights(config, None)
    assert "of --weights DEFAULT" in origin_of_weights(config_of("--data-path", "-", "--weights", "DEFAULT"), None)
