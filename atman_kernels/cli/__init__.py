"""The command line: `atman explain | steer | demo | serve | doctor | bench`.

Exit codes: 0 done, 1 unexpected failure or a result that could not be written, 2 wrong usage or input, 3 this model or
backend cannot do it, 130 interrupted. Results go to standard output, messages and progress to standard error
(`output.py`). Whatever takes long to import is imported inside the commands, so that `atman --help` answers at once.
"""

import os
from typing import Any

import click

import atman_kernels
from atman_kernels.cli import bench, bench_quality, demo, doctor, explain, fit_at2, output, serve, steer
from atman_kernels.cli.output import Failure, NotWrittenError
from atman_kernels.errors import BackendUnavailableError, InputError, UnsupportedModelError

UNEXPECTED, WRONG_INPUT, UNSUPPORTED, INTERRUPTED = 1, 2, 3, 130


def _failure_of(error: Exception) -> Failure:
    if isinstance(error, InputError):
        return Failure(str(error), WRONG_INPUT)
    if isinstance(error, UnsupportedModelError | BackendUnavailableError):
        return Failure(str(error), UNSUPPORTED)
    if isinstance(error, NotWrittenError):
        return Failure(str(error), UNEXPECTED)
    return Failure(f"{type(error).__name__}: {error} (atman --traceback ... shows where)", UNEXPECTED)


def _check_working_folder() -> None:
    """Raises InputError if it is gone: transformers asks for it as it is imported."""
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(f"the working folder cannot be read ({error.strerror}); go to one that exists") from error


class _Commands(click.Group):
    """A group whose commands fail in one line, unless the traceback is asked for."""

    _shown: Exception | None = None  # with its traceback, as was asked for

    def main(self, *args: Any, **extra: Any) -> Any:
        """click's, with streams that take any text; ends with 1 where what was printed did not get out."""
        output.prepare()
        try:
            return super().main(*args, **extra)
        except OSError as error:  # click's own help could not be written
            if error is self._shown:
                raise
            output.lose(error)
            raise SystemExit(UNEXPECTED) from None
        except SystemExit as end:  # how click ends a program
            if not output.finish() and not end.code:
                raise SystemExit(UNEXPECTED) from None
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """click's, with every failure as a `Failure`: one line and its exit code."""
        try:
            output.check_standard_output()
            _check_working_folder()
            return super().invoke(ctx)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else ctx.command_path
            raise Failure(f"{error.format_message()} ({path} --help shows how)", WRONG_INPUT) from error
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except (KeyboardInterrupt, click.Abort) as error:
            raise Failure("interrupted", INTERRUPTED) from error
        except Exception as error:
            if ctx.params["traceback"]:
                self._shown = error
                raise
            raise _failure_of(error) from error


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(atman_kernels.__version__, prog_name="atman")
@click.option("--traceback", is_flag=True, help="Show Python's traceback when something fails.")
@click.pass_context
def main(ctx: click.Context, traceback: bool) -> None:
    """Which words of a prompt made a language model answer as it did."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


bench.command.add_command(bench_quality.command)
bench.command.add_command(fit_at2.command)
for _command in (explain.command, steer.command, demo.command, serve.command, doctor.command, bench.command):
    main.add_command(_command)
