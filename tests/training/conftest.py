"""Fixtures of data sets in COCO layout."""

from tests.training.coco_data import coco_root, edit, real_data
from tests.training.disks import disk, small_cut_disk, small_disk

__all__ = ["coco_root", "disk", "edit", "real_data", "small_cut_disk", "small_disk"]
