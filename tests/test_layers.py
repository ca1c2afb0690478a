"""What must start fast imports no torch. Which package may import which, import-linter checks (pyproject.toml)."""

import subprocess
import sys

import pytest
from commands import write_config


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


def test_a_run_is_checked_without_torch_and_transformers(tiny_model, records, tmp_path):
    config = write_config(tmp_path, tiny_model, records)
    code = (
        "import sys\n"
        "from liftdist import cli, config, preflight\n"
        f"found, _ = config.load({str(config)!r}, [])\n"
        "preflight.check(found, 2, training=True)\n"
        "preflight.fetch(found, training=True)\n"
        "sys.exit(', '.join({'torch', 'transformers', 'datasets'} & {*sys.modules}) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_delta_is_exported_without_transformers_or_fsdp():
    code = (
        "import sys, liftdist.deltas.export, liftdist.deltas.of_run\n"
        "import liftdist.deltas.formats.delta, liftdist.deltas.formats.patch\n"
        "sys.exit('transformers.modeling_utils' in sys.modules or 'torch.distributed.fsdp' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
