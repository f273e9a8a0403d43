"""``bilevel clean``: data that it reads, parts, comparisons, the table and its remarks, and the files that it writes."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bilevel
from bilevel.cleaning import Noise, comparisons, corrupt
from bilevel.cleaning.clean import Accuracies, Cleaned
from bilevel.cleaning.data import DataError, LabelledData, load, numbered_like
from bilevel.cleaning.experiment import run_cleaning
from bilevel.cleaning.outcome import (
    ALONE,
    CLEANED,
    CONFIDENT,
    GIVEN,
    SMALL_LOSS,
    TRUE,
    Choice,
    CleanRunSettings,
    Outcome,
    Run,
    interval,
)  # fmt: skip
from bilevel.cleaning.report import remarks
from bilevel.cleaning.splits import Sizes, Split, split
from bilevel.cleaning.suspects import suspects, write_cleaned, write_suspects
from bilevel.cli.main import main

QUICK = ("--steps", 3, "--training-steps", 5, "--seeds", 2)


class Ended:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main(["clean", *map(str, arguments)])
        captured = capsys.readouterr()
        return Ended(ended.value.code if isinstance(ended.value.code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def _without_cleanlab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab", None)


def table_of_flowers(rows: int = 90, seed: int = 0) -> str:
    """Three classes around three centres, in words; a column that is constant."""
    rng = np.random.default_rng(seed)
    lines = ["height,width,place,kind"]
    for number in range(rows):
        x = rng.normal(size=2) + [[0, 0], [6, 0], [0, 6]][number % 3]
        lines.append(f"{x[0]:.4f},{x[1]:.4f},7,{('rose', 'tulip', 'lily')[number % 3]}")
    return "\n".join(lines) + "\n"


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    path = tmp_path / "flowers.csv"
    path.write_text(table_of_flowers(), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of dark and bright squares, 12 of each class, one in colour."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("bright", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = (level + rng.integers(-30, 30, size=(9, 11))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- the command ----


def test_digits_end_in_a_table_and_files(run: Any, tmp_path: Path) -> None:
    ended = run("digits", *QUICK, "--model", "linear", "--output", tmp_path, "--quiet")
    assert (ended.code, ended.err) == (0, "")
    for words in (
        GIVEN,
        ALONE,
        CLEANED,
        SMALL_LOSS,
        TRUE,
        "±",
        "400 training rows (138 with wrong labels)",
        'pip install ".[clean]"',
    ):
        assert words in " ".join(ended.out.split()), words
    assert CONFIDENT not in ended.out
    names = {"suspicious.csv", "cleaned.csv", "results.json", "weights.png", "accuracy.png", "flagged.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    document = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in document["rows"]] == [GIVEN, ALONE, CLEANED, SMALL_LOSS, TRUE]
    listed = rows_of(tmp_path / "suspicious.csv")
    assert len(listed) == 400 and [row["rank"] for row in listed] == [str(n) for n in range(1, 401)]
    assert sum(row["given"] != row["true"] for row in listed) == 138
    flagged = [row for row in listed if row["flagged"] == "yes"]
    kept = rows_of(tmp_path / "cleaned.csv")
    assert listed[: len(flagged)] == flagged and len(kept) == 400 + 100 - len(flagged)


def test_progress_is_shown_unless_quiet(run: Any, flowers: Path) -> None:
    ended = run(flowers, "--target", "kind", "--trusted-size", 12, *QUICK, "--no-compare")
    assert ended.code == 0 and "trusted loss" in ended.err and "run 2 of 2" in ended.err
    assert SMALL_LOSS not in ended.out and "cleanlab" not in ended.out


def test_a_csv_file_is_cleaned_row_by_row(run: Any, flowers: Path, tmp_path: Path) -> None:
    """Wrong labels that are in the file are found, though nobody says how many; rows keep their text and their line."""
    lines = flowers.read_text().splitlines()
    wrong = {5: "tulip", 12: "lily", 40: "rose", 61: "tulip"}
    for line, label in wrong.items():
        assert lines[line - 1].split(",")[3] != label
        lines[line - 1] = ",".join([*lines[line - 1].split(",")[:3], label])
    flowers.write_text("\n".join(lines) + "\n", encoding="utf-8")
    trusted = tmp_path / "right.csv"
    trusted.write_text(table_of_flowers(24, seed=1), encoding="utf-8")
    out = tmp_path / "out"
    options = ("--model", "linear", "--steps", 60, "--training-steps", 60, "--test-size", 0, "--no-compare", "-q")
    ended = run(flowers, "--target", "kind", "--trusted", trusted, *options, "--output", out)
    assert ended.code == 0, ended.err
    assert "Without test rows no accuracy is known" in ended.out
    listed = rows_of(out / "suspicious.csv")
    assert {row["row"] for row in listed[:4]} == {f"line {line}" for line in wrong}
    assert all(row["suggested"] != row["given"] and row["flagged"] == "yes" for row in listed[:4])
    assert "true" not in listed[0]
    kept = (out / "cleaned.csv").read_text().splitlines()
    flagged = {int(row["row"].split()[1]) for row in listed if row["flagged"] == "yes"}
    assert kept == [line for number, line in enumerate(lines, 1) if number not in flagged]
    assert not (out / "flagged.png").exists()


def test_a_folder_of_images(run: Any, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--model", "conv", "--image-size", 8, "--trusted-size", 4, "--corrupt", 0.3, *QUICK, "--quiet")
    ended = run(folder, *options, "--output", out)
    assert (ended.code, ended.err) == (0, "")
    data = load(str(folder), image_size=8)
    assert data.inputs.shape == (24, 1, 8, 8) and float(data.inputs.min()) >= 0 and float(data.inputs.max()) <= 1
    assert data.classes == ("bright", "dark") and data.rows[0] == str(Path("bright") / "0.png")
    assert (data.labels.double().mean(), float(data.inputs[data.labels == 0].min()) > 0.5) == (0.5, True)
    assert all("/" in row["file"] for row in rows_of(out / "cleaned.csv"))


def test_one_image_in_colour_gives_all_three_channels(folder: Path) -> None:
    from PIL import Image

    Image.new("RGB", (5, 5), (255, 0, 0)).save(folder / "dark" / "red.png")
    data = load(str(folder), image_size=8)
    assert data.inputs.shape == (25, 3, 8, 8)
    red = data.inputs[data.rows.index(str(Path("dark") / "red.png"))]
    assert torch.equal(red.amax((1, 2)), torch.tensor([1.0, 0.0, 0.0]))


def test_images_of_any_depth_keep_their_grey_levels(folder: Path) -> None:
    """Sixteen bits are not cut off at 255, and 32 bits are refused."""
    from PIL import Image

    levels = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(levels.astype(np.uint16)).save(folder / "dark" / "deep.png")
    data = load(str(folder), image_size=8)
    found = data.inputs[data.rows.index(str(Path("dark") / "deep.png")), 0]
    torch.testing.assert_close(found, torch.from_numpy(levels / 65535).float(), rtol=0, atol=0.5 / 255)
    Image.fromarray((levels / 65535).astype(np.float32)).save(folder / "dark" / "real.tif")
    with pytest.raises(DataError, match="pixels of 32 bits, whose range is not known; save it with 8 or 16 bits"):
        load(str(folder), image_size=8)


def test_damaged_metadata_leave_an_image_as_it_is(folder: Path) -> None:
    from PIL import Image

    file, exif = folder / "dark" / "red.jpg", Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x9003] = 6, "hello", "x"
    Image.new("RGB", (8, 8), "red").save(file, exif=exif)
    content = bytearray(file.read_bytes())
    content[content.index(b"Exif") + 17] = 0  # Pillow reads such a tag, and fails to write it
    file.write_bytes(content)
    data = load(str(folder), image_size=8)
    red = data.inputs[data.rows.index(str(Path("dark") / "red.jpg"))]
    assert red[0].min() > 0.9 > 0.1 > red[1:].max()


def test_a_transparent_image_lies_on_white_and_a_photograph_stands_upright(folder: Path) -> None:
    from PIL import Image

    Image.new("LA", (8, 8), (0, 0)).save(folder / "bright" / "clear.png")  # black, and nothing of it is seen
    lying = np.zeros((8, 8), dtype=np.uint8)
    lying[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 8  # turn it to the left
    Image.fromarray(lying).save(folder / "dark" / "photo.png", exif=exif)
    data = load(str(folder), image_size=8)
    found = {name: data.inputs[data.rows.index(str(Path(name)))] for name in ("bright/clear.png", "dark/photo.png")}
    assert data.inputs.shape[1] == 1 and bool((found["bright/clear.png"] == 1).all())
    assert torch.equal(found["dark/photo.png"][0], torch.from_numpy(lying / 255).float().T)


def test_images_in_folders_within_a_class_are_not_left_out(folder: Path) -> None:
    inner = folder / "dark" / "more"
    inner.mkdir()
    load(str(folder))
    (folder / "dark" / "0.png").rename(inner / "0.png")
    with pytest.raises(
        DataError, match=r"0\.png lies deeper than .*/CLASS/IMAGE\.png; move images into the folder of their class"
    ):
        load(str(folder))


def test_large_numbers_that_differ_little_are_told_apart(tmp_path: Path) -> None:
    """Such as times in seconds, which single precision rounds to minutes."""
    near, far = tmp_path / "near.csv", tmp_path / "far.csv"
    signs = [(-1) ** (k // 2) for k in range(80)]
    for path, shift in ((near, 0), (far, 2**31)):
        path.write_text("x,y\n" + "".join(f"{shift + sign},{sign}\n" for sign in signs), encoding="utf-8")
    settings = CleanRunSettings(steps=2, training_steps=2, seeds=1, trusted_size=8, compare=False)
    one, other = (run_cleaning(load(str(path), target="y"), settings).runs[0] for path in (near, far))
    assert torch.equal(one.cleaned.weights, other.cleaned.weights)


def test_one_number_written_in_two_ways_is_no_two_classes(flowers: Path) -> None:
    text = "x,y\n" + "1,1\n2,0\n" * 9
    flowers.write_text(text.replace("1,1", "1,1.0", 1), encoding="utf-8")
    with pytest.raises(DataError, match=r"target 'y' holds '1\.0' and '1', which are one number; write it in one way"):
        load(str(flowers), target="y")


def test_images_that_need_more_than_all_memory_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"24 images of 1000000 x 1000000 pixels need .* GB; lower --image-size"):
        load(str(folder), image_size=1_000_000)


def test_a_model_of_the_users_own(run: Any, flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_model_of_this_test.py").write_text(
        "import torch\ndef make(shape, classes):\n    return torch.nn.Linear(shape[0], classes)\n"
        "def bad(shape, classes):\n    return torch.nn.Linear(shape[0] + 1, classes)\n"
        "def few(shape, classes):\n    return torch.nn.Linear(shape[0], classes - 1)\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    ended = run(
        flowers, "--target", "kind", "--trusted-size", 12, *QUICK, "-q", "--model", "own_model_of_this_test:make"
    )
    assert ended.code == 0 and "own_model_of_this_test:make model" in ended.out
    for name, words in (
        ("bad", "failed on inputs of shape (2, 3)"),
        ("few", "scores of shape (2, 3), got (2, 2)"),
        ("number", "has no function number"),
        ("nothing", "has no function nothing"),
    ):
        ended = run(
            flowers, "--target", "kind", "--model", f"own_model_of_this_test:{name}", "-q", *QUICK, "--trusted-size", 12
        )
        assert ended.code == 2 and ended.err.count("\n") == 1 and words in ended.err


def test_an_id_column_is_ignored_and_written(run: Any, flowers: Path, tmp_path: Path) -> None:
    """The runs are those without the column, and cleaned data have it."""
    lines = flowers.read_text().splitlines()
    named = tmp_path / "named.csv"
    named.write_text("\n".join([f"plant id,{lines[0]}", *(f"plant {n},{line}" for n, line in enumerate(lines[1:]))]))
    common = ("--target", "kind", "--trusted-size", 12, *QUICK, "--no-compare", "-q", "--output")
    assert run(flowers, *common, tmp_path / "plain").code == 0
    ended = run(named, "--ignore", "plant id", *common, tmp_path / "ignored")
    assert ended.code == 0, ended.err
    plain, ignored = ((tmp_path / name / "suspicious.csv").read_text() for name in ("plain", "ignored"))
    assert ignored == plain
    cleaned = rows_of(tmp_path / "ignored" / "cleaned.csv")
    assert all(row.pop("plant id").startswith("plant ") for row in cleaned)
    assert cleaned == rows_of(tmp_path / "plain" / "cleaned.csv")
    assert "leave it out by --ignore 'plant id'" in run(named, "--target", "kind").err


def test_a_trusted_file_is_encoded_like_the_data(tmp_path: Path) -> None:
    rows = ["size,colour,kind", "1,red,a", ",blue,b", "3,red,a", "4,green,b", "9,blue,a", "2,,b"]
    (tmp_path / "data.csv").write_text("\n".join(rows))
    (tmp_path / "checked.csv").write_text("size,colour,kind\n,green,a\n2,red,b\n")
    data = load(str(tmp_path / "data.csv"), target="kind", encode=True)
    trusted = load(str(tmp_path / "checked.csv"), target="kind", encode=data.encoding or False)
    assert trusted.inputs.tolist() == [[3, 0, 1, 0], [2, 0, 0, 1]]  # the median, and the words, of the data
    assert numbered_like(trusted, data).inputs.shape[1:] == data.inputs.shape[1:]
    assert data.cells[1] == ("", "blue", "b")  # cleaned data are written as they were
    for text, message in (
        ("size,colour,kind\n1,pink,a\n1,red,b\n", "line 2: .*'pink'"),
        ("size,kind\n1,a\n1,b\n", "other columns"),
    ):
        (tmp_path / "checked.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            load(str(tmp_path / "checked.csv"), target="kind", encode=data.encoding or False)


def test_words_are_encoded_in_a_run(run: Any, flowers: Path, tmp_path: Path) -> None:
    lines = flowers.read_text().splitlines()
    worded = tmp_path / "worded.csv"
    worded.write_text(
        "\n".join([f"soil,{lines[0]}", *(f"{('clay', 'sand', '')[n % 3]},{line}" for n, line in enumerate(lines[1:]))])
    )
    common = ("--target", "kind", "--trusted-size", 12, *QUICK, "--no-compare", "-q")
    assert "pass --encode" in run(worded, *common).err
    ended = run(worded, *common, "--encode", "--output", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "Column 'soil' became 2 columns of zeros and ones" in " ".join(ended.out.split())
    assert {row["soil"] for row in rows_of(tmp_path / "out" / "cleaned.csv")} == {"clay", "sand", ""}


BAD: dict[str, tuple[list[object], str]] = {
    "no such data": (["iris"], "no data set, file or folder called 'iris'"),
    "no such file": (["none.csv", "--target", "y"], "there is no file none.csv"),
    "target of digits": (["digits", "--target", "y"], "leave --target out"),
    "no target": (["FLOWERS"], "which column is the target"),
    "wrong target": (["FLOWERS", "--target", "sort"], "no column 'sort'"),
    "numbers for classes": (["NUMBERS", "--target", "a"], "too many for classes"),
    "one class": (["NUMBERS", "--target", "b"], "one value only"),
    "text": (["FLOWERS", "--target", "width"], "not a number"),
    "text of ids": (["FLOWERS", "--target", "place"], "or leave it out by --ignore kind"),
    "unknown id": (["FLOWERS", "--target", "kind", "--ignore", "id"], "no column 'id' to ignore; there are: height"),
    "target as id": (["FLOWERS", "--target", "kind", "--ignore", "kind"], "cannot be ignored; leave --ignore kind out"),
    "ids alone": (
        ["FLOWERS", "--target", "kind", *("--ignore", "height", "--ignore", "width", "--ignore", "place")],
        "no column besides the target 'kind' and the ignored ones",
    ),
    "ids of digits": (["digits", "--ignore", "id"], "digits has no columns; leave --ignore out"),
    "empty folder": (["EMPTY"], "holds no images"),
    "broken image": (["BROKEN"], "is not an image that can be read"),
    "model": (["digits", "--model", "forest"], "no model called 'forest'"),
    "module": (["digits", "--model", "no.such.module:make"], "cannot be imported"),
    "conv of columns": (["FLOWERS", "--target", "kind", "--model", "conv", "--trusted-size", 12], "needs images"),
    "corrupt": (["digits", "--corrupt", 1], "in [0, 1), got 1"),
    "noise": (["digits", "--noise", "loud"], "loud"),
    "seeds": (["digits", "--seeds", 0], "seeds to be at least 1"),
    "steps": (["digits", "--steps", 0], "steps to be at least 1"),
    "batch": (["digits", "--batch-size", 0], "--batch-size"),
    "test size": (["digits", "--test-size", 1.5], "test size in [0, 1)"),
    "too many trusted": (["digits", "--trusted-size", 1700], "1797 rows, too few for 1700 trusted"),
    "too many to train": (["digits", "--training-size", 1700], "too few for 100 trusted"),
    "too few trusted": (["digits", "--trusted-size", 3], "no example of the class"),
    "two trusted sets": (
        ["FLOWERS", "--target", "kind", "--trusted", "FLOWERS", "--trusted-size", 3],
        "--trusted or --trusted-size",
    ),
    "other trusted": (["digits", "--trusted", "EMPTY"], "holds no images"),
    "seed": (["digits", "--seed", -1], "seed from 0"),
    "image size": (["FOLDER", "--image-size", 1], "image size of at least 2"),
    "more": (["digits", "more"], "more"),
    "option": (["digits", "--colour", "red"], "--colour"),
    "output": (["digits", "--output", "FLOWERS"], "cannot be written to"),
}


@pytest.mark.parametrize("case", BAD)
def test_input_that_cannot_be_used_ends_in_one_sentence(
    run: Any, flowers: Path, folder: Path, tmp_path: Path, case: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "a").mkdir(parents=True)
    for number in range(4):
        (tmp_path / "broken" / "a" / f"{number}.png").write_text("no image")
    (tmp_path / "broken" / "b").mkdir()
    (tmp_path / "broken" / "b" / "0.png").write_text("no image")
    (tmp_path / "numbers.csv").write_text("a,b\n" + "".join(f"{number / 7},3\n" for number in range(30)))
    places = {
        "NUMBERS": tmp_path / "numbers.csv",
        "FLOWERS": flowers,
        "EMPTY": tmp_path / "empty",
        "BROKEN": tmp_path / "broken",
        "FOLDER": folder,
    }
    arguments, words = BAD[case]
    ended = run(*(places.get(str(each), each) for each in arguments), "--quiet")
    assert ended.code == 2 and ended.err.startswith("bilevel: ") and ended.err.count("\n") == 1, ended.err
    assert words in ended.err


def test_a_trusted_set_has_the_classes_and_columns_of_the_data(flowers: Path, tmp_path: Path) -> None:
    data = load(str(flowers), target="kind")
    other = tmp_path / "other.csv"
    other.write_text(table_of_flowers(9).replace("lily,", "x,").replace("rose", "zinnia"), encoding="utf-8")
    with pytest.raises(DataError, match="class 'zinnia', which flowers has not"):
        numbered_like(load(str(other), target="kind"), data)
    other.write_text(table_of_flowers(9).replace("height", "length"), encoding="utf-8")
    with pytest.raises(DataError, match="other columns"):
        numbered_like(load(str(other), target="kind"), data)
    lines = table_of_flowers(12).splitlines()
    other.write_text("\n".join([lines[0], *(line for line in lines[1:] if "rose" not in line)]), encoding="utf-8")
    two = load(str(other), target="kind")
    assert two.classes == ("lily", "tulip")
    assert numbered_like(two, data).labels.tolist() == [2, 0] * 4
    with pytest.raises(DataError, match="no example of the class 'rose'"):
        run_cleaning(data, CleanRunSettings(steps=1, training_steps=1), trusted=two)


def test_a_number_whose_square_overflows_is_refused(flowers: Path) -> None:
    flowers.write_text(flowers.read_text().replace(",7,", ",7e300,", 1), encoding="utf-8")
    with pytest.raises(DataError, match="line 2 holds 7e\\+300, beyond 1e\\+150"):
        load(str(flowers), target="kind")


# ---- parts ----


def labelled(labels: torch.Tensor) -> LabelledData:
    rows = tuple(map(str, range(len(labels))))
    classes = tuple(map(str, range(int(labels.max()) + 1)))
    inputs = torch.arange(len(labels), dtype=torch.float32)[:, None]
    cells = tuple((row, str(int(label))) for row, label in zip(rows, labels, strict=True))
    return LabelledData("made", inputs, labels, classes, rows, ("x", "label"), cells, 1)


def test_parts_are_disjoint_stratified_and_two_runs_examine_every_row() -> None:
    data = labelled(torch.arange(120) % 3)
    seen: set[int] = set()
    for number in range(2):
        parts = split(data, Sizes(trusted=15, test=0.25), run=number, seed=4)
        rows = torch.cat([parts.training, parts.trusted, parts.test])
        assert (len(parts.trusted), len(parts.test)) == (15, 30) and rows.sort().values.equal(torch.arange(120))
        for part in (parts.trusted, parts.test):
            counts = data.labels[part].bincount()
            assert int(counts.max() - counts.min()) <= 2
        seen |= set(parts.training.tolist())
    assert seen == set(range(120))
    small = split(data, Sizes(trusted=15, training=40), run=0, seed=4)
    assert (len(small.training), len(small.test)) == (40, 65)


def test_systematic_noise_takes_the_next_class() -> None:
    labels = torch.arange(50) % 5
    given, wrong = corrupt(labels, 0.4, seed=1, noise=Noise.NEXT)
    assert int(wrong.sum()) == 20
    assert torch.equal(given, torch.where(wrong, (labels + 1) % 5, labels))
    with pytest.raises(bilevel.ArgumentError, match="Noise"):
        corrupt(labels, 0.4, noise="next")  # type: ignore[arg-type]


# ---- comparisons ----


def test_probabilities_are_those_of_models_that_did_not_see_the_row() -> None:
    """A row whose label is flipped changes the probabilities of rows in other folds, and never its own."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(20, 2), torch.arange(20) % 2
    trusted = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    from bilevel.cleaning import CleaningSettings

    settings = CleaningSettings(training_steps=5, seed=3)
    make = lambda: nn.Linear(2, 2)
    first = comparisons.cross_validated_probabilities(make, (inputs, labels), trusted, settings=settings)
    flipped = labels.clone()
    flipped[7] = 1 - flipped[7]
    second = comparisons.cross_validated_probabilities(make, (inputs, flipped), trusted, settings=settings)
    torch.testing.assert_close(first.sum(1), torch.ones(20))
    changed = (first - second).abs().amax(1) > 0
    assert not changed[7] and int(changed.sum()) == 16


