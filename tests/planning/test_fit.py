"""What ``train.fit_memory`` chooses, against plans of every choice, and a run that begins so."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import builders
import families
import pytest
import ranks
import torch
from commands import call, run_command, write_config

from liftdist import processes
from liftdist.console import Console
from liftdist.errors import UserError
from liftdist.planning import fit, footprint, plan
from liftdist.runs.context import RunContext
from liftdist.training import memory

CPU = torch.device("cpu")
SIZES = (1, 2, 3)  # of a micro-batch of six sequences on two ranks


@pytest.fixture
def config(tiny_model, tmp_path):
    records = builders.write_records(tmp_path / "records.jsonl")
    return builders.config(tiny_model, records, tmp_path, train=dict(batch_size=6))


def deep(config, folder):
    """With many layers, of which the activations are most of the memory."""
    path = builders.llama(folder / "deep", num_hidden_layers=12)
    model = dataclasses.replace(config.model, path=str(path))
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, max_length=300))


def peaks(config):
    """Of two ranks, by (recomputes, sequences), from plans of their own."""
    found = {}
    for recomputes, size in itertools.product((False, "selective", 2, True), SIZES):
        model = dataclasses.replace(config.model, activation_checkpointing=recomputes)
        train = dataclasses.replace(config.train, micro_batch_size=size)
        found[recomputes, size] = plan.plan(dataclasses.replace(config, model=model, train=train), 1, 2)["peak"]
    return found


def test_the_largest_micro_batch_that_fits_is_chosen(config, tmp_path):
    config = deep(config, tmp_path)
    planned = peaks(config)
    assert planned[True, 3] < planned[2, 3] < planned["selective", 3] < planned[False, 3]
    assert planned[True, 3] < planned[False, 1]

    def chosen(usable):
        requirements, peak = fit.fitting(config, 2, usable)
        assert (peak <= usable) == (usable >= planned[True, 1])
        model, size = requirements.config.model, requirements.config.train.micro_batch_size
        assert peak >= planned[model.activation_checkpointing, size]
        if peak <= usable and model.keep_gathered < 12:
            requirements.keeping(model.keep_gathered + 1)
            assert footprint.peak(requirements.memory(1, 2)) > usable
        return model.activation_checkpointing, size

    assert chosen(planned[False, 3]) == (False, 3)
    assert chosen(planned[False, 3] - 1) == ("selective", 3)
    assert chosen(planned["selective", 3] - 1) == (2, 3)
    assert chosen(planned[2, 3] - 1) == (True, 3)
    assert chosen(planned[True, 3] - 1) == (True, 2)
    assert chosen(planned[True, 1] - 1) == (True, 1)  # and is above what there is
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=fit.BUSY // 2))
    planned = peaks(config)
    assert chosen(planned[False, 2]) == (False, 2)  # which is enough


@pytest.mark.parametrize(
    "given",
    [
        dict(activation_checkpointing="selective"),
        dict(activation_checkpointing=3),
        dict(keep_gathered=2),
        dict(activation_checkpointing=True, keep_gathered=1),
    ],
)
def test_what_is_set_is_kept(given, config):
    config.model = dataclasses.replace(config.model, **given)
    for usable in (1 << 50, 1):
        found = fit.fitting(config, 2, usable)[0].config.model
        assert {key: getattr(found, key) for key in given} == given
    assert found.activation_checkpointing == given.get("activation_checkpointing", True)


def test_layers_that_cannot_keep_products_are_recomputed_otherwise(config, tmp_path):
    config.model.path = str(families.make(tmp_path / "model", "gpt_oss"))
    peak = fit.fitting(config, 2, 1 << 50)[1]
    assert fit.fitting(config, 2, peak // 2)[0].config.model.activation_checkpointing in (2, True)
    config.model.activation_checkpointing = "selective"
    with pytest.raises(UserError, match="^model.activation_checkpointing=selective: "):
        fit.fitting(config, 2, peak // 2)


def test_packing_for_flash_attention_keeps_to_one_sequence(config):
    config.data.packing, config.model.attn_implementation = True, "flash_attention_2"
    assert fit.sizes(config, 2) == [1]
    config.data.packing = False
    config.train.batch_size = 22
    assert fit.sizes(config, 2) == [1, 2, 3, 6, 11]


@pytest.mark.parametrize(
    ("files", "of", "limit"),
    [
        ({"memory.max": "max\n"}, "0::/\n", None),
        ({"memory.max": "1000000\n"}, "0::/\n", 1000000),
        ({"job/step/memory.max": "max\n", "job/memory.max": "2000000\n"}, "0::/job/step\n", 2000000),
        ({"memory/a/memory.limit_in_bytes": "3000000\n"}, "4:memory:/a\n3:cpu:/\n", 3000000),
        ({"memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, "4:memory:/a\n", None),
    ],
)
def test_memory_is_that_of_the_control_groups(files, of, limit, tmp_path):
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "of").write_text(of)
    assert processes.memory(tmp_path / "groups", tmp_path / "of") == (limit or processes.memory(tmp_path, tmp_path))


def test_the_plan_says_what_is_chosen(config, tmp_path):
    path = write_config(tmp_path, config.model.path, config.data.path, train=dict(fit_memory=True))
    code, said = call("plan", path, "--gpus-per-node=2", "--gpu=h100")
    assert code == 0, said
    assert (
        "train.fit_memory: train.micro_batch_size=3 model.activation_checkpointing=false model.keep_gathered=2" in said
    )
    found = json.loads(call("plan", path, "--gpus-per-node=2", "--gpu=h100", "--json")[1])
    assert [*found["fitted"].values()] == [3, False, 2]
    code, said = call("plan", path, "--gpus-per-node=2")
    assert (code, "train.fit_memory: give the memory" in said) == (2, True)


METHODS = {
    "lift": dict(selection=dict(refresh_interval=2)),
    "spiel": dict(selection=dict(criterion="spiel", refresh_interval=2, gradient_batches=1, final_refresh=2)),
    "quantised": dict(model=dict(base_dtype="int8")),
    "asft": dict(train=dict(loss="asft")),
    "full": dict(method="full"),
}


def tried_out_or_not(mesh, config, settings):
    found = []
    for tries in (False, True):
        changed = dataclasses.replace(config, method=settings.get("method", config.method))
        for section, values in settings.items():
            if section != "method":
                given = dataclasses.replace(getattr(config, section), **values)
                changed = dataclasses.replace(changed, **{section: given})
        made = builders.trainer(mesh, changed)
        if tries:
            memory.try_out(RunContext(changed, mesh, Console(False)), made.model, made.method)
        found.append([*(made.run_step()["train/loss"] for _ in range(3)), builders.global_digest(made)])
    return found


@pytest.mark.parametrize("method", METHODS)
def test_what_is_tried_out_leaves_nothing_behind(method, config):
    for without, tried in ranks.run(2, tried_out_or_not, config, METHODS[method]):
        assert without == tried


def out_of_memory(*_):
    torch.empty(1 << 50)


SURVIVING = METHODS | {"lora": dict(method="lora", lora=dict(rank=4))}


class Lacking:
    """A hook of a layer that lacks memory, once."""

    def __init__(self, register):
        self.hook = register(self)

    def __call__(self, *_):
        self.hook.remove()
        out_of_memory()


def survived_or_smaller(mesh, config, settings, phase):
    """Four steps of which the third lacks memory once, and four of which the third and the last are in smaller micro-batches."""
    found = []
    for fails in (True, False):
        changed = dataclasses.replace(config, method=settings.get("method", config.method))
        for section, values in (settings | {"train": {"fit_memory": True} | settings.get("train", {})}).items():
            if section != "method":
                given = dataclasses.replace(getattr(changed, section), **values)
                changed = dataclasses.replace(changed, **{section: given})
        made = builders.trainer(mesh, changed)
        losses = [made.run_step()["train/loss"] for _ in range(2)]
        if fails:
            first, second = made.model.model.layers[:2]
            Lacking(first.register_full_backward_hook if phase == "backward" else second.register_forward_hook)
        else:
            made.config = dataclasses.replace(changed, train=dataclasses.replace(changed.train, micro_batch_size=2))
        losses.append(made.run_step()["train/loss"])
        said = made.problem
        losses.append(made.run_step()["train/loss"])
        found.append((losses, builders.global_digest(made), said))
    return found


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize(
    "method", [m if m in ("lift", "full") else pytest.param(m, marks=pytest.mark.slow) for m in SURVIVING]
)
def test_a_step_of_one_rank_that_lacks_memory_is_done_again(method, phase, config):
    config.train.micro_batch_size = 3
    (((losses, digest, said), (expected, same, nothing)),) = ranks.run(
        1, survived_or_smaller, config, SURVIVING[method], phase
    )
    assert said == "step 3: memory ran out; done again, as all that follow, with train.micro_batch_size=2"
    assert (losses, digest, nothing) == (expected, same, None)


def with_too_much(mesh, config):
    """What is planned at first, and then, after the ranks have lacked memory with it, again and again."""
    found = []
    for _ in range(3):
        planned = fit.to_memory(config, mesh, Console(False))
        found.append(memory.choice(planned))
        if mesh.rank == 1:
            goes_on = pytest.raises(
                torch.OutOfMemoryError, match="^the same command goes on with the next smaller plan"
            )
            with goes_on, memory.explained(planned, mesh.device):
                out_of_memory()
        torch.distributed.barrier()
    processes.memory = lambda: 1 << 50  # of another machine
    found.append(memory.choice(fit.to_memory(config, mesh, Console(False))))
    return found


def test_several_ranks_that_lacked_memory_begin_again_with_a_smaller_plan(config):
    Path(config.run_dir).mkdir()
    config.train.fit_memory = True
    first, *others = ranks.run(2, with_too_much, config)
    assert [first] == others
    planned = [footprint.peak(fit.Requirements(memory.chosen_in(config, chosen)).memory(1, 2)) for chosen in first]
    assert planned[0] > planned[1] > planned[2] > 0
    assert first[3] == first[0]


def test_a_run_begins_with_what_fits(config, tmp_path):
    path = write_config(tmp_path, config.model.path, config.data.path, train=dict(steps=2, eval_interval=0))
    ended = run_command("train", path, "--nproc", "2", "train.fit_memory=true", f"run_dir={tmp_path / 'fitted'}")
    assert ended.returncode == 0, ended.stdout
    chosen = "train.micro_batch_size=3 model.activation_checkpointing=false model.keep_gathered=2"
    assert f"train.fit_memory: {chosen}: planned" in ended.stdout
    assert "the largest micro-batch, 3 x 64 tokens, fits" in ended.stdout
    given = run_command("train", path, "--nproc", "2", "train.micro_batch_size=3", f"run_dir={tmp_path / 'given'}")
    assert given.returncode == 0, given.stdout
    fitted, given = (next(tmp_path.glob(f"{run}/export/*.safetensors")).read_bytes() for run in ("fitted", "given"))
    assert fitted == given


def on_a_small_machine(mesh, config):
    processes.memory = lambda: memory.LIBRARIES + 2**20
    with pytest.raises(UserError) as refused:
        fit.to_memory(config, mesh, Console(False))
    return str(refused.value)


def test_what_does_not_fit_beside_what_is_set_is_refused_with_it(config):
    config.model.keep_gathered = 2
    for said in ranks.run(2, on_a_small_machine, config):
        assert "one sequence with model.keep_gathered=2, which it chooses if left out; liftdist plan" in said


def test_what_does_not_fit_is_refused(config):
    for said in ranks.run(2, on_a_small_machine, config):
        assert re.match(
            r"train.fit_memory: a rank has 0\.00 GiB, and needs \S+ GiB even for micro-batches of one sequence whose",
            said,
        )


def test_an_error_about_memory_says_what_takes_it_and_the_next_smaller_plan(config):
    parts = fit.Requirements(config).memory(1, 2)
    with pytest.raises(torch.OutOfMemoryError) as raised, fit.itemised(config, 2):
        raise torch.OutOfMemoryError("full")
    found = re.match(r"planned (.*); with train.micro_batch_size=1 \S+ in place of \S+ GiB in all; ", str(raised.value))
    named = [part.rsplit(" ", 2)[0] for part in re.split(r"(?<=GiB), ", found[1])]
    assert [parts[name] for name in named] == sorted(parts.values())[:-4:-1]
    config.train.micro_batch_size = 1
    assert "; with model.activation_checkpointing=true " in fit.largest(config, 2)
    config.model.activation_checkpointing = True
    assert "; with" not in fit.largest(config, 2)
    config.model.path = "no-such-folder"  # there is no plan
    with pytest.raises(torch.OutOfMemoryError, match="^full$"), fit.itemised(config, 2):
        raise torch.OutOfMemoryError("full")


def test_an_error_about_memory_says_what_helps(config):
    helps = "lower train.micro_batch_size=2, set model.activation_checkpointing=true or set train.fit_memory=true; liftdist plan"
    with (
        pytest.raises(torch.OutOfMemoryError, match=f"^{helps} .*can't allocate memory"),
        memory.explained(config, CPU),
    ):
        torch.empty(1 << 50)
    config.model.activation_checkpointing = True
    without = "lower train.micro_batch_size=2 or set train.fit_memory=true; liftdist plan"
    with (
        pytest.raises(torch.OutOfMemoryError, match=f"^{without} .*can't allocate memory"),
        memory.explained(config, CPU),
    ):
        torch.empty(1 << 50)  # on the host, where offloading saves nothing
    helps = (
        "lower train.micro_batch_size=2, set model.offload_activations=true or set train.fit_memory=true; liftdist plan"
    )
    with pytest.raises(torch.OutOfMemoryError, match=f"^{helps} .*full"), memory.explained(config, CPU):
        raise torch.OutOfMemoryError("full")
    with pytest.raises(RuntimeError, match="^another$"), memory.explained(config, CPU):
        raise RuntimeError("another")
