"""Writes the options of the training script into README.md, as tables between two markers.

python tests/readme_options.py
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_cogvideox_lora

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- options:begin -->\n", "<!-- options:end -->"


class Caught(Exception):
    """The parser is complete and has parsed nothing yet."""


def training_parser() -> argparse.ArgumentParser:
    catch = mock.patch.object(argparse.ArgumentParser, "parse_args", autospec=True, side_effect=Caught)
    with catch as called, suppress(Caught):
        train_cogvideox_lora.parse_args([])
    return called.call_args.args[0]


def default_of(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """Empty where the help text says what happens without the option."""
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
    parser = training_parser()
    tables = []
    for group in parser._action_groups:
        if actions := [action for action in group._group_actions if action.dest != "help"]:
            head = f"**{group.title}**\n\n| option | default | what it does |\n|---|---|---|\n"
            tables.append(head + "".join(f"{row(action, parser)}\n" for action in actions))
    return "\n".join(tables)


def replace(readme: str) -> str:
    """The README with today's options."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}{render()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(replace(README.read_text(encoding="utf-8")), encoding="utf-8")