def test_small_loss_flags_the_largest_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(30, 4, generator=generator).softmax(1)
    labels = torch.randint(4, (30,), generator=generator)
    losses = -np.log(probabilities.numpy()[np.arange(30), labels.numpy()])
    expected = np.zeros(30, dtype=bool)
    expected[np.argsort(-losses)[:11]] = True
    assert comparisons.small_loss(probabilities, labels, 11).tolist() == expected.tolist()


def test_confident_learning_is_what_cleanlab_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def find_label_issues(labels: Any, pred_probs: Any, **options: Any) -> Any:
        seen.update(labels=labels, pred_probs=pred_probs, **options)
        return labels == 1

    package, module = ModuleType("cleanlab"), ModuleType("cleanlab.filter")
    module.find_label_issues = find_label_issues  # type: ignore[attr-defined]
    package.filter = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cleanlab", package)
    monkeypatch.setitem(sys.modules, "cleanlab.filter", module)
    data = load("digits")
    settings = CleanRunSettings(corrupt=0.3, seeds=1, steps=2, training_steps=2, training_size=100)
    outcome = run_cleaning(data, settings)
    assert outcome.names == (GIVEN, ALONE, CLEANED, SMALL_LOSS, CONFIDENT, TRUE)
    np.testing.assert_allclose(seen["pred_probs"].sum(1), 1, atol=1e-12)
    assert outcome.values(CONFIDENT, "flagged") == [float((outcome.runs[0].given == 1).sum())]
    assert not any("cleanlab is not installed" in line for line in remarks(outcome))


