"""The model card of a result: YAML that the hub reads, what the result was made from, and how to load it.

Everything in it may be public. Of a local path it holds the last name alone; settings that only say how and where a run was
carried out are left out; what is secret is redacted. A comment holds the kind of result and the sha256 of the rest, by which a
card is known that nobody has edited since.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from liftdist import schema_tree
from liftdist.deltas.delta import AS_TRAINED
from liftdist.deltas.file import PATCH_NAME
from liftdist.redaction import redact
from liftdist.report.read import Run, is_data
from liftdist.runs.manifest import Manifest
from liftdist.runs.results import Figure
from liftdist.schema import Config
from liftdist.schema_tree import NOTHING

KINDS = {
    "hf": "model",
    "as_trained": "model",
    "shira": "adapter",
    "peft": "adapter",
    "delta": "delta",
    "patch": "patch",
}  # of each export format that is pushed
_LIBRARY = {"model": "transformers", "adapter": "peft", "delta": "liftdist", "patch": "liftdist"}
_WHAT = {
    "model": "The whole fine-tuned model.",
    "adapter": "An adapter for the base model.",
    "delta": "The weights that differ from the base model, to be applied to it to the bit.",
    "patch": "The weights that differ from the base model: flat indices and values of each tensor of its files.",
}
_MARK = re.compile(r"<!-- liftdist push: (\w+) ([0-9a-f]{64}) -->\n")
_FOLDERS = re.compile(r"(?<![\w:/.<>~-])(?:~[\w-]*|\.{1,2})?/(?:[^\s/'\"`,;:()\[\]{}<>]+/)+")


@dataclass(frozen=True)
class Result:
    """What is pushed, as far as it is known."""

    name: str  # of the repository
    revision: str | None  # its branch; the main one if None
    kind: str  # one of KINDS
    about: Mapping[str, Any]  # Delta.about
    license: Mapping[str, str]  # of the base model, as its own card says it
    run: Run | None = None  # with the settings of that checkpoint
    manifest: Manifest | None = None  # of the checkpoint

    @property
    def base(self) -> str | None:
        """The base model's name on the hub."""
        return self.about.get("base_model")


def identify(text: str) -> tuple[str | None, bool]:
    """The kind of result that a card was written for, None if it is by others; and whether it is as it was written."""
    if (found := _MARK.search(text)) is None:
        return None, False
    return found[1], found[2] == _sha256(_MARK.sub("", text, count=1))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()


def write(result: Result) -> str:
    """The card as Markdown."""
    yaml_text = yaml.safe_dump(_metadata(result), sort_keys=False, allow_unicode=True)
    title = f"# {result.name.partition('/')[2]}"
    parts = [
        title,
        _WHAT[result.kind] + _on_which_base(result),
        _table(["", ""], _facts(result)),
        f"## How to load it\n\n{_use(result)}",
    ]
    if result.run is not None and result.manifest is not None:
        parts += _of_run(result.run, result.manifest)
    head, body = redact(f"---\n{yaml_text}---\n"), redact("\n\n".join(parts) + "\n")
    return f"{head}<!-- liftdist push: {result.kind} {_sha256(head + body)} -->\n{body}"


def _on_which_base(result: Result) -> str:
    """Of a run with ``model.base_dtype``, whether this is what was trained and evaluated."""
    made = result.about.get("made", {})
    if (kind := made.get("base_dtype")) is None:
        return ""
    if made.get(AS_TRAINED):
        return f" The base model's matrices are rounded to {kind}, as they were in training and evaluation."
    return (
        f" It was trained, and evaluated, over the base model's matrices rounded to {kind}; here what was learned is over the "
        "original ones, which is another model."
    )


