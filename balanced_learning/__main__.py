"""``python -m balanced_learning``: what is installed and in use."""

from . import backend_info

for key, value in backend_info().items():
    print(f"{key:18} {value}")
