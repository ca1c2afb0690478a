"""``liftdist report``: what is refused is refused before torch and the libraries for pages are imported."""

from __future__ import annotations

import argparse
import importlib.util

from liftdist import files
from liftdist.errors import UserError
from liftdist.report import read

FIRST = "<!doctype html>\n<!-- liftdist report -->\n"  # begins every page
NEEDS = "report needs the libraries matplotlib and jinja2: pip install 'liftdist[report]'"


def write(options: argparse.Namespace) -> None:
    """Write the page of ``options.run_dirs`` to ``options.output``. Raises ``UserError``."""
    if not options.seconds >= 0:
        raise UserError(f"--seconds {options.seconds}: must be at least 0")
    if options.base is not None and not options.base.is_dir():
        raise UserError(f"--base {options.base}: no such folder")
    if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "jinja2")):
        raise UserError(NEEDS)
    files.check_page(options.output, FIRST, "`liftdist report`", "--output")
    runs = read.read_all(options.run_dirs)
    from liftdist.report import page

    files.write_page(options.output, FIRST + page.render(runs, options.base, options.seconds), "--output")
