"""KoBEST without fine-tuning, by lm-eval (the extra ``eval``) on local files.

The task files in ``lm_eval/`` ask what lm-eval's own kobest tasks ask, so that figures compare; those name a data set
on the hub, these read the folder that is given. Each choice gets the log-likelihood of its text after the prompt.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daramgpt.errors import UserError
from daramgpt.pace import Pace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASK_FILES = Path(__file__).with_name("lm_eval")
PREFIX = "local_kobest_"
# Logits of so many rows of 512 tokens and 51,200 pieces are 0.8 GB.
BATCH_ROWS = 8
NAMES = {"acc,none": "accuracy", "f1,none": "macro_f1", "acc_norm,none": "accuracy_normalised"}


def require_lm_eval() -> None:
    """See that lm-eval can be imported.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluation.zero_shot needs lm-eval, which is not installed",
            "pip install 'daramgpt[eval]', or leave evaluation.zero_shot false",
        )


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    name: str,
    num_rows: int,
    num_choices: int,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Scores of one KoBEST task's test rows.

    Args:
        model: on the device that it is to run on.
        folder: of task files.
        name: of the task.
        num_rows, num_choices: how many requests there are, for the line that says how far it is.

    Returns:
        ``accuracy``, ``macro_f1`` and, for HellaSwag, ``accuracy_normalised`` by the length of the choices.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class PacedModel(HFLM):
        pace: Pace | None = None

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            # From here on: what comes before the first batch is no measure of the others.
            self.pace = self.pace or Pace(say, f"{name}, zero-shot", num_rows * num_choices)
            found = super()._model_call(inps, *args, **kwargs)
            self.pace.advance(len(inps))
            return found

    # Its progress bars would fill a log; ours is one line now and then.
    with contextlib.redirect_stderr(io.StringIO()):
        manager = TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata={"folder": str(folder)})
        # Not simple_evaluate, which asks git for the revision of whatever folder it is called in.
        found = evaluate(
            lm=PacedModel(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_ROWS),
            task_dict=manager.load([f"{PREFIX}{name}"])["tasks"],
            bootstrap_iters=0,
            log_samples=False,
        )
    results = found["results"][f"{PREFIX}{name}"]
    return {ours: float(results[theirs]) for theirs, ours in NAMES.items() if theirs in results}
