"""Fixtures of data sets in COCO layout."""

from tests.training.coco_data import coco_root, edit, real_data

__all__ = ["coco_root", "edit", "real_data"]
