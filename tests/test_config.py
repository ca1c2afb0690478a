import dataclasses

import pytest
from omegaconf import OmegaConf

from liftdist import config as configs
from liftdist import data_settings, evaluation_settings, schema, schema_tree
from liftdist.errors import UserError
from liftdist.schema import Config

MINIMAL = """\
run_dir: runs/x
model:
  path: some/model
data:
  path: x.jsonl
selection:
  density: 0.05
"""


def load(tmp_path, text=MINIMAL, overrides=()):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return configs.load(path, overrides)


def test_defaults_file_and_overrides_in_that_order(tmp_path):
    config, _ = load(
        tmp_path, MINIMAL + "train: {batch_size: 8, seed: 1}\n", ["train.batch_size=32", "optimizer.lr=3e-4"]
    )
    assert (config.train.batch_size, config.train.seed, config.train.micro_batch_size) == (32, 1, 4)
    assert config.optimizer.lr == 3e-4


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.stpes=3", "unknown key 'train.stpes'; did you mean 'train.steps'?"),
        ("density=0.1", "did you mean 'selection.density'?"),
        ("optimizer.lr=nan", "optimizer.lr: must be a finite number, got nan"),
        ("optimizer.lr=abc", "could not be converted to Float"),
        ("optimizer.lr=0", "must be above 0"),
        ("train.batch_size=1.5", "could not be converted to Integer"),
        ("train.batch_size=true", "could not be converted to Integer"),
        ("train.batch_size=0", "must be at least 1, got 0"),
        ("selection.density=1.2", "must be at most 1, got 1.2"),
        ("selection.density=null", "set exactly one of selection.density and selection.budget_rank, got neither"),
        ("selection.budget_rank=8", "set exactly one of selection.density and selection.budget_rank, got both"),
        ("model.dtype=bf16", "must be one of bfloat16, float32 (did you mean bfloat16?), got 'bf16'"),
        ("optimizer.betas=[0.9]", "must be two numbers"),
        ("optimizer.betas=[0.9, 1.0]", "must be below 1, got 1.0"),
        ("selection.modules=[]", "at least one pattern"),
        ("model=3", "model: is a section; give one of its settings, model.NAME=VALUE"),
        ("selection.modules=*.mlp.*", """must be a list, in quotes for the shell: selection.modules='["*.mlp.*"]'"""),
        ("run_dir=", "run_dir: must not be empty"),
        ("data.path=${oc.env:NO_SUCH_VARIABLE}", "'NO_SUCH_VARIABLE' not found"),
        ("train.seed=99999999999999999999", "must be at most 4294967295"),
        ("nonsense", "expected key=value"),
    ],
)
def test_bad_overrides_are_one_line(tmp_path, override, problem):
    with pytest.raises(UserError) as caught:
        load(tmp_path, overrides=[override])
    assert problem in str(caught.value)
    assert f"override {override!r}" in str(caught.value) or "set exactly one" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (MINIMAL + "trian:\n  steps: 3\n", "config.yaml:8: unknown key 'trian'; did you mean 'train'?"),
        (
            MINIMAL + "train:\n  batchsize: 3\n",
            "config.yaml:9: unknown key 'train.batchsize'; did you mean 'train.batch_size'?",
        ),
        (MINIMAL + "train:\n  steps: many\n", "config.yaml:9: train.steps: "),
        (MINIMAL + "train:\n  steps: -1\n", "config.yaml:9: train.steps: must be at least 1, got -1"),
        (MINIMAL + "train: [\n", "config.yaml:9: not YAML"),
        (
            MINIMAL.replace("  path: x.jsonl\n", "  split: train\n"),
            "data.path: must be given, in the file or as data.path=VALUE",
        ),
        ("", "config.yaml: is empty"),
        ("- a\n", "must hold settings, one name: value a line"),
        (MINIMAL + "train: 3\n", "config.yaml:8: train must hold settings"),
        (MINIMAL + "train:\n  seed: 1\n  seed: 2\n", "config.yaml:10: found duplicate key seed"),
    ],
)
def test_bad_files_name_the_line(tmp_path, text, problem):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml: No such file"):
        configs.load(tmp_path / "nowhere.yaml")


def test_secrets_are_neither_kept_nor_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAIN_NAME", "value-from-env")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("ODD_SECRET", 'it\'s "odd" \\ ü')
    _, text = load(tmp_path, overrides=['data.subset=it\'s "odd" \\ ü'])
    assert "odd" not in text
    assert "<ODD_SECRET>" in text
    config, text = load(tmp_path, overrides=["model.path=${oc.env:PLAIN_NAME}", "run_dir=runs/hf_secret"])
    assert config.model.path == "value-from-env"
    assert "value-from-env" not in text
    assert "hf_secret" not in text
    with pytest.raises(UserError) as caught:
        load(tmp_path, overrides=["optimizer.lr=${oc.env:PLAIN_NAME}"])
    assert "value-from-env" not in str(caught.value)