def public(value: Any) -> Any:
    """A setting's value with local paths cut to their last names."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    return Path(value).name if _is_local(value) else _FOLDERS.sub("", value)


def _is_local(value: str) -> bool:
    is_path = "/" in value and len(value) < 250 and value.isprintable()
    return value.startswith(("/", "~", "./", "../")) or (is_path and Path(value).exists())


def _metadata(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = {"library_name": _LIBRARY[result.kind], **result.license}
    if result.base is not None:
        found["base_model"] = result.base
        found["base_model_relation"] = "adapter" if result.kind == "adapter" else "finetune"
    if result.kind == "model":
        found["pipeline_tag"] = "text-generation"
    if result.run is not None and result.manifest is not None:
        names = [name for name, commit in _sources(result.run, result.manifest) if commit]
        found |= {"datasets": list(dict.fromkeys(names))} if names else {}
    method = [result.run.method] if result.run else []
    return found | {"tags": ["liftdist", *method, f"liftdist-{result.kind}"]}


def _facts(result: Result) -> Iterator[list[str]]:
    about = result.about
    base = f"`{result.base}` at commit `{about['base_commit']}`" if result.base else "a local folder"
    yield ["base model", base]
    yield ["digest of its weights", f"`{about['base_digest']}`"]
    if result.run is not None and result.manifest is not None:
        yield ["method", f"`{result.run.method}`"]
    if made := about.get("made"):
        yield ["made by", f"`{_line(public(made))}`"]
    yield ["liftdist", str(about["liftdist"])]


def _line(tree: Any) -> str:
    return yaml.safe_dump(tree, default_flow_style=True, sort_keys=False, width=10**6).strip().replace("|", "\\|")


def _use(result: Result) -> str:
    name, commit = result.name, result.about.get("base_commit")
    revision = f', revision="{result.revision}"' if result.revision else ""
    base = f'"{result.base}", revision="{commit}"' if result.base else '"BASE"'
    note = "" if result.base else "`BASE` is a folder that holds the base model.\n\n"
    if result.kind == "model":
        return _code(
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{name}"{revision})',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{revision})',
        )
    if result.kind == "adapter":
        return note + _code(
            "python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({base})",
            f'model = PeftModel.from_pretrained(base, "{name}"{revision})',
        )
    at = f"@{result.revision}" if result.revision else ""
    if result.kind == "delta":
        folder = f"{result.base}@{commit}" if result.base else "BASE"
        return note + _code("sh", f"liftdist apply {name}{at} {folder} --output tuned")
    return _code(
        "python",
        "from huggingface_hub import hf_hub_download",
        "from safetensors.torch import load_file",
        "",
        f'patch = load_file(hf_hub_download("{name}", "{PATCH_NAME}"{revision}))',
        "",
        "def patched(name, tensor):",
        '    """A tensor of the base model\'s files, by its name there, with the changes."""',
        '    if f"{name}.indices" in patch:',
        '        tensor.view(-1)[patch[f"{name}.indices"].long()] = patch[f"{name}.values"].to(tensor.dtype)',
        "    return tensor",
    )


def _of_run(run: Run, manifest: Manifest) -> Iterator[str]:
    sources = [
        f"- `{name}` at commit `{commit}`" if commit else f"- `{name}`" for name, commit in _sources(run, manifest)
    ]
    samples = f"{manifest.provenance.samples} samples, " if manifest.provenance.samples else ""
    seen = f"{manifest.snapshot.state['consumed']} seen by step {manifest.step}"
    yield "\n".join(["## Training data", "", *sources, "", f"{samples}{seen}; digest `{manifest.provenance.data}`."])
    if settings := _decisive(run):
        listed = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()
        yield f"## Settings\n\nThose that are not the defaults:\n\n~~~~yaml\n{listed}\n~~~~"
    figures = [figure for all_steps in run.evaluations.values() for figure in all_steps if figure.step == manifest.step]
    if figures:
        header = ["task", "metric", "value", "95 % interval", "questions"]
        yield f"## Evaluation after step {manifest.step}\n\n{_table(header, map(_row, figures))}"


def _sources(run: Run, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Name and, of what is from the hub, commit of each source of training data; of local ones the last name of the path."""
    for key, value in run.settings.items():
        if is_data(key) and value:
            name, _, commit = manifest.provenance.commits.get(key, "").rpartition("@")
            yield (name, commit) if name else (Path(str(value)).name, "")


def _decisive(run: Run) -> dict[str, Any]:
    """The settings that are not the defaults and decide what is learned, apart from model and data."""
    fields = dict(schema_tree.settings(Config))
    return {
        key: public(value)
        for key, value in run.changed.items()
        if (leaf := fields.get(schema_tree.template(key, Config))) is not None
        and leaf.metadata["changes"] != NOTHING
        and not (key == "model.path" or is_data(key))
    }


def _row(figure: Figure) -> list[str]:
    interval = "" if figure.low is None or figure.high is None else f"{figure.low:.4g} to {figure.high:.4g}"
    return [figure.task, figure.metric, f"{figure.number:.4g}", interval, str(figure.questions or "")]


def _table(header: list[str], rows: Any) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
