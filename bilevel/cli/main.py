"""The command line, ``bilevel``: its commands, and the sentences in which errors end.

A command lives beside the work that it does (``tune`` in :mod:`bilevel.hyperopt.command`) and is registered
here, one line each. What it needs is imported when it runs, so that help comes fast.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import bilevel
from bilevel.cli.allocator import keep_freed_memory

__all__ = ["main"]

MISUSE = 2
"""Exit code for input that cannot be used."""

FAILURE = 1
"""Exit code where the input was sound: a solve failed, or a package is missing."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of SIGINT, as shells have it."""

EXTRA = ("typer", "rich", "sklearn", "matplotlib", "PIL", "pooch")
"""Packages that the extra ``cli`` installs."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Parameters
    ----------
    arguments
        Instead of those of the process.

    Raises
    ------
    SystemExit
        Always: with 0; with 2 and one sentence on standard error for input that cannot be used; with 1 for a
        failed solve or a missing package; with 130 after Ctrl-C.
    """
    if arguments is None:  # the process is ours
        keep_freed_memory()
        _write_whatever_can_be()
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if any("\0" in argument for argument in given):
        _fail("an argument holds a NUL character, which no file name can; leave it out", MISUSE)
    try:
        sys.exit(_run(given))
    except KeyboardInterrupt:
        _fail("interrupted; results were not written", INTERRUPTED)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        _fail(
            f'the command line needs {error.name}, which is not installed; run pip install ".[cli]" in a clone of bilevel',
            FAILURE,
        )
    except bilevel.SolveError as error:
        _fail(str(error), FAILURE)
    except bilevel.BilevelError as error:
        _fail(str(error), MISUSE)
    except (MemoryError, RuntimeError) as error:
        # A GPU's error has a class of its own, the CPU's has not.
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        _fail("there is not enough memory for this; take fewer tasks, images or rows at a time", FAILURE)


def _write_whatever_can_be() -> None:
    """Let characters that standard output's encoding lacks, such as that in R², be question marks and no errors."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # there may be none
        sys.stdout.reconfigure(errors="replace")


def _run(arguments: list[str]) -> int:
    import typer

    command = typer.main.get_command(_app())
    try:
        # Left alone, typer would answer misuse with a box of several lines, and Ctrl-C without a word.
        code = command.main(args=arguments, prog_name="bilevel", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # The class of its usage errors is private to typer; they alone can format themselves.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        _fail(message(), MISUSE)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _app() -> Any:
    import typer

    from bilevel.cleaning.command import clean
    from bilevel.hyperopt.command import tune
    from bilevel.meta.command import imaml

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    def show_version(asked: bool) -> None:
        if asked:
            print(f"bilevel {bilevel.__version__}")
            raise typer.Exit

    def root(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Print the version and exit."
        ),
    ) -> None:
        """Bilevel optimisation from the command line."""

    app.callback()(root)
    app.command("clean")(clean)
    app.command("tune")(tune)
    app.add_typer(imaml, name="imaml")
    return app


def _fail(message: str, code: int) -> NoReturn:
    print(f"bilevel: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
