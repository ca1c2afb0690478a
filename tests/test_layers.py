"""What must start fast imports no torch."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["cli", "config", "data.tokenised", "cluster.job", "runs.watchdog"])
def test_starts_without_torch(module):
    code = f"import sys, liftdist.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
