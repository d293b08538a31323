"""Fills the templates of pages: each page is one file that opens from disk and loads nothing from anywhere."""

from pathlib import Path

import jinja2

FOLDER = Path(__file__).parent


def load_template(name: str) -> jinja2.Template:
    """Returns a template, which escapes all text and refuses a value that is missing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template(name)
