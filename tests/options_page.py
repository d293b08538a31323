"""Writes the options of the training script into docs/options.md, as tables between two markers.

python tests/options_page.py
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_cogvideox_lora

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
BEGIN, END = "<!-- options:begin -->\n", "<!-- options:end -->"


class ParserComplete(Exception):
    """Raised in place of parsing, once all options have been added."""


def parser_of(main, *arguments) -> argparse.ArgumentParser:
    """Returns the parser that `main(*arguments)` makes, complete and before it parses anything."""
    catch = mock.patch.object(argparse.ArgumentParser, "parse_args", autospec=True, side_effect=ParserComplete)
    with catch as called, suppress(ParserComplete):
        main(*arguments)
    return called.call_args.args[0]


def default_of(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """Returns the default as text, empty where the help says what happens without the option."""
    if action.required:
        return "required"
    if any(action in group._group_actions for group in parser._mutually_exclusive_groups if group.required):
        return "one of the two"
    if action.nargs == 0:
        return "on" if action.default else "off"
    if action.default is None:
        return ""
    values = action.default if isinstance(action.default, list) else [action.default]
    return f"`{' '.join(map(str, values))}`"


def row(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    choices = f" (one of {', '.join(f'`{choice}`' for choice in action.choices)})" if action.choices else ""
    text = (action.help % {"prog": parser.prog}).replace("|", r"\|")
    return f"| `{action.option_strings[0]}` | {default_of(action, parser)} | {text}{choices} |"


def render() -> str:
    parser = parser_of(train_cogvideox_lora.parse_args, [])
    tables = []
    for group in parser._action_groups:
        if actions := [action for action in group._group_actions if action.dest != "help"]:
            head = f"### {group.title}\n\n| option | default | what it does |\n|---|---|---|\n"
            tables.append(head + "".join(f"{row(action, parser)}\n" for action in actions))
    return "\n".join(tables)


def updated(page: str) -> str:
    """Returns the page with the options that the training script has now."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}{render()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
