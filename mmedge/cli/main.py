"""``mmedge``: the commands and what their exit status means."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
import traceback

import click

from mmedge import __version__
from mmedge.cli import catalogues, doctor, forecast, runs
from mmedge.errors import MmedgeError, UsageError

EPILOG = (
    "Exit status: 0 done; 1 a bug in mmedge; 2 usage, recipe or task error; 3 a gate failed (the run and its report "
    "are complete); 4 a target or device is not available here; 130 interrupted (the same command resumes)."
)

LAUNCHERS_TURN_S = 15.0  # a launcher ends the other processes well within, also on a machine that is busy


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mmedge")
def cli() -> None:
    """Compress a trained multimodal model and ship an engine that was measured on its target."""


for command in (runs.compress, runs.build, runs.profile, runs.report):
    cli.add_command(command)
cli.add_command(forecast.forecast)
cli.add_command(doctor.doctor)
for group in (catalogues.recipe, catalogues.task, catalogues.target):
    cli.add_command(group)


def main() -> None:
    """Run the command line and exit with the status of what happened."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before any runtime loads: mmedge phones nobody
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "×" gets a question mark, not a traceback
    arguments = sys.argv[1:]
    verbose = any(argument in ("-v", "--verbose") for argument in arguments)
    _hear_the_end()
    try:
        _refuse_bytes(arguments)
        status = cli.main(arguments, prog_name="mmedge", standalone_mode=False)
    except click.ClickException as err:
        err.show()
        status = err.exit_code
    except (KeyboardInterrupt, click.Abort):
        print(f"\ninterrupted; what is finished is kept. To go on:\n  {runs.command_line()}", file=sys.stderr)
        status = 130
    except MmedgeError as err:
        _let_the_first_speak()
        if verbose:
            traceback.print_exc()
        print(f"error: {err}", file=sys.stderr)
        if "--json" in arguments:
            print(json.dumps({"error": {"problem": err.problem, "where": err.where, "fix": err.fix}}))
        status = err.exit_status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `mmedge … | head` is no error
        status = 0
    except Exception as err:  # noqa: BLE001 - the last line of defence: say that it is our fault
        traceback.print_exc()
        print(f"error: this is a bug in mmedge ({type(err).__name__}); please report it", file=sys.stderr)
        status = 1
    sys.exit(status if isinstance(status, int) else 0)


def _hear_the_end() -> None:
    """Take the signals that end a process as Ctrl-C is taken: temporary folders go, and the user is told how to go on.

    Not where a launcher started the process: it ends the others of a team so when one has failed and told why.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if "RANK" not in os.environ and signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, signal.default_int_handler)


def _refuse_bytes(arguments: list[str]) -> None:
    """Names go into reports and manifests, which are UTF-8.

    Raises:
        UsageError: an argument is not text in the encoding of this system.
    """
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise UsageError("it is not UTF-8 text", where=f"argument {argument!r}", fix="rename the file or folder")


def _let_the_first_speak() -> None:
    """Of processes that a launcher started side by side, wait with an error: the first has found the same, as a rule.

    Then the launcher ends this one before it says it again. What only this process has found is said after the wait.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(LAUNCHERS_TURN_S)


if __name__ == "__main__":
    main()
