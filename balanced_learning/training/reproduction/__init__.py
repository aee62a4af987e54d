"""The paper's Tables 1 to 6 and the study of the parts, trained: see ``examples/reproduce.py``."""
