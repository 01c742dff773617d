"""imds-cli: commands from a prompt, a command line or a pipe.

At a terminal a payload is shown as it is, if that is plain text, otherwise quoted, with escapes that may
be typed again. When the output goes elsewhere, the payload of one command (``imds-cli get logo > file``)
is written as its very bytes. The parts are in imds/shell.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from imds.client import ImdsError, ServerError
from imds.shell.editor import make_editor
from imds.shell.help import help_text
from imds.shell.history import History, default_path
from imds.shell.line import quote, split_line
from imds.shell.modes import add_modes, check_options
from imds.shell.options import (
    EX_CONNECTION,
    EX_INTERRUPTED,
    EX_MISSING,
    EX_OK,
    EX_SERVER,
    EX_USAGE,
    Parser,
    discard_output,
)
from imds.shell.output import Form, render, wants_colour
from imds.shell.prompt import Conversation
from imds.shell.run import run_lines, run_one

__all__ = [
    "EX_CONNECTION",
    "EX_MISSING",
    "EX_OK",
    "EX_SERVER",
    "EX_USAGE",
    "Parser",
    "discard_output",
    "help_text",
    "main",
    "quote",
    "render",
    "split_line",
]

_EPILOG = """\
Without a command, commands are read from the terminal, or line by line from a pipe. Arguments with spaces
are quoted: 'as it is', or "with \\n \\t \\\\ \\" \\x00 escapes".

At the terminal Tab completes commands and their keywords, never data. With the package prompt_toolkit
(pip install imds[cli]) what the command still wants is shown behind the cursor. The lines are kept in
~/.local/state/imds/history (IMDS_HISTORY names another file, or none if it is empty), but never passwords,
and no line that begins with a space.

environment: IMDS_HOST, IMDS_PORT, IMDS_UNIX are the defaults of --host, --port, --unix. NO_COLOR=1 turns
colours off, which only a terminal gets.

exit codes: 0 done; 1 missing; 2 the server answered by an error; 3 the server cannot be reached, went away or
did not answer in time; 64 wrong usage. Of many lines from a pipe, the highest, where missing counts as done.
--pipe: 0 all lines are done; 1 some have failed; 3 and 64 as above.
"""


def _parser() -> Parser:
    parser = Parser(prog="imds-cli", description="Talk to an imds server.", epilog=_EPILOG)
    parser.add_argument("-n", "--no-newline", action="store_true", help="write a payload without a newline")
    forms = parser.add_argument_group("how replies are written").add_mutually_exclusive_group()
    for form, help_ in (
        (Form.RAW, "as their bytes, to a terminal too"),
        (Form.JSON, 'as JSON, each on a line; bytes that are no UTF-8 as {"base64": "..."}'),
        (Form.CSV, "as CSV, each a row"),
    ):
        forms.add_argument(f"--{form.value}", dest="form", action="store_const", const=form, help=help_)
    add_modes(parser)
    parser.add_argument("command", nargs="...", help="a command and its arguments, such as: get foo")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    check_options(parser, args)
    tokens = [os.fsencode(word) for word in args.command]
    with parser.client(args) as client:
        try:
            if args.mode is not None:
                return int(args.mode.run(client, args))
            if tokens:
                return run_one(client, tokens, args.form, not args.no_newline)
            if sys.stdin.isatty():
                editor = make_editor(History(default_path()))
                return Conversation(client, editor, args.form or Form.TEXT, wants_colour(sys.stdout)).run()
            return run_lines(client, sys.stdin.buffer, args.form or Form.TEXT)
        except BrokenPipeError:
            discard_output()
            return EX_OK
        except ServerError as error:
            print(f"imds-cli: {error}", file=sys.stderr)
            return EX_SERVER
        except ImdsError as error:
            print(f"imds-cli: {error}", file=sys.stderr)
            return EX_CONNECTION
        except (ValueError, OSError) as error:  # a request over the limits, a file
            print(f"imds-cli: {error}", file=sys.stderr)
            return EX_USAGE
        except KeyboardInterrupt:
            return EX_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
