"""Measurements of the three imbalances that Libra R-CNN is about, of a detector on images."""
