"""The options that say where the server is, and exit codes: of imds-cli, and of scripts beside it."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from imds import __version__
from imds.client import Client
from imds.protocol import DEFAULT_HOST, DEFAULT_PORT

# Exit codes; EX_USAGE as sysexits.h has it.
EX_OK, EX_MISSING, EX_SERVER, EX_CONNECTION, EX_USAGE = 0, 1, 2, 3, 64
EX_INTERRUPTED = 130  # as shells have it

DEFAULT_TIMEOUT = 5.0  # seconds


class Parser(argparse.ArgumentParser):
    """An argument parser with the options that say where the server is; leaves with EX_USAGE."""

    def __init__(self, **options: object) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,  # type: ignore[arg-type]
        )
        self.add_argument("-H", "--host", help=f"name or address of the server (default {DEFAULT_HOST})")
        self.add_argument("-p", "--port", help=f"its port (default {DEFAULT_PORT})")
        self.add_argument("--unix", metavar="PATH", help="its Unix socket, instead of host and port")
        self.add_argument(
            "-u",
            "--url",
            help="instead of these: imds://[[user]:password@]host[:port], imds+unix:///path",
        )
        self.add_argument(
            "--timeout",
            metavar="SECONDS",
            type=seconds,
            help=f"how long to wait for a reply (default {DEFAULT_TIMEOUT:g}, 0 for ever)",
        )
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EX_USAGE, f"{self.prog}: {message}\n")

    def client(self, args: argparse.Namespace) -> Client[bytes]:
        """Return a client of the server that the options, or else the environment, name."""
        unix, env = args.unix, os.environ.get
        if args.url is not None:
            if (args.host, args.port, unix) != (None, None, None):
                self.error("--url says where the server is: neither --host nor --port nor --unix beside it")
            try:
                if args.timeout is None:  # the URL may say it
                    return Client.from_url(args.url, encoding=None)
                return Client.from_url(args.url, encoding=None, timeout=args.timeout or None)
            except ValueError as error:
                self.error(f"--url: {error}")
        if unix is None and args.host is None and args.port is None:
            unix = env("IMDS_UNIX") or None
        host = args.host or env("IMDS_HOST") or DEFAULT_HOST
        if args.port is not None:
            source, port = "--port", args.port
        else:
            source, port = "IMDS_PORT", env("IMDS_PORT") or str(DEFAULT_PORT)
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            self.error(f"{source} {port!r}: must be a whole number from 1 to 65535")
        timeout = DEFAULT_TIMEOUT if args.timeout is None else args.timeout or None
        return Client(host, int(port), unix=unix, timeout=timeout)


def seconds(text: str) -> float:
    """Read a number of seconds, for argparse."""
    value = float(text)
    if not 0 <= value < 1e6:
        raise ValueError
    return value


seconds.__name__ = "number of seconds"  # what argparse says of a bad value


def discard_output() -> None:
    """Whoever read our output has seen enough, and Python's last flush must not complain about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
