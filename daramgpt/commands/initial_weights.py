"""The weights that a student begins with, where they are not random: made once, kept beside its checkpoints.

Making them is a session of the ledger, ``initial weights``, whose seconds count like those of training. The session's
own deadline lets it end, as it lets the first step; a signal stops it within seconds, and the next start makes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daramgpt.blocks import block_pairs, blocks_of
from daramgpt.commands.parts import open_shards, teacher_dir
from daramgpt.errors import UserError
from daramgpt.ledger import Ledger
from daramgpt.progress import Console
from daramgpt.recipe import Recipe, Student
from daramgpt.run_directory import RunDirectory, write_atomically

if TYPE_CHECKING:
    import torch

    from daramgpt.shards import Shards
    from daramgpt.teacher import Teacher
    from daramgpt.train import StopRequest

SESSION = "initial weights"
# Held-out tokens a stage on which a student is measured before any training.
MEASURED_TOKENS = 8192
# Between the lines by which the ledger knows how long it lasted, if it is killed.
BEAT_SECONDS = 60.0
_MADE_FROM, _SHA256 = "made_from", "sha256"


class _StoppedError(Exception):
    """A signal asked to stop."""


def settled(label: str, part: Recipe, run: RunDirectory, console: Console) -> Recipe:
    """With what ``student.init = "auto"`` stands for beside this teacher.

    Args:
        label: of the training, for people.
        part: the training whose student it is.
        run: the whole run, for the teacher.
        console: for a line where random weights stand for it.

    Raises:
        UserError: the teacher's configuration cannot be read.
    """
    if part.student.init != "auto":
        return part
    from daramgpt import initialisation

    config = initialisation.read_config(teacher_dir(part, run), "teacher.model")
    student, fault = initialisation.settled(part.student, config)
    if fault:
        console(f"{label}: begins with random weights ({fault})")
    return part.model_copy(update={"student": student})


def ensure(
    label: str,
    part: Recipe,
    part_run: RunDirectory,
    run: RunDirectory,
    machine: str,
    stop: StopRequest,
    console: Console,
) -> str:
    """Make the initial weights where they are not there yet, on the first rank.

    They are not there afterwards where `stop` asked for that; `stand` says so.

    Args:
        label: of the training, for people and the ledger.
        part, part_run: the training whose student it is; its ``student.init`` is neither random nor auto.
        run: the whole run, for shards, teacher and ledger.
        machine: name for the ledger.
        stop: when to stop before the end; its deadline is not looked at.
        console: for lines.

    Returns:
        What they are made from.

    Raises:
        UserError: they cannot be made from this teacher, or from this model.
    """
    import torch

    from daramgpt import initialisation, teacher

    # Where the model lies says nothing about it.
    facts = [part.student.model_dump(exclude={"init_model"}), part.seed]
    facts += [teacher.fingerprint(teacher_dir(part, run)), open_shards(run).sha256]
    if part.loss.hidden_weight:
        facts.append(["hidden states", part.loss.hidden_blocks])
    if part.student.init == "layers":
        try:
            facts.append(teacher.fingerprint(initialisation.find(part.student)))
        except UserError as error:
            raise initialisation.of_init_model(error) from None
    made_from, path = json.dumps(facts, sort_keys=True), part_run.initial_weights
    if os.environ.get("RANK", "0") == "0" and not stand(path, made_from):
        if path.exists():
            console(f"{label}: {path} is damaged, or of other settings; it is made again")
        session = _Session(run, machine, stop)
        reason = "failed"
        try:
            device, fault = _device(), ""
            try:
                _make(label, part, part_run, run, made_from, session, console, device)
            except RuntimeError as error:
                # Its memory, most likely; or its libraries, which factorise otherwise than those of a CPU.
                if device.type == "cpu":
                    raise
                fault = str(error).splitlines()[0]
            # Behind the handler, which keeps all that lay on the GPU.
            if fault:
                torch.cuda.empty_cache()
                console(
                    f"{label}: making {part.student.init} weights failed on the GPU ({fault}); they are made on the "
                    "CPU, which takes longer"
                )
                _make(label, part, part_run, run, made_from, session, console, torch.device("cpu"))
            reason = "done"
        except _StoppedError:
            reason = "interrupted"
        finally:
            session.end(reason)
        if torch.cuda.is_available():
            # The training is to have all of the GPU.
            torch.cuda.empty_cache()
    return made_from


def digest(path: Path) -> str:
    """sha256 of a file; empty where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def stand(path: Path, made_from: str) -> bool:
    """Whether a file holds all the weights, undamaged, that `ensure` makes from this."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if facts.get(_MADE_FROM) != made_from:
                return False
            return facts.get(_SHA256) == _sha256({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def _sha256(weights: dict[str, torch.Tensor]) -> str:
    """Of names, shapes and values."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(value.contiguous().numpy().data)
    return found.hexdigest()


