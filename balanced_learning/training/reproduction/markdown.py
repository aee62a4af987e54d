"""A table as Markdown that is to be read as text, too."""

from typing import Any


def as_markdown(table: dict[str, Any]) -> str:
    """The table that a ``table_N.json`` holds: values, differences to the baselines, and notes."""
    metrics, seeds = table["metrics"], table["seeds"]
    values = [["row", "seeds", *metrics]]
    values += [
        [f"{row['label']} (`{row['name']}`)", _status(row), *(_value(row, metric) for metric in metrics)]
        for row in table["rows"]
    ]
    differences = [["row", "against", "seeds", *metrics]]
    differences += [
        [
            row["label"],
            f"`{row['baseline']}`",
            f"{len(row['difference'][metrics[0]]['seeds'])}",
            *(_difference(row["difference"][metric], bool(row["published"])) for metric in metrics),
        ]
        for row in table["rows"]
        if row["difference"]
    ]
    is_published = any(row["published"] for row in table["rows"])
    number = {"paper": f"Table {table['table']}: ", "modern": f"Table {table['table']} (modern): "}
    measured = f"Published on {table['split']} / measured here" if is_published else f"Measured on {table['split']}"
    parts = [
        f"# {number.get(table['family'], '')}{table['title']}",
        f"{measured}, in percent{_of_seeds(seeds)}",
        _grid(values),
    ]
    if len(differences) > 1:
        what = "published / measured" if is_published else "mean"
        caption = f"Differences to the baseline: {what} [95 % interval of the mean over paired seeds]."
        parts += [caption, _grid(differences)]
    images = table["images"]
    made = f"Data: {table['data']}, {images['train']:,} images to train on, {images['val']:,} to evaluate."
    made += f" Device: {table['device'] or '-'}. Commit: {table['commit'] or '-'}."
    parts += ["\n".join(f"- {note}" for note in [*table["notes"], made])]
    return "\n\n".join(parts) + "\n"


def _of_seeds(seeds: list[int]) -> str:
    if len(seeds) == 1:
        return f", with seed {seeds[0]}."
    return f": mean +- sample standard deviation of seeds {', '.join(map(str, seeds))}."


def _status(row: dict[str, Any]) -> str:
    """How many seeds are done, and what is not well."""
    states = [run["status"] for run in row["runs"].values()]
    counts = [(states.count(state), state) for state in ("failed", "to do")]
    others = [state if count == len(states) else f"{count} {state}" for count, state in counts if count]
    done = states.count("finished")
    return ", ".join([*([f"{done}"] if done else []), *others])


def _value(row: dict[str, Any], metric: str) -> str:
    published = f"{_number(row['published'].get(metric))} / " if row["published"] else ""
    std = row["std"][metric]
    return f"{published}{_number(row['mean'][metric])}" + ("" if std is None else f" +- {std:.1f}")


def _difference(difference: dict[str, Any], is_published: bool) -> str:
    published = f"{_number(difference['published'], '+')} / " if is_published else ""
    text = f"{published}{_number(difference['mean'], '+')}"
    interval = difference["interval"]
    return f"{text} [{interval[0]:+.1f}, {interval[1]:+.1f}]" if interval else text


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.1f}"


def _grid(rows: list[list[str]]) -> str:
    """A table of Markdown whose columns are as wide in the text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
