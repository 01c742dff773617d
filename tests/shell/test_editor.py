"""Line editors: completion, hints, history, and what is there without prompt_toolkit."""

import sys

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from imds.shell.editor import PlainEditor, make_editor, suggestions
from imds.shell.history import History
from imds.shell.toolkit import ToolkitEditor, _Commands, hint_after

UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"


@pytest.fixture
def history():
    return History(None)


@pytest.fixture
def type_lines(history):
    """Return what the editor reads of what is typed."""

    def run(*keys):
        with create_pipe_input() as pipe:
            editor = ToolkitEditor(history, pipe, DummyOutput())
            read = []
            for text in keys:
                pipe.send_text(text)
                read.append(editor.read())
            return read

    return run


def test_a_line(type_lines):
    assert type_lines("get a\r", "set ü 'é'\r") == ["get a", "set ü 'é'"]


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ("zinc", ["zincrby "]),
        ("set k v keep", ["keepttl "]),
        ("set k v KEEP", ["KEEPTTL "]),
        ("get ke", []),
        ("get 'a", []),
    ],
)
def test_tab_completes_commands_and_keywords_alone(typed, texts):
    found = _Commands().get_completions(Document(typed), CompleteEvent())
    assert [completion.text for completion in found] == texts


def test_the_menu_says_what_a_command_does():
    found = list(_Commands().get_completions(Document("zin"), CompleteEvent()))
    assert "zincrby" in [completion.display_text for completion in found]
    assert all(completion.display_meta_text for completion in found)
    (option,) = _Commands().get_completions(Document("set k v g"), CompleteEvent())
    assert (option.text, option.start_position, option.display_meta_text) == ("get ", -1, "")


def test_the_history_comes_back_without_secrets(type_lines, history):
    assert type_lines("get a\r", "auth secret\r", f"{UP}b\r") == ["get a", "auth secret", "get ab"]
    assert history.lines == ["get a", "get ab"]
    assert type_lines(f"{UP}{UP}c\r") == ["get ac"]  # of an earlier session


def test_several_lines_that_are_pasted(type_lines, history):
    assert type_lines("\x1b[200~get a\nget b\x1b[201~\r") == ["get a\nget b"]
    assert history.lines == ["get a", "get b"]


@pytest.mark.parametrize(("key", "error"), [(CTRL_C, KeyboardInterrupt), (CTRL_D, EOFError)])
def test_leaving_a_line(type_lines, key, error):
    with pytest.raises(error):
        type_lines(key)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("", ""),
        ("ge", ""),
        ("get", " key"),
        ("get ", "key"),
        ("get k", ""),
        ("set 'a b'", " value [NX|XX] [GET] [EX seconds|PX milliseconds|EXAT time|PXAT time|KEEPTTL]"),
        ("set 'a ", ""),
        ("zadd \udcff 1 ", "member [score member ...]"),
    ],
)
def test_hint(typed, hint):
    assert hint_after(typed) == hint


def test_what_cannot_be_completed():
    assert suggestions("get 'a") == ("", [])
    assert suggestions("'ge't") == ("get", [])  # the typed text is not the word
    assert suggestions("")[0] == ""


def test_plain_input_without_prompt_toolkit(history, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    monkeypatch.delitem(sys.modules, "imds.shell.toolkit")
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    assert isinstance(make_editor(history), PlainEditor)


def test_plain_input_on_a_dumb_terminal(history, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_editor(history), PlainEditor)