# ---- results ----


def test_intervals_are_those_of_scipy() -> None:
    from scipy import stats

    values = [0.3, 0.9, 0.4, 0.8]
    found = interval(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([found.mean - found.half_width, found.mean + found.half_width], [low, high], rtol=1e-12)
    assert math.isnan(interval([1.0]).half_width) and not interval([1.0]).above_zero


def made_outcome(accuracies: dict[str, list[float]], corrupted: float = 0.0) -> Outcome:
    """An outcome with given accuracies; the rows are six, of which two are test rows in each run."""
    data = labelled(torch.tensor([0, 1, 0, 1, 0, 1]))
    runs = []
    for number in range(len(accuracies[GIVEN])):
        training = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 5]][number % 2])
        weights = torch.tensor([[0.1, 0.9, 0.4, 0.7], [0.3, 0.9, 0.8, 0.25]][number % 2])
        cleaned = Cleaned(
            weights, weights < 0.5, weights.argsort(), torch.tensor([1, 1, 0, 1]), Accuracies(0, 0, 0), nn.Identity(), torch.zeros(1)
        )  # fmt: skip
        choices = [Choice(name, values[number], 2, math.nan, math.nan, 1.0) for name, values in accuracies.items()]
        empty = torch.zeros(0, dtype=torch.int64)
        wrong = torch.tensor([True, False, False, False]) if corrupted else None
        parts = Split(training, torch.tensor([4]), empty)
        runs.append(Run(number, parts, data.labels[training], wrong, cleaned, tuple(choices), ()))
    settings = CleanRunSettings(corrupt=corrupted, seeds=len(runs))
    return Outcome(data, None, "linear", settings, tuple(runs), (), 1.0)


