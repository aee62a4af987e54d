import pytest

from balanced_learning.training.evaluation import ClassResult, ErrorKind, Evaluation
from balanced_learning.training.reporting.tables import metrics_table, report, summary
from balanced_learning.training.tide import KINDS, SPECIAL_KINDS


def result(number, ap, name=None, **costs):
    errors = {kind: ErrorKind(int(kind in costs), costs.get(kind, 0.0)) for kind in (*KINDS, *SPECIAL_KINDS)}
    return ClassResult(number, name or f"class {number}", 0 if ap is None else 5, ap, ap, errors)


def evaluation(classes):
    errors = {kind: ErrorKind(n, n / 1000) for n, kind in enumerate((*KINDS, *SPECIAL_KINDS))}
    return Evaluation({"AP": 0.1234, "APl": None}, errors, classes)


def test_metrics_are_in_percent_with_dashes():
    assert metrics_table({"AP": 0.1234, "APl": None}).split() == ["AP", "APl", "12.3", "-"]


def test_an_epoch_gets_one_line_of_errors():
    last = summary(evaluation([])).splitlines()[-1]
    assert last == (
        "AP50 lost to: classification 0.0, localisation 0.1, both 0.2, duplicate 0.3, background 0.4, missed 0.5"
    )


def test_without_ground_truth_costs_are_dashes():
    nothing = Evaluation({"AP": None}, {kind: ErrorKind(0, None) for kind in (*KINDS, *SPECIAL_KINDS)}, [])
    assert "background -, missed -" in summary(nothing)
    assert "missed                0      -" in report(nothing)


@pytest.mark.parametrize(("count", "shown"), [(20, 20), (22, 20), (365, 20)])
def test_of_many_classes_the_worst_and_the_best_are_shown(count, shown):
    text = report(evaluation([result(n, (n * 7 % count) / count) for n in range(count)]))
    lines = [line for line in text.splitlines() if "  class " in line and not line.startswith("     AP")]
    assert len(lines) == shown
    aps = [float(line.split()[0]) for line in lines]
    assert aps == sorted(aps)
    assert (aps[0], aps[-1]) == (0, pytest.approx(100 * (count - 1) / count, abs=0.05))
    assert (f"{count - 20} more" in text) == (count > 20)


def test_a_class_tells_what_costs_it_most_and_its_name_cannot_harm_the_terminal():
    costly = result(1, 0.5, "a\x1b[31m/\n" + 50 * "é", localisation=0.2, missed=0.3, **{"false negative": 0.4})
    text = report(evaluation([costly, result(2, None, "nowhere")]))
    assert "   50.0   50.0        5      4  missed 30.0            a\\x1b[31m/\\nééé" in text
    assert 40 * "é" not in text
    assert "      -      -        0      0  -                      nowhere" in text
