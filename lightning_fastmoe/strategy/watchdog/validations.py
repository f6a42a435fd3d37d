"""A validation that a training leaves is what the run that resumes begins with, all of it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from lightning_fastmoe.checkpoint.random_state import random_state, set_random_state

_RUN = "run"
"""The method of Lightning's loop that validates."""


class Validations:
    """Those of one training; made when it begins.

    Lightning counts a validation's batches in the checkpoint. A run that resumes goes on with the
    rest, whose mean is another, if a batch was being validated; and else takes a validation that
    was due as done.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._training = trainer.fit_loop.epoch_loop
        self._loop = self._training.val_loop
        self._random: dict[str, Any] | None = None
        self._loop.__dict__[_RUN] = self._run
        if self._loop.restarted_mid_evaluation:  # for another reason than :meth:`leave`, perhaps
            progress: Any = self._loop.batch_progress
            self._forget(progress)
            trainer._last_val_time = float("-inf")  # type: ignore[attr-defined]  # due by any clock

    def detach(self) -> None:
        """Gives Lightning's loop its own method back."""
        self._loop.__dict__.pop(_RUN, None)

    @property
    def can_be_left(self) -> bool:
        """Whether a run that resumes can begin with the validation that is due or under way.

        It can't where nothing is trained afterwards: Lightning doesn't begin such a run, or begins
        with the next epoch, or misses what training has logged in this one.
        """
        return not self._training.done

    def leave(self) -> None:
        """To be called before the run ends between two batches of a validation, or before it."""
        progress: Any = self._loop.batch_progress
        self._forget(progress)
        # As if the first batch were being validated.
        for counts in (progress.total, progress.current):
            counts.processed = counts.completed
            counts.ready = counts.started = counts.completed + 1
        if self._random is not None:
            # Beginning it has drawn numbers, and will again.
            set_random_state(self._random, self._trainer.strategy.root_device)
        for callback in self._trainer.checkpoint_callbacks:
            if getattr(callback, "save_on_exception", False):
                # What it has saved in this step doesn't know of this validation.
                callback._last_global_step_saved = -1  # type: ignore[attr-defined]

    def _run(self) -> Any:
        self._random = random_state(self._trainer.strategy.root_device)
        # Lightning goes on counting from where a validation was left.
        self._loop.batch_progress.total.reset_on_restart()
        return type(self._loop).run(self._loop)

    @staticmethod
    def _forget(progress: Any) -> None:
        """Takes the batches of this validation back."""
        progress.total.completed -= progress.current.completed
        progress.current.reset()
