"""What trainers of transformers and TRL need in tests: ranks as torchrun starts them, data, arguments, a tokenizer."""

import os
import random

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from reference import DenseLift, linear_of
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

STEPS, REFRESH, BATCH, LR = 6, 3, 8, 5e-3
LIFT = dict(density=0.05, filter_rank=4)


def samples(count=BATCH * STEPS, seed=0):
    """Token ids of several lengths; the labels leave out a prompt."""
    draw = random.Random(seed)
    ids = [[draw.randrange(3, 257) for _ in range(draw.randrange(6, 15))] for _ in range(count)]
    return [dict(input_ids=one, labels=[-100] * 3 + one[3:]) for one in ids]


def pad(batch):
    longest = max(len(one["input_ids"]) for one in batch)

    def column(key, filler):
        return torch.tensor([one[key] + [filler] * (longest - len(one[key])) for one in batch])

    mask = [[1] * len(one["input_ids"]) + [0] * (longest - len(one["input_ids"])) for one in batch]
    return dict(input_ids=column("input_ids", 2), labels=column("labels", -100), attention_mask=torch.tensor(mask))


def arguments(folder, kind=TrainingArguments, **settings):
    """Of a run on these ranks, sharded unless ``fsdp`` is false; its steps take the samples in their order."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size > 1:
        rank = str(dist.get_rank())
        os.environ |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    defaults = dict(
        use_cpu=True,
        bf16=False,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // 2 // size,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=LR,
        lr_scheduler_type="linear",
        adam_beta2=0.95,
        max_grad_norm=100.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        fsdp=size > 1,
    )
    made = kind(str(folder), **(defaults | settings))
    if made.fsdp:
        # accelerate shards on GPUs only (accelerate/state.py, AcceleratorState), though FSDP2 does on any device
        assert made.distributed_state.distributed_type == DistributedType.MULTI_CPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made


def model_of(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def whole(model):
    """All weights of a model. Collective if it is sharded."""
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in model.named_parameters()
    }


def logged(trainer, key):
    """What a trainer logged under a name, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def dense_lift(folder):
    """Losses and weights of plain LIFT on one process, on :func:`samples`."""
    model = model_of(folder)
    names = linear_of(model)
    selected = {name: round(LIFT["density"] * model.get_parameter(name).numel()) for name in names}
    lrs = [LR * (STEPS - step) / STEPS for step in range(STEPS)]
    lift = DenseLift(model, names, selected, LIFT["filter_rank"], REFRESH, lrs, (0.9, 0.95), 1e-8)
    data = [(one["input_ids"], one["labels"]) for one in samples()]
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(lift.run_step(data[BATCH * step :][:BATCH]))
        gradients = [weight.grad[lift.masks[name]] for name, weight in lift.weights.items()]
        norms.append(torch.cat(gradients).norm().item())
    return dict(losses=losses, norms=norms, weights={name: param.detach() for name, param in model.named_parameters()})


def tokenizer():
    """Words w3 to w256, and <e> at the end."""
    words = {"<a>": 0, "<b>": 1, "<e>": 2} | {f"w{token}": token for token in range(3, 257)}
    made = Tokenizer(models.WordLevel(words, unk_token="<a>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<a>", eos_token="<e>", pad_token="<e>")
