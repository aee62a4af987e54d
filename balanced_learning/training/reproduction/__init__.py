"""The paper's Tables 1 to 6, trained again: see ``examples/reproduce.py``."""
