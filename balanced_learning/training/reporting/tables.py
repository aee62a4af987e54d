"""An evaluation as text, in percent as papers print it."""

from balanced_learning.training.errors import printable
from balanced_learning.training.evaluation import ClassResult, Evaluation
from balanced_learning.training.tide import KINDS, SPECIAL_KINDS

SHOWN_CLASSES = 10  # of the worst, and as many of the best
SHOWN_LETTERS = 40  # of the name of a class

MEANINGS = {
    "classification": "on an object of another class",
    "localisation": "on an object, but with an IoU of 0.1 to 0.5: what balanced L1 is for",
    "both": "near an object of another class",
    "duplicate": "on an object that is already found",
    "background": "on no object: what the IoU-balanced sampler is for, where the detector samples",
    "missed": "objects that no detection is near",
    "false positive": "all false detections together",
    "false negative": "all objects not found, missed or near a false detection",
}


def summary(evaluation: Evaluation) -> str:
    """The metrics, and the AP50 that each kind of error costs: two lines and one."""
    costs = ", ".join(
        f"{kind} {_percent(evaluation.errors[kind].dAP50)}" for kind in KINDS if kind in evaluation.errors
    )
    return f"{metrics_table(evaluation.metrics)}\nAP50 lost to: {costs}"


def report(evaluation: Evaluation) -> str:
    """The metrics, the errors by kind, and the classes, of many the worst and the best."""
    return "\n\n".join([metrics_table(evaluation.metrics), _errors_table(evaluation), _classes_table(evaluation)])


def metrics_table(metrics: dict[str, float | None]) -> str:
    return "\n".join("".join(f"{cell:>7}" for cell in row) for row in (metrics, map(_percent, metrics.values())))


def _errors_table(evaluation: Evaluation) -> str:
    lines = ["errors              count  dAP50 (what AP50 would gain without them)"]
    for kind in (*KINDS, *SPECIAL_KINDS):
        error = evaluation.errors[kind]
        lines.append(f"  {kind:<15}{error.count:>8}{_percent(error.dAP50):>7}   {MEANINGS[kind]}")
    return "\n".join(lines)


def _classes_table(evaluation: Evaluation) -> str:
    known = sorted((each for each in evaluation.classes if each.AP is not None), key=lambda each: each.AP or 0)
    unknown = [each for each in evaluation.classes if each.AP is None]
    lines = ["classes, from the lowest AP", "     AP   AP50  objects  found  costs most             class"]
    if len(known) > 2 * SHOWN_CLASSES:
        left_out = f"    ... {len(known) - 2 * SHOWN_CLASSES} more, all in the JSON"
        lines += [*map(_class_line, known[:SHOWN_CLASSES]), left_out, *map(_class_line, known[-SHOWN_CLASSES:])]
    else:
        lines += map(_class_line, known)
    lines += map(_class_line, unknown[:SHOWN_CLASSES])
    if len(unknown) > SHOWN_CLASSES:
        lines.append(f"    ... {len(unknown) - SHOWN_CLASSES} more without objects")
    return "\n".join(lines)


def _class_line(result: ClassResult) -> str:
    cost, kind = max((result.errors[kind].dAP50 or 0, kind) for kind in KINDS)
    costly = f"{kind} {_percent(cost)}" if cost else "-"
    name = printable(result.name)
    name = name if len(name) <= SHOWN_LETTERS else f"{name[: SHOWN_LETTERS - 3]}..."
    found = result.objects - result.errors["false negative"].count
    return f"{_percent(result.AP):>7}{_percent(result.AP50):>7}{result.objects:>9}{found:>7}  {costly:<21}  {name}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
