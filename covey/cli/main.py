"""The `covey` command: subcommands are imported when they run, so that a client needs no service's packages."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version

import click

from covey.errors import CoveyError

COMMANDS = {
    "up": ("covey.cli.up", "Start the whole mesh on this machine."),
    "demo": ("covey.cli.demo", "Start a mesh, chat, run a workflow twice, print what it cost."),
    "chat": ("covey.cli.chat", "Talk to a model of the running mesh."),
    "run": ("covey.cli.run", "Run a Python file of yours against the mesh."),
    "cache": ("covey.cli.cache", "Look into the semantic cache, void, warm and export it."),
    "init": ("covey.cli.init", "Write the secrets and configuration of a deployment."),
    "bench": ("covey.cli.bench", "Measure the mesh."),
    "codebook": ("covey.cli.codebook", "Train the codebook of a model, for a store that keeps four bits a number."),
    "doctor": ("covey.cli.doctor", "Say what is missing and how to mend it."),
}
BENCH_PACKAGES = {"matplotlib", "psutil", "benchmarks"}
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_MISSING = 3


class LazyGroup(click.Group):
    """A group whose commands are imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("covey"), prog_name="covey")
def covey() -> None:
    """Serve language models to agents.

    Shell completion: eval "$(_COVEY_COMPLETE=bash_source covey)" (or zsh_source, fish_source).
    """


def main() -> None:
    """Run the command line; errors say what to do and set the exit code."""
    try:
        covey(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except CoveyError as error:
        _fail(error.message, EXIT_FAILED)
    except ExceptionGroup as group:
        known = group.subgroup(CoveyError)
        if known is None:
            raise
        _fail(_first(known).message, EXIT_FAILED)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in {"covey", "services"}:
            raise
        extra = "bench" if package in BENCH_PACKAGES else "mesh"
        _fail(f"the package {package!r} is not installed: pip install 'covey[{extra}]'", EXIT_MISSING)


def _first(group: ExceptionGroup[CoveyError]) -> CoveyError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


def _fail(message: str, code: int) -> None:
    click.secho("error: ", fg="red", err=True, nl=False)
    click.echo(message, err=True)
    sys.exit(code)
