"""Programs that measure the method; `python -m experiments.NAME --help` explains each."""

import argparse
import dataclasses
import functools
import os

import t1


class Parser(argparse.ArgumentParser):
    """The options of one experiment; what it does not know may be an option of t1.py."""

    def __init__(self, name: str, doc: str):
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
    """A command line of one stage: t1.py's `options` without those that only other stages read."""
    others = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for field in dataclasses.fields(t1.Config):
        if stage not in (field.metadata["stage"] or stage):
            names = {f"--{field.name.replace('_', '-')}", f"--{field.name}"}
            others.add_argument(*names, nargs="?")
    return [*others.parse_known_args(options)[1], "--stage", stage]


def program(main):
    """Decorator of main(argv) -> exit code (None: 0). A misuse or a failure is one line."""

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> int:
        t1.quiet()
        try:
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise t1.Misuse("an experiment is one process: without torchrun")
            with t1.interrupt:
                return main(argv) or 0
        except t1.Stop as e:
            return t1.complain(str(e), e.code)
        except OSError as e:
            return t1.complain(f"{e.filename or 'a file'}: {e.strerror or e}", 1)

    return guarded
