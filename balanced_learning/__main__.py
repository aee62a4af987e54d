"""Prints what is installed and in use: ``python -m balanced_learning``."""

from . import backend_info

for key, value in backend_info().items():
    print(f"{key:18} {value}")
