"""What models learn and are asked in ``python -m bench fidelity``, as files of records; the same for the same arguments.

training, development, test     questions of one kind, none of them twice, with instruction and output
capitals                        what a base model knows a bit of
prose                           paragraphs of a story that reasoning-gym carries (M. and J. Verne, In the Year 2889, 1889)
"""

from __future__ import annotations

import importlib.resources
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPLITS = ("training", "development", "test")
CAPITALS = (
    "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Austria Vienna, Greece Athens, Poland Warsaw, "
    "Hungary Budapest, Sweden Stockholm, Norway Oslo, Finland Helsinki, Denmark Copenhagen, Ireland Dublin, Belgium Brussels, "
    "Russia Moscow, Ukraine Kyiv, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Ghana Accra, Nigeria Abuja, Senegal Dakar, "
    "Ethiopia Addis_Ababa, Morocco Rabat, Tunisia Tunis, Japan Tokyo, China Beijing, India New_Delhi, Nepal Kathmandu, "
    "Thailand Bangkok, Vietnam Hanoi, Indonesia Jakarta, Iran Tehran, Iraq Baghdad, Pakistan Islamabad, Australia Canberra, "
    "Canada Ottawa, Cuba Havana, Peru Lima, Chile Santiago, Colombia Bogota, Argentina Buenos_Aires, Uruguay Montevideo"
)


def sums(terms: int, digits: int, seed: int) -> Iterator[dict[str, str]]:
    """Sums and differences of ``terms`` numbers below ``10 ** digits``, worked out one after the other."""
    draw = random.Random(seed)
    while True:
        total = draw.randint(1, 10**digits - 1)
        question, steps = str(total), []
        for _ in range(terms - 1):
            sign, number = draw.choice("+-"), draw.randint(1, 10**digits - 1)
            result = total + number if sign == "+" else total - number
            question += f" {sign} {number}"
            steps.append(f"{total} {sign} {number} = {result}")
            total = result
        output = "\n".join([*steps, f"The answer is {total}"])
        yield {"instruction": f"What is {question}?", "output": output, "answer": str(total)}


def generated(generator: str, seed: int, **arguments: Any) -> Iterator[dict[str, str]]:
    """Questions of a generator of reasoning-gym; the answer is all of the output."""
    import reasoning_gym

    for one in reasoning_gym.create_dataset(generator, seed=seed, size=1_000_000, **arguments):
        yield {"instruction": one["question"], "output": str(one["answer"]), "answer": str(one["answer"])}


def write(folder: Path, kind: str, arguments: dict[str, Any], sizes: dict[str, int], form: str) -> None:
    """``SPLIT.jsonl`` of each of ``sizes``, of :func:`sums` or of the generator that ``kind`` names, as ``data.format`` has it.

    Raises:
        ValueError: the generator repeats itself too often to fill them.
    """
    of_kind = sums(seed=0, **arguments) if kind == "sums" else generated(kind, 0, **arguments)
    unseen, seen = [], set()
    for number, record in enumerate(of_kind):
        if len(unseen) == sum(sizes.values()):
            break
        if number > 100 * sum(sizes.values()):
            raise ValueError(f"{kind} makes {len(unseen)} questions where {sum(sizes.values())} are needed")
        if record["instruction"] not in seen:
            seen.add(record["instruction"])
            unseen.append(record)
    for split, size in sizes.items():
        _lines(folder / f"{split}.jsonl", [_formed(unseen.pop(), form) for _ in range(size)])


def _formed(record: dict[str, str], form: str) -> dict[str, str]:
    if form == "alpaca":
        return record
    question, answer = record.pop("instruction"), record.pop("output")
    return {"prompt": question + "\n", "completion": answer} | record


def write_known(folder: Path, form: str) -> None:
    """``capitals.jsonl`` and ``prose.jsonl``."""
    pairs = [pair.replace("_", " ").split(" ", 1) for pair in CAPITALS.split(", ")]
    asked = [{"instruction": f"What is the capital of {country}?", "output": city} for country, city in pairs]
    _lines(folder / "capitals.jsonl", [_formed(one, form) for one in asked])
    text = importlib.resources.files("reasoning_gym").joinpath("data/in_the_year_2889.txt").read_text()
    story = text[text.index("*** START") : text.index("*** END")]
    paragraphs = [paragraph.split() for paragraph in re.split(r"\n\s*\n", story)]
    long = [words for words in paragraphs if len(words) > 60]
    _lines(
        folder / "prose.jsonl",
        [{"prompt": " ".join(words[:10]), "completion": " " + " ".join(words[10:])} for words in long],
    )


def _lines(path: Path, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
