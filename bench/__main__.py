import runpy
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if "\ndef main(" in path.read_text())

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        usage = f"python -m bench {{{','.join(NAMES)}}} [options]; each has --help"
        print(usage, file=sys.stdout if (asked := sys.argv[1:] in (["-h"], ["--help"])) else sys.stderr)
        sys.exit(0 if asked else 2)
    name = sys.argv.pop(1)
    runpy.run_module(f"bench.{name}", run_name="__main__")