class _Session:
    """What the ledger is told, and what may stop it.

    Args:
        run: of the ledger.
        machine, stop: as of `ensure`.
    """

    def __init__(self, run: RunDirectory, machine: str, stop: StopRequest) -> None:
        self._ledger, self._stop = Ledger(run.ledger), stop
        self._began = self._beat_at = time.monotonic()
        self._ledger.start(SESSION, machine, 0, 0)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def tick(self) -> None:
        """To be called every few seconds.

        Raises:
            _StoppedError: a signal came.
        """
        if self._stop.reason(0.0) == "interrupted":
            raise _StoppedError
        if time.monotonic() - self._beat_at >= BEAT_SECONDS:
            self._beat_at = time.monotonic()
            self._ledger.beat(0, 0, self.seconds)

    def note(self, **facts: Any) -> None:
        """Beside the session."""
        self._ledger.note(**facts)

    def end(self, reason: str) -> None:
        self._ledger.end(0, 0, self.seconds, reason)


def _make(
    label: str,
    part: Recipe,
    part_run: RunDirectory,
    run: RunDirectory,
    made_from: str,
    session: _Session,
    console: Console,
    device: torch.device,
) -> None:
    from safetensors.torch import save

    from daramgpt import student

    shards, init = open_shards(run), part.student.init
    config, begin = _source(part, run, shards, session.tick, console, device)
    model: Any = student.build(part.student, config.vocab_size, shards.context_tokens, shards.eos_token_id, part.seed)
    model.to(device).eval()
    at_random = _bits_per_byte(model, shards, session.tick)
    trained_along = begin(model)
    if not all(bool(value.isfinite().all()) for value in (*model.parameters(), *trained_along.values())):
        raise UserError(f'student.init = "{init}" gives values that are not finite', 'set student.init = "random"')
    bits_per_byte = _bits_per_byte(model, shards, session.tick)
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    weights |= trained_along
    write_atomically(part_run.initial_weights, save(weights, {_MADE_FROM: made_from, _SHA256: _sha256(weights)}))
    if at_random is not None and bits_per_byte is not None:
        console(
            f"{label}: {bits_per_byte:.3f} bits per byte on held-out text before any training (random weights "
            f"{at_random:.3f}), in {session.seconds:,.0f} s"
        )
    session.note(
        what=f"{label}: begins {_said(part.student)}",
        seconds=round(session.seconds, 1),
        bits_per_byte=bits_per_byte,
        random_bits_per_byte=at_random,
    )


def _source(
    part: Recipe,
    run: RunDirectory,
    shards: Shards,
    tick: Callable[[], None],
    console: Console,
    device: torch.device,
) -> tuple[Any, Callable[[Any], dict[str, torch.Tensor]]]:
    """The teacher's configuration, and what gives a student its weights and returns those that are trained along."""
    from daramgpt import initialisation, teacher

    folder, init = teacher_dir(part, run), part.student.init
    config = initialisation.read_config(folder, "teacher.model")

    def say(line: str) -> None:
        console(f"  {line}")

    def load_teacher() -> Teacher:
        loaded = teacher.load(folder, "fp32", device=device, cache_dir=run.teacher_weights)
        tick()
        return loaded

    def fit_projections(frozen: Teacher, student: Any, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        pairs = block_pairs(part.loss.hidden_blocks, part.student.n_layer, len(blocks_of(frozen.model)))
        return initialisation.fit_projections(frozen, student, rows, pairs, tick)

    if init == "layers":
        other = initialisation.find(part.student)
        found = initialisation.read_config(other, "student.init_model")
        initialisation.check_layers(found, part.student, config.vocab_size, shards.context_tokens)
        initialisation.check_tokenizer(other, shards.tokenizer_dir)
        console(f"student: taking {_said(part.student)}")
        try:
            model: Any = teacher.load(other, "fp32", device=device, cache_dir=run.teacher_weights).model
        except UserError as error:
            raise initialisation.of_init_model(error) from None
        tick()

        def take(student: Any) -> dict[str, torch.Tensor]:
            numbers = initialisation.take_layers(model, student)
            say(f"blocks {', '.join(str(number + 1) for number in numbers)} of {len(model.transformer.h)}")
            if not part.loss.hidden_weight:
                return {}
            rows = initialisation.calibration_rows(shards, part.student.calibration_tokens, part.seed)
            return fit_projections(load_teacher(), student, rows.to(device))

        return config, take
    initialisation.check(config, part.student)
    rows = initialisation.calibration_rows(shards, part.student.calibration_tokens, part.seed)
    console(f"student: to begin {_said(part.student)}, by {rows.numel():,} tokens of the curriculum")
    frozen = load_teacher()
    make = initialisation.project if init == "projected" else initialisation.prune

    def fit(student: Any) -> dict[str, torch.Tensor]:
        given: Any = frozen.model
        make(given, student, rows.to(device), say, tick)
        return fit_projections(frozen, student, rows.to(device)) if part.loss.hidden_weight else {}

    return config, fit


def _said(student: Student) -> str:
    return f"with blocks of {student.init_model}" if student.init == "layers" else f"{student.init} from the teacher"


def _device() -> torch.device:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _bits_per_byte(model: Any, shards: Shards, tick: Callable[[], None]) -> float | None:
    """On some held-out text of every stage; None where there is none."""
    from daramgpt.evaluation.held_out import CausalModel, measure

    class Ticking(CausalModel):
        def hidden_states(self, *arguments: Any) -> torch.Tensor:
            tick()
            return super().hidden_states(*arguments)

    stages = [stage.name for stage in shards.stages]
    return measure(Ticking(model), shards, stages, MEASURED_TOKENS).bits_per_byte["all"]
