"""The command line: ``bilevel tune``.

Here are options, the progress bar and the sentences in which errors end; the work is done in :mod:`bilevel.hyperopt`, which is imported
when a command runs, so that ``bilevel --help`` need not wait for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import bilevel

if TYPE_CHECKING:
    from rich.console import Console

    from bilevel.hyperopt.data import Task
    from bilevel.hyperopt.tune import OuterStep, Outcome

__all__ = ["main"]

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of SIGINT, as shells have it."""

MISUSE = 2
"""Exit code for input that cannot be used."""

_MISSING = 'the command line needs packages that are not installed ({}); pip install "bilevel[cli]"'


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Parameters
    ----------
    arguments
        Instead of those of the process.

    Raises
    ------
    SystemExit
        Always: with 0; with 2 and one sentence on standard error for input that cannot be used; with 130 after Ctrl-C.
    """
    try:
        sys.exit(_run(arguments))
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", INTERRUPTED)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "sklearn", "matplotlib"):
            raise
        _fail(_MISSING.format(error.name), 1)
    except bilevel.SolveError as error:
        _fail(str(error), 1)
    except bilevel.BilevelError as error:
        _fail(str(error), MISUSE)


def _run(arguments: Sequence[str] | None) -> int:
    import typer

    command = typer.main.get_command(_app())
    # typer would answer misuse with a box of several lines, and Ctrl-C without a word.
    try:
        code = command.main(
            args=None if arguments is None else list(arguments), prog_name="bilevel", standalone_mode=False
        )
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), MISUSE)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> NoReturn:
    sentence = " ".join(message.split())
    print(f"bilevel: {sentence}", file=sys.stderr)
    sys.exit(code)


def _app() -> Any:
    """Return the application; a further command is one more function registered here."""
    import typer

    app = typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            print(f"bilevel {bilevel.__version__}")
            raise typer.Exit

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
        ] = False,
    ) -> None:
        """Bilevel optimisation: tune hyperparameters by the gradient of a validation loss."""

    app.command("tune")(_tune)
    return app
