"""What ``tasks.json`` holds as plain text."""

from __future__ import annotations

from typing import Any

from daramgpt.tasks import quoted
from daramgpt.tasks.data import TASKS
from daramgpt.text_table import fitted, ruled, terminal_columns

METRICS = {"accuracy": "acc", "macro_f1": "F1"}
LEGEND = (
    "test scores in %, mean ± standard deviation over the seeds; F1 is macro-F1",
    "best on test: at the epoch with the best test score, as in the article",
    "by validation: at the epoch with the best validation score, which needs no test rows to choose",
)


def format_tasks(results: dict[str, Any]) -> str:
    """Tables of the fine-tuned and of the zero-shot scores, quoted figures beside them, ready to print.

    Args:
        results: content of ``tasks.json``.
    """
    parts = []
    if results["summary"]:
        cells = finetuned_cells(results["summary"])
        parts += [_table(cells, 2), *LEGEND, sources(quoted.FINETUNED), "", _speed(results)]
    if results["zero_shot"]:
        parts += [""] * bool(parts) + [
            _table(zero_shot_cells(results["zero_shot"])),
            sources(quoted.ZERO_SHOT),
        ]
    model = results["model"]
    size = f"{model['parameters'] / 1e6:,.1f} M parameters, {model['bytes'] / 1e6:,.1f} MB"
    return "\n".join([*parts, "", f"{model['name']}: {size}, step {model['step']:,}"])


def finetuned_cells(summary: list[dict[str, Any]]) -> list[list[str]]:
    """Header and two lines a task, with figures of others beside them.

    Args:
        summary: of ``tasks.json``.
    """
    cells = [["fine-tuned", "metric", "best on test", "by validation", *quoted.FINETUNED]]
    for line in summary:
        metric = TASKS[line["task"]].metric
        # What others quote first, and the other metric below it.
        for name in (metric, *(other for other in METRICS if other != metric)):
            figures = [
                f"{column[line['task']]:.2f}" if name == metric and line["task"] in column else ""
                for column in quoted.FINETUNED.values()
            ]
            label = line["task"] if name == metric else ""
            scores = [_mean_and_std(line[way][name]) for way in ("best_test", "chosen_on_validation")]
            cells.append([label, METRICS[name], *scores, *figures])
    return cells


def _speed(results: dict[str, Any]) -> str:
    cells = [["task", "seeds", "epochs", "train rows", "test rows", "rows/s training", "rows/s test", "s a seed"]]
    for line in results["summary"]:
        rows = [row for row in results["finetuning"] if row["task"] == line["task"]]
        cells.append(
            [
                line["task"],
                str(len(rows)),
                str(len(rows[0]["epochs"])),
                f"{rows[0]['rows']['train']:,}",
                f"{rows[0]['rows']['test']:,}",
                *(
                    f"{sum(row[key] for row in rows) / len(rows):,.0f}"
                    for key in ("training_rows_per_second", "test_rows_per_second", "seconds")
                ),
            ]
        )
    return _table(cells)


def zero_shot_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Header and a line a task, with figures of others beside them.

    Args:
        rows: ``zero_shot`` of ``tasks.json``.
    """
    cells = [["zero-shot", "rows", "acc", "F1", "acc by length", *quoted.ZERO_SHOT]]
    for row in rows:
        scores = [row["scores"].get(key) for key in ("accuracy", "macro_f1", "accuracy_normalised")]
        figures = [column.get(row["task"]) for column in quoted.ZERO_SHOT.values()]
        cells.append(
            [
                row["task"],
                f"{row['rows']:,}",
                *("" if score is None else f"{100 * score:.2f}" for score in scores),
                *("" if figure is None else f"{figure:.2f}" for figure in figures),
            ]
        )
    return cells


def _mean_and_std(found: dict[str, float | None]) -> str:
    mean, std = found["mean"], found["std"]
    assert mean is not None
    return f"{100 * mean:.2f}" if std is None else f"{100 * mean:.2f} ± {100 * std:.2f}"


def sources(columns: dict[str, Any]) -> str:
    """Whom the figures of columns are of."""
    return "\n".join(["quoted, not measured here:", *(f"  {name} = {quoted.SOURCES[name]}" for name in columns)])


def _table(cells: list[list[str]], num_left: int = 1) -> str:
    """Text of the table, or of the several that the terminal has room for."""
    tables = fitted(cells, terminal_columns())
    return "\n".join("\n".join(ruled(table, num_left if table is cells else 1)) for table in tables)