def test_what_nothing_reads_is_known(tmp_path):
    given = [
        "train.eval_interval=5",
        "sync.keep=3",
        "data.eval_split=dev",
        "eval.interval=2",
        "slurm.container_mounts=[/a]",
    ]
    config, _ = load(tmp_path, overrides=given)
    assert config.unused() == {
        "without held-out data": ["train.eval_interval=5"],
        "without sync.to": ["sync.keep=3"],
        "without data.eval_path": ["data.eval_split=dev"],
        "without eval.tasks": ["eval.interval=2"],
        "without slurm.container": ["slurm.container_mounts=['/a']"],
    }
    used = ["data.eval_path=e", "sync.to=s", "eval.tasks=[gsm8k]", "slurm.container=i"]
    config, _ = load(tmp_path, overrides=[*given, *used])
    assert config.unused() == {}
    config, _ = load(
        tmp_path, overrides=["method=full", "selection.modules=[a]", "selection.filter_rank=3", "lora.rank=2"]
    )
    assert config.unused() == {"by method=full": ["selection.density=0.05", "selection.filter_rank=3", "lora.rank=2"]}
    overrides = ["selection.criterion=magnitude", "selection.filter_rank=3", "selection.method=exact"]
    config, _ = load(tmp_path, overrides=overrides)
    assert config.unused() == {
        "by selection.criterion=magnitude": ["selection.filter_rank=3", "selection.method=exact"]
    }
    config, _ = load(tmp_path, overrides=["selection.density=", "selection.budget=half", "selection.filter_rank=3"])
    assert config.unused() == {"by selection.budget=half": ["selection.filter_rank=3"]}
    file = ["selection.density=", "selection.criterion=file", "selection.file=f"]
    config, _ = load(tmp_path, overrides=[*file, "selection.refresh_interval=3"])
    assert config.unused() == {"by selection.criterion=file": ["selection.refresh_interval=3"]}
    config, _ = load(tmp_path, overrides=["method=lora", "selection.density=", "mesh.sparse_reduce_scatter=false"])
    assert config.unused() == {"by method=lora": ["mesh.sparse_reduce_scatter=False"]}
    with pytest.raises(UserError, match=r"train.fit_memory: must be false with selection.criterion=file"):
        load(tmp_path, overrides=[*file, "train.fit_memory=true"])
    for gathering in (["selection.budget=ist", "selection.layers=1"], ["selection.criterion=gradient"]):
        with pytest.raises(
            UserError, match=r"train.fit_memory: must be false with selection.(budget|criterion)=\w+: its batches"
        ):
            load(tmp_path, overrides=[*gathering, "train.fit_memory=true"])
    with pytest.raises(UserError, match="model.base_dtype: must be one of int8, fp8, nf4: bfloat16 is .* leave it out"):
        load(tmp_path, overrides=["model.base_dtype=bfloat16"])
    with pytest.raises(UserError, match=r"selection.exclude: leaves weights alone with method=lift only: method=full"):
        load(tmp_path, overrides=["method=full", "selection.exclude=[a.delta]"])


def test_layouts():
    mesh = schema.MeshConfig
    assert mesh().layout(6) == (1, 6)
    assert mesh(dp_replicate=2).layout(6) == (2, 3)
    for bad in (mesh(dp_replicate=4), mesh(dp_replicate=12)):
        with pytest.raises(UserError, match="6 ranks cannot be"):
            bad.layout(6)


def test_every_setting_is_explained():
    for key, leaf in schema_tree.settings(Config):
        assert leaf.metadata["help"], key
    of_lists = [*dataclasses.fields(data_settings.DataConfig), *dataclasses.fields(evaluation_settings.EvalConfig)]
    lists = [leaf.metadata["help"] for leaf in of_lists if "ources" in leaf.name or leaf.name == "tasks"]
    assert len(lists) == 3
    assert all(lists)
    keys = [key for key, _ in schema_tree.settings(Config)]
    assert len(keys) == len(set(keys))
    defaults = OmegaConf.to_container(OmegaConf.structured(Config))
    for key in _leaves(defaults):
        assert key in keys or any(name.startswith(f"{key}.N.") for name in keys), key


def _leaves(tree, prefix=""):
    """Dotted keys of a tree's values that are no mapping."""
    for name, value in tree.items():
        yield from _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
