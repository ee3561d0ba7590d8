"""All settings of a run, and those of the trainings that it is made of."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from daramgpt.recipe.models import Student, Teacher
from daramgpt.recipe.texts import Corpus, Curriculum
from daramgpt.recipe.training import Budget, Checkpoint, Engine, Evaluation, Loss, Optimizer, Persistence, Schedule
from daramgpt.recipe.values import MOST_LETTERS, Section


class Recipe(Section):
    """A run from corpus to exported student."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=MOST_LETTERS, description="default: the file's name"
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="where metrics are sent besides metrics.jsonl; each has to be installed"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of everything that is drawn")
    corpus: Corpus = Corpus()
    curriculum: Curriculum
    teacher: Teacher | None = None
    student: Student = Student()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    persistence: Persistence = Persistence()
    budget: Budget = Budget()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _has_teacher(self) -> Recipe:
        # Only the parts of a run, which are not read from a file, do without one.
        if self.teacher is None:
            raise ValueError("there is no [teacher]; give teacher.model, or [teacher.train]")
        return self

    @model_validator(mode="after")
    def _has_one_training_for_its_hours(self) -> Recipe:
        has_parts = self.evaluation.baseline or (self.teacher is not None and self.teacher.train is not None)
        if self.schedule.horizon == "hours" and has_parts:
            raise ValueError(
                'schedule.horizon = "hours" needs all hours for one training; '
                "give teacher.model and set evaluation.baseline = false"
            )
        return self

    @model_validator(mode="after")
    def _student_has_the_blocks_of_its_loss(self) -> Recipe:
        for own, _ in self.loss.hidden_blocks or ():
            if own > self.student.n_layer:
                raise ValueError(f"loss.hidden_blocks names block {own} of a student of {self.student.n_layer}")
        return self

    def reads_files(self) -> bool:
        """Whether any corpus is read from the folder; data sets are not."""
        return any(stage.corpus not in self.corpus.datasets for stage in self.curriculum.stages)

    def teacher_part(self) -> Recipe:
        """The run in ``parts/teacher``: the teacher of this recipe, trained by plain cross-entropy."""
        assert self.teacher is not None and self.teacher.train is not None
        train = self.teacher.train
        return self._part(
            "teacher",
            student=Student(n_embd=train.n_embd, n_head=train.n_head, n_layer=train.n_layer),
            curriculum=self.curriculum.model_copy(update={"passes": train.passes}),
            optimizer=self.optimizer.model_copy(update={"learning_rate": train.learning_rate}),
            # What its stages give is asked of the student.
            evaluation=self.evaluation.model_copy(update={"baseline": False, "points": 0}),
        )

    def baseline_part(self) -> Recipe:
        """The run in ``parts/baseline``: this recipe's student, same tokens and schedule, without a teacher."""
        return self._part("baseline", student=self.student.model_copy(update={"init": "random", "init_model": None}))

    def _part(self, name: str, **changes: Any) -> Recipe:
        return self.model_copy(
            update={
                "name": f"{self.name}-{name}",
                "teacher": None,
                "loss": Loss(temperature=1.0, kd_weight=0.0, ce_weight=1.0),
                "evaluation": self.evaluation.model_copy(update={"baseline": False}),
                **changes,
            }
        )
