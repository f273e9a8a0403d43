"""Sentences are short: public docstrings, and the meanings and remedies of statuses.

A sentence above ``MOST`` words fails. ``pytest -s tests/test_sentences.py`` lists those above ``WANTED`` words, which is the house's rule.
"""

import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator

import pytest

import bilevel
from bilevel.reports import Status

MOST, WANTED = 35, 25

# Literature, and code.
UNCOUNTED = re.compile(r"^(References|Examples|Source)\n-{3,}\n.*?(?=^\w+\n-{3,}\n|\Z)", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r"^\w+\n-{3,}$", re.MULTILINE)
ROLE = re.compile(r":[a-z:]+:`~?([^`<]*)(?:<[^`]*>)?`")
END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
WORD = re.compile(r"[A-Za-zÀ-ÿ][\w’'.-]*")


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a docstring's prose, without literature, code, formulas in display and parentheses."""
    prose = ROLE.sub(r"\1", TITLE.sub("", UNCOUNTED.sub("", text)))
    prose = re.sub(r"^\.\. math::.*?\n\s*\n|^=[= ]+$.*?^=[= ]+$", "\n", prose, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"``[^`]*``|`[^`]*`", "code", prose)
    prose = re.sub(r"\([^()]*\)", "", prose)
    for paragraph in re.split(r"\n\s*\n|\n(?=\S[^\n]*\n {4})", textwrap.dedent(prose)):
        # The names of a parameter stand on a line of their own.
        body = re.sub(r"\A[\w, *]+\n(?= {4})", "", paragraph)
        for sentence in END.split(" ".join(body.split())):
            yield sentence.strip()


def words(sentence: str) -> int:
    """Count the words of a sentence; a formula has none."""
    return len(WORD.findall(sentence))


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield the name and the docstring of every public object and of its public methods."""
    seen: set[int] = set()
    for path in public_modules():
        module = importlib.import_module(path)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name, None)
            if not (inspect.isclass(value) or inspect.isroutine(value)) or id(value) in seen:
                continue
            seen.add(id(value))
            yield f"{path}.{name}", inspect.getdoc(value) or ""
            if inspect.isclass(value):
                members = [(key, item) for key, item in vars(value).items() if not key.startswith("_")]
                for key, item in members:
                    if inspect.isroutine(item) or isinstance(item, property):
                        yield f"{path}.{name}.{key}", inspect.getdoc(item) or ""


def public_modules() -> list[str]:
    """Return the packages from which users import."""
    tops = [info.name for info in pkgutil.iter_modules(bilevel.__path__) if not info.name.startswith("_")]
    names = ("prox", "robust", "stochastic", "cleaning", "learnable", "testing", "operators", "display", "loggers")
    return ["bilevel", *(f"bilevel.{name}" for name in names if name in tops), "bilevel.certificates", "bilevel.meta"]


def long_sentences(most: int) -> list[str]:
    """Return the sentences above ``most`` words, each with its place."""
    found = [f"{where}: {words(s)}: {s}" for where, text in docstrings() for s in sentences(text) if words(s) > most]
    for status in Status:
        for part in (status.meaning, status.remedy):
            # The remedies of one status are joined by semicolons.
            found += [f"{status}: {words(s)}: {s}" for s in sentences(part.replace(";", ".")) if words(s) > most]
    return found


def test_no_sentence_is_long() -> None:
    listed = long_sentences(WANTED)
    print(f"\n{len(listed)} sentences above {WANTED} words:", *listed, sep="\n")
    assert not long_sentences(MOST)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("One two. Three four five.", [2, 3]),
        ("Say it; say it again: now.", [6]),
        ("Return x.\n\nParameters\n----------\nname\n    One two three\n    four.\nother\n    Five.\n", [2, 4, 1]),
        ("Return :class:`~bilevel.Layer` (not counted at all).", [2]),
        ("Do.\n\nReferences\n----------\nA long title by many authors.\n\nExamples\n--------\n>>> 1\n1\n", [1]),
    ],
)
def test_words_are_counted(text: str, counts: list[int]) -> None:
    assert [words(s) for s in sentences(text) if s] == counts
