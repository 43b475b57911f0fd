"""Programs that measure the method; `python -m experiments.NAME --help` explains bench, ledger,
look, plan, stress and words. They import t1; t1 imports none of them."""

import argparse
import contextlib
import dataclasses
import os

import t1


class Parser(argparse.ArgumentParser):
    """The options of one experiment. What it does not know is an option of t1.py, or with
    t1_options=False a misuse."""

    def __init__(self, name: str, doc: str, t1_options: bool = True):
        self.t1_options = t1_options
        form, prog = argparse.RawDescriptionHelpFormatter, f"python -m experiments.{name}"
        super().__init__(prog=prog, description=doc, formatter_class=form, allow_abbrev=False)

    def error(self, message):
        raise t1.Misuse(message)


def whole_numbers(text: str) -> list[int]:
    """Type of an option: 8,16 -> [8, 16]."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers, separated by commas")
    return [int(part) for part in text.split(",")]


def stage_options(stage: str, options: list[str]) -> list[str]:
    """t1.py's `options` for one stage, as a command line: those that only other stages read are
    left out."""
    others = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in fields_of_others(stage):
        dashed = name.replace("_", "-")
        others.add_argument(*dict.fromkeys((f"--{dashed}", f"--{name}")), nargs="?")
    return [*others.parse_known_args(options)[1], "--stage", stage]


def fields_of_others(stage: str) -> list[str]:
    """Names of the options that only other stages read."""
    fields = dataclasses.fields(t1.Config)
    return [field.name for field in fields if field.metadata["stage"] not in ("", stage)]


@contextlib.contextmanager
def embedded_model(layers: int, width: int):
    """The embedded model has another size inside."""
    usual = t1.TINY
    t1.TINY = dict(layers=layers, width=width)
    try:
        yield
    finally:
        t1.TINY = usual


def answered(rows: list[tuple]) -> list:
    """Rollouts of rows (ids of a prompt, ids of a response)."""
    return [t1.Rollout(t1.Problem({}, prompt), ids=response) for prompt, response in rows]


def run(parser: Parser, work, argv: list[str] | None) -> int:
    """Call work(own, options) with the experiment's options and the list of t1.py's -> exit code. A
    misuse or a failure is one line; remarks of libraries stay off the console."""
    t1.quiet()
    try:
        own, options = parser.parse_known_args(argv)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise t1.Misuse(f"one process, not torchrun: {parser.prog}")
        if options and not parser.t1_options:
            raise t1.Misuse(f"unrecognized arguments: {' '.join(options)}")
        with t1.interrupt:
            return work(own, options) or 0
    except t1.Stop as e:
        return t1.complain(str(e), e.code)
    except OSError as e:
        return t1.complain(f"{e.filename or 'a file'}: {e.strerror or e}", 1)
