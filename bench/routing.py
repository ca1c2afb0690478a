"""How often `liftdist serve --examples` gives a question to the model of its kind, on questions that it has no example of.

    python -m bench routing [--model FOLDER] [--examples 4 16 64] [--questions 200] [--out FILE]

Kinds are generators of reasoning-gym; a group of them is what is chosen from. Examples and questions are of two seeds.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import reasoning_gym
import torch

from bench import measure
from liftdist.serving.examples import table_of
from liftdist.serving.routing import Embedding, Routes

GROUPS = {
    "far": ["gsm_symbolic", "word_sorting", "propositional_logic", "time_intervals"],
    "arithmetic": ["chain_sum", "basic_arithmetic", "products", "decimal_chain_sum", "lcm", "gcd"],
    "stories": ["gsm_symbolic", "coin_flip", "dice", "aiw", "leg_counting", "family_relationships"],
    "words": ["word_sorting", "word_sequence_reversal", "spell_backward", "letter_counting", "letter_jumble"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench routing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(".cache/quickstart/SmolLM2-135M-Instruct"))
    parser.add_argument("--examples", type=int, nargs="+", default=[4, 16, 64], help="for each kind")
    parser.add_argument("--questions", type=int, default=200, help="of each kind")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    table = table_of(options.model)
    embedding = Embedding(table)

    def features(kind: str, seed: int, size: int) -> list[torch.Tensor]:
        return [embedding(one["question"]) for one in reasoning_gym.create_dataset(kind, seed=seed, size=size)]

    kinds = sorted({kind for group in GROUPS.values() for kind in group})
    known = {kind: features(kind, 1, max(options.examples)) for kind in kinds}
    asked = {kind: features(kind, 2, options.questions) for kind in kinds}
    results = {}
    for (name, group), count in itertools.product(GROUPS.items(), options.examples):
        routes = Routes.of(table, {kind: known[kind][:count] for kind in group})
        right = {kind: sum(routes.choose(one) == kind for one in asked[kind]) / options.questions for kind in group}
        worst = min(right, key=lambda kind: right[kind])
        results[f"{name}, {count} examples"] = {"right": sum(right.values()) / len(group), **right}
        print(
            f"{name}, {len(group)} kinds, {count} examples of each: {sum(right.values()) / len(group):.1%} right, "
            f"of {worst} {right[worst]:.1%}"
        )
    measure.write({"results": results}, options.out)


if __name__ == "__main__":
    main()
