"""The progress bar of a command whose run has stages."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bilevel.cli.output import console

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["StageBar"]


class StageBar:
    """A bar on standard error: the steps of each stage, and a text with the numbers of the last step."""

    def __init__(self, *, shown: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console(stderr=True),
            disable=not shown,
        )
        self._current: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._current is not None:
            if kind is None:
                self._finish()
            self._progress.stop()

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of at most ``total`` steps."""
        # The bar starts with the first stage, so that a refused argument leaves one line and no empty bar.
        self._progress.start()
        self._finish()
        self._current = self._progress.add_task(name, total=total, numbers="")

    def advance(self, numbers: str) -> None:
        """Count a step of the stage as done, and show its ``numbers``."""
        assert self._current is not None
        self._progress.update(self._current, advance=1, numbers=numbers)

    def _finish(self) -> None:
        # A stage that stopped before its limit is complete: its bar ends full, at the steps it took.
        if self._current is not None:
            done = self._progress.tasks[self._current].completed
            self._progress.update(self._current, total=done)