def test_remarks_say_what_the_numbers_support_and_what_not() -> None:
    told = remarks(
        made_outcome(
            {
                GIVEN: [0.80, 0.81, 0.82],
                ALONE: [0.90, 0.86, 0.95],
                CLEANED: [0.90, 0.91, 0.92],
                SMALL_LOSS: [0.95, 0.96, 0.97],
            }
        )
    )
    text = "\n".join(told)
    assert "Cleaning raised the test accuracy by 10.0 ± 0.0 points" in text
    assert f"Learned weights are not shown to be more or less accurate than {ALONE}" in text
    assert f"Learned weights are less accurate than {SMALL_LOSS}, by 5.0" in text
    assert "are taken to be right" in text and "1 rows were trusted or test rows in every run" in text
    worse = remarks(made_outcome({GIVEN: [0.90, 0.80], ALONE: [0.9, 0.8], CLEANED: [0.89, 0.81]}))
    assert any("do not show that cleaning helps" in line for line in worse)
    one = remarks(made_outcome({GIVEN: [0.90], ALONE: [0.9], CLEANED: [0.95]}))
    assert any("+5.0 points; one run has no interval" in line for line in one)


def test_suspects_of_several_runs_are_ordered_by_votes_and_weights(tmp_path: Path) -> None:
    accuracies = {GIVEN: [0.8, 0.8], ALONE: [0.9, 0.9], CLEANED: [0.9, 0.9]}
    outcome = made_outcome(accuracies)
    listed = suspects(outcome)
    assert [each.row for each in listed] == [0, 5, 2, 3, 1]
    assert [(each.flagged_in, each.runs, each.flagged) for each in listed] == [
        (2, 2, True), (1, 1, True), (1, 2, False), (0, 1, False), (0, 2, False),
    ]  # fmt: skip
    assert listed[0].weight == pytest.approx(0.2) and listed[0].suggested == 1 and listed[0].true is None
    write_cleaned(outcome, tmp_path / "cleaned.csv")
    assert [row["x"] for row in rows_of(tmp_path / "cleaned.csv")] == ["1", "2", "3", "4"]
    # Where each run has other wrong labels, the first run alone is listed.
    first = made_outcome(accuracies, corrupted=0.3)
    assert [each.row for each in suspects(first)] == [0, 2, 3, 1]
    write_suspects(first, tmp_path / "suspicious.csv")
    assert rows_of(tmp_path / "suspicious.csv")[0]["true"] == "0"


