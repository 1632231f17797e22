"""The command line: `atman explain | steer | demo | doctor | bench`.

Exit codes: 0 done, 1 unexpected failure, 2 wrong usage or input, 3 this model or backend cannot do it, 130 interrupted.
Results go to standard output, messages and progress to standard error. Whatever takes long to import is imported
inside the commands, so that `atman --help` answers at once.
"""

from typing import Any

import click

import atman_kernels
from atman_kernels.cli import bench, bench_quality, demo, doctor, explain, steer
from atman_kernels.errors import BackendUnavailableError, InputError, UnsupportedModelError

UNEXPECTED, WRONG_INPUT, UNSUPPORTED, INTERRUPTED = 1, 2, 3, 130


def _failure(message: str, exit_code: int) -> click.ClickException:
    """One line on standard error and an exit code."""
    failure = click.ClickException(" ".join(message.split()))
    failure.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance
    return failure


def _failure_of(error: Exception) -> click.ClickException:
    if isinstance(error, InputError):
        return _failure(str(error), WRONG_INPUT)
    if isinstance(error, UnsupportedModelError | BackendUnavailableError):
        return _failure(str(error), UNSUPPORTED)
    return _failure(f"{type(error).__name__}: {error} (atman --traceback … shows where)", UNEXPECTED)


class _Commands(click.Group):
    """A group whose commands fail in one line, unless the traceback is asked for."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else ctx.command_path
            raise _failure(f"{error.format_message()} ({path} --help shows how)", WRONG_INPUT) from error
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except (KeyboardInterrupt, click.Abort) as error:
            raise _failure("interrupted", INTERRUPTED) from error
        except Exception as error:
            if ctx.params["traceback"]:
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
for _command in (explain.command, steer.command, demo.command, doctor.command, bench.command):
    main.add_command(_command)
