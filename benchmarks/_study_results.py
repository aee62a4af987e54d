"""The study's results: their rows in order, and the differences between them."""

from itertools import groupby
from typing import Any

PLAIN, PAPERS_PLAIN, BOX_LOSS, LIBRA = "plain", "plain_beta_1", "balanced_l1", "libra"
PARTS = ("sampler", "pyramid", BOX_LOSS, "sampler_pyramid", LIBRA)  # of Libra
WORDS = {
    **{"bccd": "BCCD", "deeppcb": "DeepPCB", "finetuned": "fine-tuned", "scratch": "from scratch"},
    **{"slow": "half the rate", "long": "twice the epochs"},
}
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}  # of the objects that a metric is about
FEWEST_BOXES = 30  # that a metric may rest on

Situation = dict[str, Any]  # as benchmarks/results/study.json has it
Results = dict[str, Situation]


def title(name: str) -> str:
    """A situation in words."""
    groups = groupby(name.split("_"), WORDS.__contains__)
    return ", ".join((", " if known else " ").join(WORDS.get(word, word) for word in words) for known, words in groups)


def values(situation: Situation, row: str, metric: str) -> dict[str, float]:
    """A metric by seed, where it is defined and rests on enough boxes."""
    if situation["boxes"].get(SIZES.get(metric), FEWEST_BOXES) < FEWEST_BOXES:
        return {}
    seeds = situation["rows"].get(row, {}).get("seeds", {})
    return {seed: run[metric] for seed, run in seeds.items() if run[metric] is not None}


def differences(situation: Situation, row: str, against: str, metric: str) -> list[float]:
    """Of two rows, for each seed that both have."""
    ours, theirs = values(situation, row, metric), values(situation, against, metric)
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def ordered(situation: Situation) -> list[str]:
    """The rows that have runs: the plain one, the parts of Libra, the others."""
    return [name for name in dict.fromkeys([PLAIN, *PARTS, *situation["rows"]]) if name in situation["rows"]]


def compared(situation: Situation) -> list[tuple[str, str]]:
    """The rows with their baselines; of what replaces the box loss, with the paper's baseline as well."""
    pairs = [(name, situation["rows"][name]["baseline"]) for name in ordered(situation)]
    pairs += [(name, PAPERS_PLAIN) for name in (BOX_LOSS, LIBRA)]
    return [pair for pair in dict.fromkeys(pairs) if differences(situation, *pair, "AP")]


def against_plain(situation: Situation) -> list[str]:
    """The rows that can be compared with the plain one."""
    return [name for name in ordered(situation) if name != PLAIN and differences(situation, name, PLAIN, "AP")]


def label(situation: Situation, row: str) -> str:
    return situation["rows"][row]["label"]


def counted(number: int) -> str:
    return f"{number} seed{'s' if number > 1 else ''}"
