"""Time to answer questions on a sharded model, against a plain loop over transformers' ``generate`` in the same batches of 16.

    python -m bench answers [--ranks 2] [--rounds 3] [--questions 200] [--new-tokens 64] [--model FOLDER] [--out FILE]

Questions are word problems of GSM8K's kind. A rank has its share of the cores. The plain loop is one process, on the threads of
one rank and, with several ranks, on all cores as well; it pads on the left, too, and takes the questions as they come.
"""

from __future__ import annotations

import os
import random
import statistics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import measure
from liftdist.data.chat import Encoder
from liftdist.data.content import Conversation
from liftdist.distributed import collectives
from liftdist.distributed import mesh as meshes
from liftdist.evaluation import generation
from liftdist.evaluation_settings import TaskConfig
from liftdist.models.load import load

PEOPLE, THINGS = (
    ["Ana", "Ben", "Chloe", "Dmitri", "Emeka", "Fatima"],
    ["apples", "books", "stamps", "marbles", "shells"],
)


def word_problems(number: int, seed: int = 0) -> list[str]:
    """Questions that need two to five steps; their lengths differ as those of GSM8K do, by a factor of three or so."""
    draw, found = random.Random(seed), []
    for _ in range(number):
        one, other = draw.sample(PEOPLE, 2)
        thing = draw.choice(THINGS)
        parts = [f"{one} has {draw.randint(10, 90)} {thing}."]
        for _ in range(draw.randint(1, 8)):
            parts.append(
                draw.choice(
                    [
                        f"{other} gives {one} {draw.randint(2, 30)} more on the way home from school.",
                        f"On the next day {one} finds twice as many {thing} as {other} had lost in the week before.",
                        f"Then {one} puts them into {draw.randint(2, 5)} equal boxes and sells one of these boxes to {other}.",
                    ]
                )
            )
        found.append(" ".join([*parts, f"How many {thing} does {one} have now?"]))
    return found


def plain_loop(model, prompts, task, stops) -> list[list[int]]:
    """What people write: batches of 16 in the order of the questions, padded on the left."""
    found = []
    for begin in range(0, len(prompts), 16):
        batch = prompts[begin : begin + 16]
        width = max(map(len, batch))
        ids = torch.tensor([[stops[0]] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=task.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )
        found += [[token for token in row if token not in stops] for row in output[:, width:].tolist()]
    return found


def main() -> None:
    parser = measure.parser("answers", __doc__, ranks=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = measure.on_ranks(parser)
    config, taken = measure.config(), {}
    config.model.dtype = "float32"
    task = TaskConfig(path="none", max_new_tokens=options.new_tokens)
    encoder = Encoder(AutoTokenizer.from_pretrained(options.model))
    prompts = [
        encoder.prompt(Conversation([{"role": "user", "content": text}]))[1]
        for text in word_problems(options.questions)
    ]
    stops = [encoder.tokenizer.eos_token_id]
    threads = {"plain": torch.get_num_threads()} | ({"plain_all_cores": os.cpu_count()} if options.ranks > 1 else {})
    with meshes.start(config.mesh.layout, config.mesh.timeout) as mesh:
        model, _ = load(options.model, config.model, mesh)
        plain = (
            AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval() if mesh.is_main else None
        )
        if plain is not None:
            plain.generation_config.repetition_penalty = None

        def sharded() -> list[list[int]]:
            with generation.unsharded(model) as answering:
                return answering.answer(prompts[mesh.rank :: mesh.world_size], task, stops, 0, lambda: None)

        for _ in range(options.rounds):
            seconds, answers = measure.timed(sharded)
            taken.setdefault("liftdist", []).append(seconds)
            parts = collectives.gather(answers)
            for name, number in threads.items():

                def alone(number=number):
                    if plain is None:
                        return None
                    torch.set_num_threads(number)
                    with torch.no_grad():
                        return plain_loop(plain, prompts, task, stops)

                seconds, expected = measure.timed(alone)
                torch.set_num_threads(threads["plain"])
                taken.setdefault(name, []).append(seconds)
        if mesh.is_main:
            said = [parts[place % mesh.world_size][place // mesh.world_size] for place in range(len(prompts))]
            results = {"same_answers": sum(map(list.__eq__, said, expected)) / len(said)}
            results |= {name: statistics.median(values) for name, values in taken.items()}
            results |= {f"{name}_over_liftdist": measure.ratio(taken, name, "liftdist") for name in threads}
            print(f"{measure.machine()}, torch {torch.__version__}, {options.ranks} ranks, {len(prompts)} questions")
            for name, value in results.items():
                print(f"{name} {value:.2f}")
            measure.write({"ranks": options.ranks, "results": results, "rounds": taken}, options.out)


if __name__ == "__main__":
    main()
