"""The report on the imbalances of a detector: a warm-up where it needs one, what is measured, and what it advises."""
