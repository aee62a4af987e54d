"""Fixtures of data sets in COCO layout."""

from tests.training.coco_data import coco_root, edit, real_data
from tests.training.disks import disk, large_cut_disk, small_disk

__all__ = ["coco_root", "disk", "edit", "large_cut_disk", "real_data", "small_disk"]
