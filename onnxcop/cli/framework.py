"""The frame of the command line: a main form beside named commands, and help in sections."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from onnxcop._base.plugins import registered

MAIN = ""  # name of the main form among the commands; no model can have it
_USAGE = "MODEL [-o OUT] [OPTIONS]"

_SHARE = "budgets say what to keep: --macs 0.7 (or --params, --filters) removes 30%"
_ANSWERS = {  # option: (what to write instead, its names in other tools)
    "--macs": (_SHARE, "--ratio --prune-ratio --pruning-ratio --prune --sparsity --amount --rate"),
    "--output": ("give -o FILE", "--out --output-file --out-file --output-path --save --output-model"),
    "--data": ("give --data PATH", "--dataset --calib --calibration --calib-data --calibration-data --images --input"),
    "--keep": ("give --keep PATTERN", "--exclude --ignore --freeze --skip --ignored-layers --exclude-layers --protect"),
    "--only": ("give --only PATTERN", "--include --layers --include-layers"),
    "--multiple-of": ("give --multiple-of 8", "--round-to --round --align --divisor --channel-multiple --multiple"),
    "--provider": ("give --provider cuda, or cpu", "--device --gpu --cuda --cpu --ep"),
    "--target": ("give --target NAME, e.g. cuda-fp16", "--hardware --target-device --arch --platform"),
    "--input-shape": ("give --input-shape NAME:1,3,224,224", "--shape --shapes --input-size --input-shapes"),
    "--criterion": ("give --criterion NAME", "--method --importance --strategy"),
}
_ELSEWHERE = {name: (option, how) for option, (how, names) in _ANSWERS.items() for name in names.split()}
_ELSEWHERE["--flops"] = "--macs", "give --macs 0.7, the share of the multiply-accumulates to keep"


_SPEEDUPS = ("--speedup", "--speed-up", "--speedup-ratio", "--faster")


def _speedup(option: str, args: Sequence[str]) -> str:
    """The error for a speed-up factor: it names the budgets that express the same as a share to keep."""
    words = [part for word in args for part in word.split("=", 1)]
    value = words[words.index(option) + 1] if option in words[:-1] else ""
    try:
        factor = float(value.rstrip("x×"))
    except ValueError:
        factor = 0.0
    share = f"{1 / factor:.3g}" if factor > 1 else "0.8"
    of = f" {value}" if factor > 1 else ""
    return (
        f"No such option '{option}'; budgets say what to keep: for a speed-up{of} measured on this machine give "
        f"--latency {share}, or --macs {share} for as much of the multiply-accumulates"
    )


class SectionOption(click.Option):
    """An option with a heading in the help; its text may be a function that is called when the help is shown."""

    def __init__(self, *names: Any, section: str, help: str | Callable[[], str], **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.section = section
        self._text = help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The names and the help text."""
        self.help = self._text() if callable(self._text) else self._text
        return super().get_help_record(ctx)

    def get_help_extra(self, ctx: click.Context) -> Any:
        """The additions to the help text: defaults, but no bounds of numbers."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


class SectionCommand(click.Command):
    """A command with examples and sections of options in its help; it knows the options of similar tools.

    Args:
        examples: Command lines with what each does, for the help.
    """

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = examples

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; the error for an option of another tool names the option to use instead."""
        written = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name in _SPEEDUPS and any("--latency" in param.opts for param in self.get_params(ctx)):
                raise click.UsageError(_speedup(error.option_name, written), ctx) from None
            equivalent, how = _ELSEWHERE.get(error.option_name, ("", ""))
            if not any(equivalent in param.opts for param in self.get_params(ctx)):
                raise
            raise click.UsageError(f"No such option '{error.option_name}'; {how}", ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, then the options, section by section."""
        write_examples(self.examples, formatter)
        write_sections(self, ctx, formatter)


def write_examples(examples: Sequence[tuple[str, str]], formatter: click.HelpFormatter) -> None:
    """Write command lines, each under a line that says what it does."""
    with formatter.section("Examples"):
        for command, purpose in examples:
            formatter.write(f"{'':{formatter.current_indent}}{purpose}\n{'':{formatter.current_indent + 2}}{command}\n")


def write_sections(
    command: click.Command,
    ctx: click.Context,
    formatter: click.HelpFormatter,
    extra: Sequence[tuple[str, str]] = (),
) -> None:
    """Write a command's options under the headings of their sections, `extra` under the last."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is not None and not isinstance(param, click.Argument):
            sections.setdefault(getattr(param, "section", "Program"), []).append(record)
    last = {"Program": sections.pop("Program", [])}
    last["Program"] += extra
    for title, records in (sections | last).items():
        with formatter.section(title):
            formatter.write_dl(records)


class MainContext(click.Context):
    """The context of a command without a name."""

    @property
    def command_path(self) -> str:
        """The program's name."""
        return self.find_root().command_path


class MainForm(SectionCommand):
    """The command without a name; it shows itself as the whole program."""

    context_class = MainContext

    def get_usage(self, ctx: click.Context) -> str:
        """The program's usage."""
        return ctx.find_root().get_usage()

    def get_help(self, ctx: click.Context) -> str:
        """The program's help."""
        return ctx.find_root().get_help()


class Program(click.Group):
    """A group that passes its arguments to the main form unless the first one names a subcommand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the name of the main form before its arguments."""
        named = args[0] in {*self.commands, "-h", "--help", "--version"} if args else True
        return super().parse_args(ctx, args if named else [MAIN, *args])

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the subcommands."""
        return [name for name in super().list_commands(ctx) if name != MAIN]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command and its arguments."""
        name, command, rest = super().resolve_command(ctx, args)
        return (None if name == MAIN else name), command, rest

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completions of the first word: a command, an option of the main form, or a file."""
        items = super().shell_complete(ctx, incomplete)
        named = {item.value for item in items}
        items += [item for item in self.commands[MAIN].shell_complete(ctx, incomplete) if item.value not in named]
        if not incomplete.startswith("-"):
            items.append(CompletionItem(incomplete, type="file"))
        return items

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write both ways to call the program."""
        formatter.write_usage(ctx.command_path, _USAGE)
        formatter.write_usage(ctx.command_path, "COMMAND [ARGUMENTS] [OPTIONS]", "       ")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the operator rules that other packages register."""
        names = ", ".join(f"{entry.name} ({entry.value})" for entry in registered("onnxcop.operators"))
        if names:
            with formatter.section("Operator rules of other packages"):
                formatter.write_text(names)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write examples and options of the main form, then the subcommands."""
        main = self.commands[MAIN]
        if isinstance(main, MainForm):
            write_examples(main.examples, formatter)
        write_sections(main, ctx, formatter, extra=[("--version", "Show the version and exit.")])
        self.format_commands(ctx, formatter)


class ModelFile(click.Path):
    """The model of the main form; it may not be the name of a command."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        root = ctx.find_root().command if ctx is not None else None
        if isinstance(root, click.Group) and value in root.commands:
            hint = f"put the command first: onnxcop {value} …; a model of that name is ./{value}"
            raise click.UsageError(hint, ctx)
        if isinstance(root, click.Group) and str(value).isidentifier() and not Path(value).exists():
            _no_command(str(value), [name for name in root.commands if name != MAIN], ctx)
        return super().convert(value, param, ctx)


def _no_command(word: str, commands: Sequence[str], ctx: click.Context | None) -> None:
    """Refuse a word that is not a file and looks like a command.

    Raises:
        click.UsageError: The word is close to a command, or names one of other tools.
    """
    if word in ("prune", "run"):
        raise click.UsageError(f"there is no command {word!r}; leave the word out: onnxcop MODEL -o OUT", ctx)
    near = difflib.get_close_matches(word, commands, n=1)
    if near:
        raise click.UsageError(f"there is no command {word!r}; did you mean {near[0]!r}?", ctx)
