"""The documents say what is there: links, commands, options, names and messages of every page."""

import ast
import importlib
import itertools
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import draw_modes
import options_page
import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from test_options import launched

import cli_demo
import lora
import train_cogvideox_lora
from clips import check, clean, export
from pages import preview, report

DOORS = ["README.md", "README_ja.md", "README_zh.md"]
PAGES = [
    *DOORS, "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
    "benchmarks/GPU_TODO.md", "benchmarks/NOTES.md",
]  # fmt: skip
TODAY = [page for page in PAGES if page != "CHANGELOG.md"]  # pages about what is there now, not about what was
WINGS = ["clips", "cogvideox", "run", "pages"]
STARTS_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:bash|python3?|accelerate|hf|pip|sbatch|source|ssh) ")


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def code_blocks(text):
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def prose(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(text):
    """Lines that a person types, as they are in the code blocks, with the lines on which they continue."""
    lines = [line for block in code_blocks(text) for line in re.findall(r"(?:.*\\\n)*.*\n", block)]
    return [line.rstrip("\n") for line in lines if STARTS_COMMAND.match(line)]


def tracked_files():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: cannot tell the repository's files from others")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in listed.split("\0") if path]


# ---- links -----------------------------------------------------------------------------------------------------------


def anchors(text):
    """The anchors that GitHub gives to the headings of a page, `-1` behind the second of one name."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    names = [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain]
    return [f"{name}-{names[:i].count(name)}" if name in names[:i] else name for i, name in enumerate(names)]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = read(page)
    for target in re.findall(r"\]\(([^)]+)\)", prose(text)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_every_page_is_reached_from_the_readme_and_leads_back():
    for path in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{path.name}" in read("README.md"), path.name
        assert "](../README.md)" in read(f"docs/{path.name}"), path.name


# ---- commands --------------------------------------------------------------------------------------------------------


def split(command):
    """Returns (variables, words) of a command."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    variables = list(itertools.takewhile(re.compile(r"[A-Z_]+=").match, words))
    return dict(variable.split("=", 1) for variable in variables), words[len(variables) :]


def parse_training(words):
    assert train_cogvideox_lora.parse_args(words).pretrained_model_name_or_path


def run_script(script, words, variables, tmp_path):
    assert (ROOT / script).is_file(), script
    if script == "examples/slurm.sh":
        script = "finetune_multi_gpus_1.sh"
    if script.startswith("finetune_"):
        launched(tmp_path, script, *words, **variables)


def run_python(words):
    if words[:1] == ["-m"]:
        assert words[1] in ("venv", "pages.report"), words
        return report_parser().parse_args(words[2:]) if words[1] == "pages.report" else None
    script, *rest = words
    assert (ROOT / script).is_file(), script
    if script == "train_cogvideox_lora.py":
        return parse_training(rest)
    if script == "cli_demo.py":
        return cli_demo.parse_args(rest)
    if script == "lora.py":
        return lora.parse_args(rest)
    if script == "dataset.py":
        program = {"preview": preview, "check": check, "export": export}[rest[0]]
        return program.parse_args(rest[1:])
    return parser_of_script(script).parse_args(rest)


def report_parser():
    return options_page.parser_of(report.main, [])


@cache
def parser_of_script(script):
    """The parser of a script in benchmarks/, examples/ or tests/."""
    main = importlib.import_module(Path(script).stem).main
    return options_page.parser_of(main, *([[]] if main.__code__.co_argcount else []))


COMMANDS = [(page, command) for page in TODAY for command in commands(read(page))]


@pytest.mark.parametrize("page, command", COMMANDS, ids=[f"{page}: {command:.70}" for page, command in COMMANDS])
def test_every_command_names_existing_files_and_parses(page, command, tmp_path):
    variables, (program, *words) = split(command)
    if program == "accelerate":
        launch = launch_command_parser().parse_args(words[1:])
        assert (ROOT / launch.config_file).is_file() and launch.training_script == "train_cogvideox_lora.py"
        parse_training(launch.training_script_args)
    elif program in ("bash", "sbatch"):
        run_script(words[0], words[1:], variables, tmp_path)
    elif program in ("python", "python3"):
        if words != ["tests/options_page.py"]:
            run_python(words[: words.index("&&")] if "&&" in words else words)
    elif program == "pip":
        assert words[0] == "install" and (words[1] != "-r" or (ROOT / words[2]).is_file())
    else:
        assert program == "hf"


def test_the_pages_have_the_commands_that_they_are_for():
    assert len(commands(read("README.md"))) >= 10
    options = read("docs/options.md").replace("\\\n ", "")
    assert "accelerate launch --config_file accelerate_config_machine_single.yaml train_cogvideox_lora.py " in options
    several = read("docs/several-gpus.md")
    assert "--config_file accelerate_config_machine_single.yaml --multi_gpu" in several


@cache
def known_options():
    scripts = ["preprocess", "step", "table", "versus", "quality", "same_bits"]
    scripts += ["compare", "make_example", "make_film", "pretrain"]
    mains = [train_cogvideox_lora.parse_args, cli_demo.parse_args, preview.parse_args, report.main]
    mains += [check.parse_args, export.parse_args, clean.parse_args]
    parsers = [options_page.parser_of(main, []) for main in mains] + [parser_of_script(name) for name in scripts]
    known = {option for parser in [*parsers, launch_command_parser()] for option in parser._option_string_actions}
    suite = set(re.findall(r"--\w+", read("benchmarks/prove.sh")))
    return known | suite | {"--nodes"}  # sbatch's


@pytest.mark.parametrize("page", TODAY)
def test_every_option_that_a_page_names_exists(page):
    code = " ".join(re.findall(r"`([^`\n]+)`", prose(read(page))))
    for option in re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)*", code):
        known = any(name.startswith(option) for name in known_options()) if option.endswith("_") else (
            option in known_options()
        )  # fmt: skip
        assert known, option


