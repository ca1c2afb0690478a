"""Runs a module of the package that this file lies in: ``python -P LIFTDIST/start.py liftdist.train ...``

``python -m`` looks into the current folder first, where another checkout may lie, or somebody's ``random.py``.
"""

import importlib.util
import runpy
import sys
from pathlib import Path


def main() -> None:
    """The first argument is the name of the module, the others are its own."""
    package = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        package.name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[package.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[package.name])
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
