import math
import os

import pytest

from balanced_learning.training.errors import UserError
from balanced_learning.training.reporting.metrics import read_rows, write_rows

ROWS = [{"epoch": 0, "loss": 0.1 + 0.2, "AP": None}, {"epoch": 1, "loss": 1e-300, "AP": 0.25, "skipped_steps": 3}]


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    for rows in (ROWS, ROWS[:1], []):
        write_rows(path, rows)
        assert read_rows(path) == rows
    write_rows(path, [{"epoch": 0, "loss": math.nan}])
    assert math.isnan(read_rows(path)[0]["loss"])


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"{", b"[]", b"5", b"null", b"{}", b"\xff\xfe", b"\0" * 200, b"[" * 10**5, b'{"epoch": 1'),
        *(b'{"epoch": true}', b'{"epoch": 1.0}', b'{"epoch": -5}', b'{"epoch": "1"}', b'{"epoch": null}'),
        *(b'{"epoch": 1, "loss": "x"}', b'{"epoch": 1, "AP": [1]}', b'{"epoch": ' + b"9" * 5000 + b"}"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 0}\n' + line + b'\n{"epoch": 2}\n')
    with pytest.raises(UserError, match=r"/metrics\.jsonl: line 2 is not the row of an epoch: ") as caught:
        read_rows(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(UserError, match="not a file"):
            read_rows(tmp_path / name)
