"""Settings of adapters that contradict one another are refused, with the remedy."""

import pytest

from liftdist import config as configs
from liftdist.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["lora.eva.rho=1"], "lora.eva: is used by lora.variant=eva alone; leave it out"),
        (["lora.variant=eva", "lora.eva.rho=0.5"], "lora.eva.rho: must be at least 1"),
        (["lora.variant=eva", "train.loss=asft"], "train.loss: cannot be asft with lora.variant=eva"),
        (["lora.adalora.tinit=4"], "lora.adalora: is used by lora.variant=adalora alone; leave it out"),
        (["lora.variant=adalora", "lora.adalora.target_r=8"], "lora.adalora.target_r: must be less than lora.rank=8, got 8"),
        (["lora.variant=adalora", "lora.rank=1"], "lora.adalora.target_r: must be less than lora.rank=1, got 1"),
        (["lora.variant=bone"], "bone is called miss, as in peft: use lora.variant=miss"),
        (["lora.variant=supertuning"], "supertuning trains single weights, as method=lift does: use"),
        (["lora.miss_init=bat"], "lora.miss_init: is used by lora.variant=miss alone; unset it: lora.miss_init="),
        (["lora.variant=miss", "lora.miss_init=mini"], "lora.mini_r: must be given with lora.miss_init=mini"),
        (["lora.variant=miss", "lora.mini_r=4"], "lora.mini_r: must be given with lora.miss_init=mini, and with nothing else"),
        (["lora.variant=miss", "lora.alpha=16"], "lora.alpha: is not used by lora.variant=miss; leave it out"),
        (["lora.variant=miss", "lora.miss_init=bat", "lora.dropout=0.1"], "lora.dropout: is not used by bat"),
        (["lora.variant=shira", "lora.dropout=0.1"], "lora.dropout: is not used by shira"),
        (["lora.variant=dor"], "did you mean dora"),
        (["lora.pissa_niter=4"], "lora.pissa_niter: is used by lora.variant=pissa alone"),
        (["lora.rank=0"], "lora.rank: must be at least 1"),
        (["lora.modules=[a]", "selection.modules=[b]"], "lora.modules: is given, and selection.modules, too"),
        (["optimizer.name=sgd"], "optimizer.name: must be adamw with method=lora"),
        (["train.loss=asft", "lora.variant=pissa"], "train.loss: needs the values of the base model, which lora.variant=pissa"),
        (["optimizer.decay_towards=base", "optimizer.weight_decay=0.1"], "optimizer.decay_towards: must be zero with"),
    ],
)  # fmt: skip
def test_settings_that_it_has_not_are_refused(overrides, problem, tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: r\nmethod: lora\nmodel: {path: m}\ndata: {path: d}\n")
    with pytest.raises(UserError) as caught:
        configs.load(tmp_path / "config.yaml", overrides)
    assert problem in str(caught.value)
