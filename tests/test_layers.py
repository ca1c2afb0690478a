"""What must start fast imports no torch. Which package may import which, import-linter checks (pyproject.toml)."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    ["cli", "config", "train", "data.records", "data.tokenised", "cluster.job", "cluster.launcher", "runs.stop"],
)
def test_starts_without_torch(module):
    code = f"import sys, liftdist.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    if module == "train":  # signals are caught before the rest is imported
        code = (
            "import sys; sys.modules['argparse'] = None\n"
            "try: import liftdist.train\n"
            "except ImportError: pass\n"
            "sys.exit('torch' in sys.modules)"
        )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