@pytest.mark.slow
def test_138_of_400_wrong_labels_of_digits_are_found() -> None:
    settings = CleanRunSettings(
        corrupt=0.345, noise=Noise.NEXT, training_size=400, trusted_size=100, seeds=2, steps=120, compare=True
    )
    outcome = run_cleaning(load("digits"), settings, model="mlp")
    means = {name: interval(outcome.values(name, "accuracy")).mean for name in outcome.names}
    assert all(int(run.wrong.sum()) == 138 for run in outcome.runs if run.wrong is not None)
    assert means[CLEANED] >= means[GIVEN] + 0.04
    assert means[CLEANED] >= means[SMALL_LOSS] + 0.02
    assert interval(outcome.values(CLEANED, "recall")).mean > 0.75
    assert interval(outcome.values(CLEANED, "precision")).mean > 0.75
    assert means[TRUE] > means[CLEANED]


def test_the_remedy_for_a_class_without_trusted_rows_works() -> None:
    labels = torch.cat([torch.arange(60) % 2, torch.tensor([2])])
    with pytest.raises(DataError, match="'2'; it has 1 of 61 rows, too few for --trusted-size: leave the class out"):
        split(labelled(labels), Sizes(trusted=10), run=0, seed=0)
    labels = torch.cat([torch.arange(60) % 2, torch.full((3,), 2)])
    seeds = [seed for seed in range(20) if not _holds_all(labels, 10, seed)]
    with pytest.raises(DataError, match=r"; raise --trusted-size$"):
        split(labelled(labels), Sizes(trusted=10), run=0, seed=seeds[0])
    assert all(_holds_all(labels, 30, seed) for seed in seeds)


def _holds_all(labels: torch.Tensor, trusted: int, seed: int) -> bool:
    try:
        split(labelled(labels), Sizes(trusted=trusted), run=0, seed=seed)
    except DataError:
        return False
    return True
