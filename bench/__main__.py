import runpy
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if "\ndef main(" in path.read_text())

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"python -m bench {{{','.join(NAMES)}}} [options]")
    name = sys.argv.pop(1)
    runpy.run_module(f"bench.{name}", run_name="__main__")