def test_the_options_page_is_that_of_the_parser():
    page = read("docs/options.md")
    assert options_page.updated(page) == page, "run python tests/options_page.py"


# ---- names -----------------------------------------------------------------------------------------------------------


def code_words(text):
    """What is marked as code in the prose, without commands."""
    return [word for word in re.findall(r"`([^`\n]+)`", prose(text)) if not STARTS_COMMAND.match(word)]


@pytest.mark.parametrize("page", TODAY)
def test_every_path_that_a_page_names_exists(page):
    ours = re.compile(rf"(?:docs|benchmarks|examples|tests|\.ci|{'|'.join(WINGS)})/[\w./-]+")
    for word in code_words(read(page)):
        if ours.fullmatch(word) and not word.startswith(("examples/world/", "examples/cogvideo/")):
            assert (ROOT / word).exists(), word


def test_every_file_that_the_house_names_exists_and_every_top_level_one_is_named():
    words, tracked = code_words(read("docs/house.md")), tracked_files()
    files = {word for word in words if re.fullmatch(r"[\w.-]+\.(py|sh|md|yaml|txt|toml|jinja|png|svg)", word)}
    missing = files - {Path(path).name for path in tracked} - {"utils.py"}
    assert missing == set() and len(files) > 20
    top = {re.sub("/.*", "/", path) for path in tracked}
    assert top - set(words) == set()


def test_the_picture_of_the_house_has_every_module_of_the_ladder():
    drawn = re.findall(r"[\w/]+\.py|\w+/(?=<)", read("docs/house.svg"))
    modules = {path.name for wing in WINGS for path in (ROOT / wing).glob("*.py") if path.name != "__init__.py"}
    others = {"benchmarks/", "train_cogvideox_lora.py", "dataset.py", "files.py", "cli_demo.py", "cogvideox/"}
    assert set(drawn) == modules | others | {f"{wing}/" for wing in WINGS}


def defined(path):
    """Names that a module defines at its top, options included."""
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def rows_of(text, heading):
    """Cells of the table below a heading, the head left out."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_to_change_something_two_files_are_enough_and_they_define_what_is_named():
    rows = [row for row in rows_of(read("docs/house.md"), "To change X, edit Y") if row[1]]
    assert len(rows) > 30
    for what, edit in rows:
        words = code_words(edit)
        files = [word for word in words if (ROOT / word).is_file()]
        assert len(files) <= 2, what
        names = [word for word in words if re.fullmatch(r"[A-Za-z_]\w+", word)]
        known = {name for file in files if file.endswith(".py") for name in defined(file)}
        assert set(names) <= known, (what, set(names) - known)


# ---- messages --------------------------------------------------------------------------------------------------------


def texts_of(path):
    """Every string of a module, `...` where a value is filled in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_message_that_is_explained_is_one_of_ours():
    files = [*ROOT.glob("*.py"), *(path for wing in WINGS for path in (ROOT / wing).glob("*.py"))]
    ours = [text for path in files for text in texts_of(path)]
    ours.append(read(".ci/environment.sh"))
    ours.append("not allowed with argument --instance_data_root")  # argparse's words for our two sources
    page = read("docs/troubleshooting.md").split("## Messages of others")[0]
    messages = [line.split("|")[1].strip().strip("`") for line in page.splitlines() if line.startswith("| `")]
    assert len(messages) > 15
    for message in messages:
        pattern = ".*".join(re.escape(part) for part in message.split("..."))
        assert any(re.search(pattern, text, re.DOTALL) for text in ours), message


# ---- the door and its translations -----------------------------------------------------------------------------------


def test_the_door_is_small():
    assert len((ROOT / "README.md").read_bytes()) <= 15_360
    for language in ("ja", "zh"):
        assert len((ROOT / f"README_{language}.md").read_bytes()) <= 22_000, language


@pytest.mark.parametrize("page", DOORS[1:])
def test_other_languages_have_the_same_commands_pictures_and_links(page):
    english, text = read("README.md"), read(page)
    assert commands(text) == commands(english)
    pictures = r"!\[[^]]*\]\(([^)]+)\)"
    assert re.findall(pictures, text) == re.findall(pictures, english)
    for name in set(DOORS) - {page}:
        assert f"]({name})" in text
    theirs, ours = (re.findall(r"\]\(([^)]+)\)", prose(each)) for each in (text, english))
    assert sorted(set(theirs) - set(DOORS)) == sorted(set(ours) - set(DOORS))
    assert len(theirs) == len(ours)


def test_ruff_before_a_commit_is_ruff_in_the_tests():
    pinned = re.search(r"^ruff==(\S+)$", read("requirements-dev.txt"), re.MULTILINE)[1]
    assert f"rev: v{pinned}\n" in read(".pre-commit-config.yaml")


@pytest.mark.parametrize("path", draw_modes.PICTURES_OF_PAGE)
def test_the_pictures_of_sizes_and_windows_are_what_the_script_draws(path):
    assert read(path) == draw_modes.PICTURES_OF_PAGE[path]()
