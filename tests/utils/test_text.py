"""Text for terminals: nothing in it is obeyed, columns stand under each other, paths survive a shell."""

import shlex

from hypothesis import given
from hypothesis import strategies as st

from fewstep.utils.text import aligned, printable, quoted

ESCAPES = "\x1b[31m", "\x07", "\x9b2J", "\u202etxt.exe", "\u2066", "\r", "\u200b", "\ud800", "\x00", "\u2028"


@given(st.text())
def test_nothing_printable_changes(text: str) -> None:
    shown = printable(text)
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


def test_what_a_terminal_obeys_is_written_out() -> None:
    for escape in ESCAPES:
        shown = printable(f"before{escape}after")
        assert shown.isprintable()
        assert shown.startswith("before\\")
        shown.encode()
    assert printable("a\tb\nc – 10⁻⁵ × ± é") == "a\tb\nc – 10⁻⁵ × ± é"


def test_cells_stand_under_each_other() -> None:
    rows = [("method", "NFE"), ("a longer\none", "16"), ("\x1b", "1")]
    assert aligned(rows).splitlines() == ["method        NFE", "a longer one   16", "\\x1b            1"]
    assert aligned(rows, left=2).splitlines()[1] == "a longer one  16"


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_paths_survive_a_shell(path: str) -> None:
    assert shlex.split(quoted(path)) == [path]
