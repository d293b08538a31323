"""The README says what is there."""

import re
import subprocess

import pytest
import readme_options
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def paths_of_the_tree():
    """Paths in the code block of "The files": those that are indented lie in the folder above them."""
    block = README.split("## The files\n")[1].split("```")[1]
    folder = ""
    for indent, name in re.findall(r"^( *)(\S+)", block, re.MULTILINE):
        folder = name if not indent and name.endswith("/") else folder if indent else ""
        yield folder + name if indent else name


def test_the_options_table_is_that_of_the_parser():
    assert readme_options.replace(README) == README, "run python tests/readme_options.py"


def test_every_path_of_the_tree_exists():
    paths = list(paths_of_the_tree())
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_file_at_the_top_is_in_the_tree():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: cannot tell the repository's files from others")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {re.sub("/.*", "/", path) for path in listed.split("\0") if path}
    assert top - set(paths_of_the_tree()) == set()


def test_every_link_inside_leads_somewhere():
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        inside = target.startswith("#")
        assert target.startswith("https://") or (target[1:] in anchors if inside else (ROOT / target).exists()), target


def commands(text):
    """Lines that a person types, as they stand in the code blocks, with the lines that they go on in."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    first = r"(?:[A-Z_]+=\S+ )*(?:bash|python|python3|accelerate|hf|pip|sbatch|source|ssh) "
    return [line for block in blocks for line in re.findall(rf"^{first}(?:.*\\\n)*.*$", block, re.MULTILINE)]


@pytest.mark.parametrize("language", ["ja", "zh"])
def test_other_languages_have_the_same_commands_and_link_each_other(language):
    text = (ROOT / f"README_{language}.md").read_text(encoding="utf-8")
    assert len(commands(README)) > 20
    assert commands(text) == commands(README)
    for name in {"README.md", "README_ja.md", "README_zh.md"} - {f"README_{language}.md"}:
        assert f"]({name})" in text
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert pictures == re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
