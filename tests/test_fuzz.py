"""A short part of ``python -m tests.fuzz``."""

from collections import Counter

import pytest
import torch

from balanced_learning.training import state_dicts
from tests.fuzz.verdict import WrongError
from tests.fuzz.worker import make_ways, random_of

SLOW = {"checkpoint: values of a detector": 2, "coco: index": 6, "coco: header of the index": 6}
TRIES = 40  # of each other way


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "")  # set by what follows, and reset behind it
        torch.set_num_threads(1)
        yield make_ways(tmp_path_factory.mktemp("fuzz"))
    torch.set_num_threads(threads)


def test_whatever_is_spoilt_is_refused_in_a_line_or_can_be_used(ways):
    outcomes = {}
    for way, spoil in ways.items():
        numbers = range(SLOW.get(way, TRIES))
        outcomes[way] = Counter(spoil(random_of(1, way, number)) for number in numbers)
    assert all(outcomes[way]["refused"] for way in ways if "index" not in way)
    assert {"refused", "same"} <= outcomes["checkpoint: bytes"].keys()
    assert outcomes["checkpoint: flip in tensors"].keys() == {"refused"}


def test_a_reader_without_checksums_is_found_out(ways, monkeypatch):
    monkeypatch.setattr(state_dicts, "_verify", lambda file: None)
    with pytest.raises(WrongError, match="is not as it was"):
        [ways["checkpoint: flip in tensors"](random_of(1, "", number)) for number in range(20)]
