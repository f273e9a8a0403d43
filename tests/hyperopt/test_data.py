"""Reading data sets, and every way in which a file can be unusable."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from bilevel.hyperopt.data import BUNDLED, DataError, Task, infer_task, load, load_bundled, read_csv


@pytest.mark.parametrize(
    ("name", "task", "shape", "classes"),
    [
        ("breast_cancer", Task.BINARY, (569, 30), 2),
        ("diabetes", Task.REGRESSION, (442, 10), 0),
        ("digits", Task.MULTICLASS, (1797, 64), 10),
        ("wine", Task.MULTICLASS, (178, 13), 3),
    ],
)
def test_bundled(name: str, task: Task, shape: tuple[int, int], classes: int) -> None:
    dataset = load_bundled(name)
    assert (dataset.task, dataset.inputs.shape, len(dataset.classes)) == (task, shape, classes)
    assert len(dataset.features) == shape[1]
    assert dataset.inputs.dtype == np.float64
    assert dataset.targets.dtype == (np.int64 if task is Task.MULTICLASS else np.float64)


def test_bundled_names_are_what_load_knows() -> None:
    assert [load(name).name for name in BUNDLED] == list(BUNDLED)


def test_class_names_come_along() -> None:
    assert load_bundled("breast_cancer").classes == ("malignant", "benign")


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes, name: str = "data.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_csv(write) -> None:
    path = write('\ufeff"a, b", y ,c\n1, yes ,2e3\n\n-1.5,no,.5\n')
    dataset = read_csv(path, target="y")
    assert dataset.features == ("a, b", "c")
    assert dataset.classes == ("no", "yes")
    np.testing.assert_array_equal(dataset.inputs, [[1, 2000], [-1.5, 0.5]])
    np.testing.assert_array_equal(dataset.targets, [1.0, 0.0])
    assert dataset.name == "data"


@pytest.mark.parametrize(
    "names",
    [
        ("0", "1", "2"),
        ("1", "2", "3", "y"),
        ("2019", "2020", "2021", "y"),
        ("y", *(f"{1100 + 2.5 * k}" for k in range(9))),
        ("x", "4", "2"),
    ],
)
def test_names_that_are_numbers_but_no_row(write, names: tuple[str, ...]) -> None:
    rows = [",".join(str(i * k % 7) for k in range(len(names))) for i in range(1, 4)]
    dataset = read_csv(write("\n".join([",".join(names), *rows])), target=names[-1])
    assert dataset.features == names[:-1]


def test_commas_at_the_end_of_every_line_are_no_column(write) -> None:
    dataset = read_csv(write("x,y,,\n1,2.5,,\n3,4.5,, \n,,,\n5,6.5,,\n"), target="y")
    assert dataset.features == ("x",)
    np.testing.assert_array_equal(dataset.inputs, [[1], [3], [5]])


def test_a_file_packed_by_gzip_is_read_whatever_its_name(write) -> None:
    packed = gzip.compress(b"a,y\r\n1,yes\r\n2,no\r\n", mtime=0)
    for name in ("data.csv.gz", "data.gz", "data.csv"):
        dataset = read_csv(write(packed, name), target="y")
        assert dataset.name == "data"
        np.testing.assert_array_equal(dataset.inputs, [[1], [2]])
    assert read_csv(write("a,y\n1,yes\n2,no\n", "plain.csv.gz"), target="y").name == "plain"


@pytest.mark.parametrize(
    ("values", "task"),
    [
        (["a", "b", "a"], Task.BINARY),
        (["a", "b", "c"], Task.MULTICLASS),
        ([0.0, 1.0, 1.0], Task.BINARY),
        ([5.0, 7.0, 9.0], Task.MULTICLASS),
        ([0.5, 1.0, 1.0], Task.REGRESSION),
        (list(np.arange(21.0)), Task.REGRESSION),
    ],
)
def test_the_task_is_inferred(values: list, task: Task) -> None:
    assert infer_task(np.array(values)) is task


def test_the_task_can_be_given(write) -> None:
    path = write("x,y\n1,0\n2,1\n3,2\n")
    assert read_csv(path, target="y").task is Task.MULTICLASS
    assert read_csv(path, target="y", task=Task.REGRESSION).task is Task.REGRESSION
    with pytest.raises(DataError, match="3 different values, and a binary task needs two"):
        read_csv(path, target="y", task=Task.BINARY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("x,y\n", "a header and no rows"),
        ("x,z\n1,2\n", "no column 'y'; there are: x, z"),
        ("y\n1\n2\n", "no column besides the target"),
        ("x,x,y\n1,2,3\n", "'x' occurs more than once"),
        ("x,y\n1,2,3\n", "line 2: expected 2 columns as in the header, got 3"),
        ("x,y\nred,1\n2,2\n", "line 2: column 'x' holds 'red', which is not a number"),
        ("x,y\n1,1\n1_0,2\n", "line 3: column 'x' holds '1_0', which is not a number"),
        ("x,y\nnan,1\n2,2\n", "column 'x' holds 'nan'; fill in missing values"),
        ("x,y\n1,1\ninf,2\n", "column 'x' holds 'inf'"),
        ("x,y\n1,1\n,2\n", "line 3: column 'x' is empty"),
        ("x,y\n1,1\n2,\n", "line 3: column 'y' is empty; fill in"),
        (
            "x,z,y\n1,1,1\n,NA,2\n3,3,3\n,1,2\n1,2,\n",
            "line 3: column 'x' is empty (4 cells in 3 rows have no value); fill in missing values or remove such rows",
        ),
        ("x,y\n1,1\n2\n", "line 3: expected 2 columns as in the header, got 1; fill in the cells that are missing"),
        ("# made by hand\nx,z,y\n1,2,3\n", "line 1 is '# made by hand' and the next has 3 columns; remove lines above"),
        ("x,y\n1,2\n".encode("utf-32").decode("latin-1").encode("latin-1"), "is text in UTF-32"),
        ("x,y\n1,1\n2,NaN\n", "line 3: target 'y' holds 'NaN', which is no value; remove the row or fill it in"),
        ("x,y\n1,yes\n2,no\n3,N/A\n", "line 4: target 'y' holds 'N/A', which is no value"),
        ("x,y\n1,1\nNA,2\n", "column 'x' holds 'NA'; fill in missing values"),
        ("x,y\n1,1\n2,inf\n", "line 3: target 'y' is not a finite number"),
        (
            "x,y\n" + "".join(f"1,{k}\n" for k in range(30)) + '1,"1,200"\n',
            "line 32: target 'y' holds '1,200', which is not a number as others",
        ),
        (
            'x,y\n"1,200",3\n2,4\n',
            "holds '1,200', which is not a number; write it with a point for decimals, and nothing for thousands",
        ),
        (
            'x,y\n"0,5",3\n2,4\n',
            "holds '0,5', which is not a number; write it with a point for decimals, and nothing for thousands",
        ),
        ("x,y\n1,5\n2,5\n", "has one value only, 5"),
        ("x,y\n1,a\n2,a\n", "has one value only, a"),
        ("0.3,-1.5,2\n0.1,0.2,1\n", "first line holds numbers where column names are expected (0.3, -1.5, 2)"),
        ("1.0,2.0,3.0\n4,5,6\n", "first line holds numbers"),
        ("0,0,0,y\n1,2,3,4\n", "put a line of names above it"),
        ("5.1,3.5,1.4,0.2,setosa\n4.9,3.0,1.4,0.2,setosa\n", "first line holds numbers"),
        ("1,yes\n2,no\n", "there are: 1, yes; if that is a row, put a line of names above it"),
        ("x;y\n1;2\n", "separated by semicolons; separate them with commas"),
        ("x;y\n0,5;2\n", "separated by semicolons"),
        ("x\ty\n1\t2\n", "separated by tabs"),
        ("x|y\n1|2\n", "separated by bars"),
        ("x y\n1 2\n", "separated by spaces"),
        (
            "x,y\n1,2,\n3,4,\n",
            "line 2: expected 2 columns as in the header, got 3; remove the commas at the ends of lines",
        ),
        ("x,,y\n1,,2\n", "column 2 of 3 has no name"),
        (",x,y\n0,1,2\n1,3,4\n", "column 1 of 3 has no name; name it if it is a feature, or remove it"),
        (",,y\n0,1,2\n1,3,4\n", "column 1 of 3 has no name"),
        (b"x,y\n1,\xe9\n", "line 2 is not text in UTF-8"),
        ("x,y\n1,2\n".encode("utf-16"), "is text in UTF-16; save it as a CSV file in UTF-8"),
        (b"PAR1\x00\x01\xff", "is not text; expected a CSV file in UTF-8"),
        (b"x,y\n\x001,2\n", "is not text; expected a CSV file in UTF-8"),
        (gzip.compress(b"x,y\n1,2\n", mtime=0)[:-9], "is a gzip file that is damaged"),
        (b"\x1f\x8b nothing of the kind", "is a gzip file that is damaged"),
        (gzip.compress(b"\x00", mtime=0), "is not text"),
        ('x,y\n"1,2\n', "expected 2 columns"),
    ],
)
def test_files_that_cannot_be_used(write, text: str | bytes, message: str) -> None:
    path = write(text)
    with pytest.raises(DataError) as caught:
        read_csv(path, target="y")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        load(str(tmp_path / "none.csv"), target="y")
    with pytest.raises(DataError, match="is a directory"):
        load(str(tmp_path), target="y")
    with pytest.raises(DataError, match="cannot be read"):
        load(str(tmp_path / ("long" * 1000 + ".csv")), target="y")
    with pytest.raises(DataError, match="no data set and no file called"):
        load(str(tmp_path / ("long" * 1000)), target="y")
    with pytest.raises(DataError, match="no data set and no file called 'iris'"):
        load("iris")
    with pytest.raises(DataError, match="no bundled data set called 'iris'"):
        load_bundled("iris")


def test_targets_are_asked_for_where_they_are_needed(write) -> None:
    with pytest.raises(DataError, match="Pass --target, one of: y, x"):
        load(str(write("x,y\n1,2\n")))
    with pytest.raises(DataError, match="leave --target out"):
        load("wine", target="y")


def test_ignored_columns_are_no_features(write) -> None:
    path = write("id,x,note,y\na1,1,late,0\na2,2,,1\na3,4,?,0\n")
    with pytest.raises(DataError, match=r"holds 'a1', which is not a number; .*or leave it out by --ignore id$"):
        load(str(path), target="y")
    dataset = load(str(path), target="y", ignore=["note", "id"])
    assert dataset.features == ("x",)
    np.testing.assert_array_equal(dataset.inputs, [[1], [2], [4]])
    with pytest.raises(DataError, match="leave --ignore out"):
        load("wine", ignore=["alcohol"])


MIXED = "age,colour,id,y\n1,red,a,0\n,blue,b,1\n5,,c,0\n9,red,d,1\n"


def test_words_and_missing_numbers_are_encoded_when_asked(write) -> None:
    dataset = load(str(write(MIXED)), target="y", ignore=["id"], encode=True)
    assert dataset.features == ("age", "colour=blue", "colour=red")
    np.testing.assert_array_equal(dataset.inputs, [[1, 0, 1], [5, 1, 0], [5, 0, 0], [9, 0, 1]])
    assert dataset.encoding is not None and dataset.encoding.sentences == [
        "Column 'age' has no value in 1 row: its median, 5, stands there.",
        "Column 'colour' became 2 columns of zeros and ones, all zero in 1 row without a value.",
    ]
    plain = load(str(write("age,y\n1,0\n2,1\n")), target="y", encode=True)
    np.testing.assert_array_equal(plain.inputs, [[1], [2]])
    assert plain.encoding is not None and plain.encoding.sentences == []
    with pytest.raises(DataError, match="leave --encode out"):
        load("wine", encode=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "x,y\n" + "".join(f"w{k},{k % 2}\n" for k in range(21)),
            "'x' has 21 different words, such as 'w0'.*--ignore x",
        ),
        ("x,z,y\n1,,0\n2,NA,1\n", "column 'z' has no value in any row; leave it out by --ignore z"),
        ("x,y\nred,0\nblue,\n", "line 3: column 'y' is empty; fill in missing values or remove such rows$"),
    ],
)
def test_what_cannot_be_encoded_is_refused(write, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(str(write(text)), target="y", encode=True)


def test_the_option_is_named_where_it_helps(write) -> None:
    for text in ("x,y\nred,0\n2,1\n", "x,y\n,0\n2,1\n"):
        with pytest.raises(DataError, match="pass --encode"):
            load(str(write(text)), target="y")


def test_regression_on_text_is_refused(write) -> None:
    with pytest.raises(DataError, match="regression needs numbers"):
        read_csv(write("x,y\n1,a\n2,b\n"), target="y", task=Task.REGRESSION)


def test_a_bundled_target_forced_into_classes_keeps_its_numbers() -> None:
    assert load_bundled("diabetes", task=Task.MULTICLASS).classes[:2] == ("25", "31")
