"""The command line: runs on real data, and every misuse ends in one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bilevel
from bilevel.cli.main import main


class Ended:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def assert_one_sentence(self, code: int) -> None:
        assert self.code == code
        assert self.err.startswith("bilevel: ")
        assert self.err.count("\n") == 1
        assert "Traceback" not in self.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "data.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("name", ["breast_cancer", "diabetes", "wine"])
def test_bundled_data(run: Any, tmp_path: Path, name: str) -> None:
    ended = run("tune", name, "--penalty", "feature", "--folds", 2, "--steps", 2, "--quiet", "--output", tmp_path)
    assert (ended.code, ended.err) == (0, "")
    for words in ("untuned", "best of grid", "tuned, shared", "tuned, per feature", "Written: "):
        assert words in ended.out
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json",
        "cv_curve.png",
        "losses.png",
        "strengths.png",
    }
    assert json.loads((tmp_path / "results.json").read_text())["data"]["name"] == name


def test_digits_with_few_points(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bilevel.hyperopt import tune

    # The largest bundled set, made light: the grid of 33 and the probes alone take most of a minute.
    original = tune.grid_search
    monkeypatch.setattr(tune, "GRID_POINTS", 2)
    monkeypatch.setattr(tune, "grid_search", lambda *args, **options: original(*args, points=2, **options))
    monkeypatch.setattr(tune, "PROBES", 2)
    monkeypatch.setattr(tune, "LOG_RANGE", (-3.0, 0.0))
    ended = run("tune", "digits", "--folds", 2, "--steps", 1, "--test-size", 0.7, "--quiet")
    assert (ended.code, ended.err) == (0, "")
    assert "tuned, shared" in ended.out


def table_of_numbers(rows: int = 60) -> str:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(rows, 3))
    targets = inputs @ [1.0, -1.0, 0.0] + rng.normal(size=rows)
    lines = [",".join(f"{number:.6f}" for number in [*x, y]) for x, y in zip(inputs, targets, strict=True)]
    return "a,b,c,y\n" + "\n".join(lines) + "\n"


def test_a_csv_file(run: Any, write: Any) -> None:
    ended = run("tune", write(table_of_numbers()), "--target", "y", "--folds", 3)
    assert ended.code == 0
    assert "data: shared penalty, MSE" in ended.out
    assert "shared strength" in ended.err  # the progress bar


def test_quiet_shows_no_progress_bar(run: Any, write: Any) -> None:
    ended = run("tune", write(table_of_numbers()), "--target", "y", "-q")
    assert (ended.code, ended.err) == (0, "")


def test_a_csv_file_with_classes_in_words(run: Any, write: Any) -> None:
    lines = table_of_numbers().replace("y\n", "y\n", 1).splitlines()
    words = [",".join([*line.split(",")[:3], "low" if "-" in line.split(",")[3] else "high"]) for line in lines[1:]]
    ended = run("tune", write("\n".join([lines[0], *words])), "--target", "y", "--folds", 3, "-q")
    assert ended.code == 0
    assert "log loss" in ended.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "no column 'y'"),
        ("a,a,y\n1,2,3\n", "occurs more than once"),
        ("a,y\nred,1\nblue,2\n", "'red', which is not a number"),
        ("a,y\nnan,1\n3,2\n", "fill in missing values"),
        ("a,y\n1,1\n3,\n", "is empty"),
        ("a,y\n1,7\n2,7\n3,7\n", "one value only"),
        ("a,y\n1,yes\n2,yes\n", "one value only"),
        ("a,y\n1,0.5\n2,0.6\n", "2 rows, too few for 5 folds"),
        ("a,y\n" + "1,no\n2,yes\n" * 3, "has 3 rows, too few for 5 folds"),
        ("a,b,y\n" + "".join(f"0.1,7,{y}\n" for y in range(40)), "no feature has more than one value"),
        ("a,b,y\n" + "0.1,7,no\n0.1,7,yes\n" * 20, "no feature has more than one value"),
    ],
)
def test_files_that_cannot_be_used(run: Any, write: Any, text: str, message: str) -> None:
    ended = run("tune", write(text), "--target", "y")
    ended.assert_one_sentence(2)
    assert message in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "iris"], "no data set and no file called 'iris'"),
        (["tune", "none.csv", "--target", "y"], "there is no file none.csv"),
        (["tune", os.curdir, "--target", "y"], "is a directory"),
        (["tune", "wine", "--target", "y"], "leave --target out"),
        (["tune", "wine", "--steps", "-3"], "steps to be at least 1, got -3"),
        (["tune", "wine", "--patience", "0"], "patience to be at least 1"),
        (["tune", "wine", "--learning-rate", "-1"], "learning rate to be positive"),
        (["tune", "wine", "--folds", "1"], "at least 2 folds"),
        (["tune", "wine", "--folds", "179"], "too few for 179 folds"),
        (["tune", "wine", "--folds", "50"], "has 48 rows, too few for 50 folds"),
        (["tune", "wine", "--test-size", "1.5"], "test size between 0 and 1"),
        (["tune", "wine", "--test-size", "nan"], "test size between 0 and 1"),
        (["tune", "wine", "--watch-size", "0"], "watch size between 0 and 1"),
        (["tune", "wine", "--seed", "-1"], "seed from 0"),
        (["tune", "wine", "--task", "binary"], "3 different values, and a binary task needs two"),
        (["tune", "breast_cancer", "--task", "multiclass"], "two different values, and a multiclass task needs more"),
        (["tune", "wine", "--folds", "many"], "'--folds'"),
        (["tune", "wine", "--penalty", "lasso"], "lasso"),
        (["tune", "wine", "--task", "ranking"], "ranking"),
        (["tune", "wine", "--colour", "red"], "--colour"),
        (["tune", "wine", "more"], "more"),
        (["tune"], "DATA"),
        (["imagine"], "imagine"),
    ],
)
def test_arguments_that_cannot_be_used(run: Any, arguments: list[str], message: str) -> None:
    ended = run(*arguments)
    ended.assert_one_sentence(2)
    assert message in ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["clean", "a\0b.csv"],
        ["tune", "wine", "--output", "a\0b"],
        ["imaml", "--data", "a\0b"],
        ["imaml", "--resume", "a\0b"],
    ],
)
def test_a_nul_character_in_an_argument_ends_in_a_sentence(run: Any, arguments: list[str]) -> None:
    ended = run(*arguments)
    ended.assert_one_sentence(2)
    assert "NUL character" in ended.err


def test_output_that_cannot_be_written_is_noticed_before_the_work(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    began = time.perf_counter()
    ended = run("tune", "digits", "--output", file / "below")
    ended.assert_one_sentence(2)
    assert "cannot be written to" in ended.err
    assert time.perf_counter() - began < 10


def test_a_failed_solve_ends_in_a_sentence(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise bilevel.SolveError("the inner solve\nran out of iterations", None)  # type: ignore[arg-type]

    monkeypatch.setattr(bilevel.HyperparameterOptimization, "hypergradient", fail)
    ended = run("tune", "diabetes", "-q")
    ended.assert_one_sentence(1)
    assert "ran out of iterations" in ended.err


def test_an_interrupt_ends_in_a_sentence(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(bilevel.HyperparameterOptimization, "hypergradient", interrupt)
    ended = run("tune", "diabetes", "-q")
    ended.assert_one_sentence(130)
    assert "interrupted" in ended.err


@pytest.mark.parametrize("package", ["typer", "rich", "sklearn", "matplotlib"])
def test_a_missing_package_is_named_with_the_remedy(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str
) -> None:
    for name in list(sys.modules):
        if name.startswith(("bilevel.hyperopt.", package)) or name == package:
            monkeypatch.delitem(sys.modules, name)

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            if name == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    ended = run("tune", "diabetes", "-q", "--steps", 1, "--output", tmp_path)
    ended.assert_one_sentence(1)
    assert f"needs {package}" in ended.err
    assert 'pip install ".[cli]"' in ended.err


def test_faults_of_our_own_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: Any, **options: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(bilevel.HyperparameterOptimization, "hypergradient", fault)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["tune", "diabetes", "-q"])


def test_version(run: Any) -> None:
    ended = run("--version")
    assert (ended.code, ended.out) == (0, f"bilevel {bilevel.__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(run: Any, arguments: list[str]) -> None:
    ended = run(*arguments)
    assert ended.code == 0
    assert "tune" in ended.out
    assert "clean" in ended.out


def test_help_of_clean_lists_the_options(run: Any) -> None:
    ended = run("clean", "--help")
    assert ended.code == 0
    for option in ("--target", "--model", "--corrupt", "--seeds", "--trusted", "--output"):
        assert option in ended.out


def test_help_of_tune_lists_the_options(run: Any) -> None:
    ended = run("tune", "--help")
    assert ended.code == 0
    for option in ("--target", "--penalty", "--folds", "--output", "--seed"):
        assert option in ended.out


def in_a_process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the program as a shell does; standard output goes where ``options`` say."""
    command = [sys.executable, "-c", "from bilevel.cli.main import main; main()", "tune", *map(str, arguments)]
    return subprocess.run(
        command, **{"stdout": subprocess.PIPE, **options}, stderr=subprocess.PIPE, text=True, timeout=120, check=False
    )


def test_results_are_written_though_nobody_reads_the_table(write: Any, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = in_a_process(write(table_of_numbers()), "--target", "y", "-q", "--output", tmp_path / "out", stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert (tmp_path / "out" / "results.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_standard_output_that_is_full_ends_in_a_sentence(write: Any) -> None:
    with open("/dev/full", "w") as full:
        ended = in_a_process(write(table_of_numbers()), "--target", "y", "-q", stdout=full)
    Ended(ended.returncode, "", ended.stderr).assert_one_sentence(2)
    assert "standard output cannot be written to (No space left on device)" in ended.stderr


def test_an_encoding_without_the_signs_is_no_error(write: Any) -> None:
    ended = in_a_process(
        write(table_of_numbers()), "--target", "y", "-q", env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "test R?" in ended.stdout


def test_a_real_interrupt_of_a_real_process(tmp_path: Path) -> None:
    command = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from bilevel.cli.main import main; print('ready', flush=True); main(['tune', 'digits', '-q'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(3)  # inside the work: digits takes much longer
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "bilevel: interrupted; results were not written\n"
