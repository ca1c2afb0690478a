"""The pages of the guide that are made from the code, and ``llms.txt``, which is made from the guide.

python launch/generate_docs.py      write the files of PAGES in docs/

They are kept in the repository, so that the guide can be read without building it; a test says when one is out of date.
"""

import argparse
import dataclasses
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

from liftdist import cli, environment, registry, schema_tree
from liftdist.schema import Config

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ON_RESUME = {
    schema_tree.NOTHING: "",
    schema_tree.COURSE: "`--allow-changes`",
    schema_tree.STATE: "`--allow-state-changes`",
    schema_tree.FIXED: "`--fresh`",
}

#: Variables of other software. What the launcher sets gives way to what is set already.
OTHERS = {
    "CUDA_VISIBLE_DEVICES": "the GPUs to use; `liftdist train` starts a rank for each",
    "HF_HUB_OFFLINE": "`1`: take models and data sets from the hub's cache, and use no network",
    "HF_TOKEN": "your token for gated models and for `liftdist push`; it is never printed or written",
    "NO_COLOR": "anything: `liftdist data` prints no colours",
    "PYTHON": "the Python that `launch/setup` makes `.venv` with",
    "SLURM_CONF": "the cluster to talk to; `slurm/cluster up` prints it",
    "OMP_NUM_THREADS": "threads of a rank; the launcher sets the cores of the machine divided by its ranks",
    "NCCL_SOCKET_IFNAME": "network interface of NCCL; the launcher sets the one that leads to the head",
    "GLOO_SOCKET_IFNAME": "the same for gloo",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "the launcher sets `1`: at a timeout every rank dumps what it waited for",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "where; the launcher sets a name in `logs/` of the run directory, in a job",
    "TORCH_FR_BUFFER_SIZE": "how many collectives are remembered for that; the launcher sets `2000`",
    "WANDB_PROJECT": "the project of `metrics.trackers=[wandb]`; all its others count, too: `WANDB_MODE=offline`",
    "MLFLOW_TRACKING_URI": "where `metrics.trackers=[mlflow]` records; `MLFLOW_EXPERIMENT_NAME` is the experiment",
    "TRACKIO_PROJECT": "the project of `metrics.trackers=[trackio]`; `TRACKIO_SPACE_ID` and Trackio's others count, too",
    "CUBLAS_WORKSPACE_CONFIG": "a run with `train.deterministic` sets `:4096:8`",
}

NOT_USED = (
    "`liftdist train` names these once when it finds them, and starts torchrun and the ranks without them: torchrun's options "
    "(`PET_*`, `TORCHELASTIC_*`, `PYTHON_EXEC`, `LOGLEVEL`), what describes ranks (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, "
    "`MASTER_ADDR`, `MASTER_PORT` and their like), settings of accelerate (`ACCELERATE_*`, `FSDP_*`), and "
    "`TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`, which some images set and which would select weights less exactly. Give `--nproc`, "
    "`--nnodes`, `--node-rank` and `--head` instead. Outside of `liftdist submit`'s jobs the variables of SLURM decide "
    "nothing where there is a terminal, and those that liftdist sets for its own parts are not used."
)


def settings() -> str:
    """Every setting, a table for each section, and everything that is chosen by name."""
    reference = {key: (default, meaning) for key, default, meaning in schema_tree.reference(Config)}
    sections: dict[str, list[str]] = {}
    for key, leaf in schema_tree.settings(Config):
        default, meaning = reference[key]
        row = [f"`{key}`", default, meaning + _bounds(leaf), ON_RESUME[leaf.metadata["changes"]]]
        sections.setdefault(key.rpartition(".")[0], []).append(_row(row))
    lines = [
        _front("Every setting with its default, meaning and bounds; everything that is chosen by name."),
        "# Settings",
        "",
        "`liftdist train FILE key=value ...`: defaults, then the file, then the command line. `${oc.env:NAME}` reads an",
        "environment variable, whose value is written nowhere. The last column names the flag that a run needs to continue",
        "with another value; see [Checkpoints](checkpoints.md#continue-with-other-settings).",
        "",
        "A setting that is a text is what was typed. After `key=`, every character counts, quotes too: `slurm.partition=0012`,",
        "`slurm.account=on`, `data.subset=null`; nothing after `key=` unsets it. In the file, numbers, dates, `on` and `1e3`",
        "need no quotes either, `null` unsets, and a text that YAML would cut short or take for something else, such as",
        "`{x}`, `*x` or `#x`, is refused with the quotes that it needs. A list is in brackets, as in YAML, and its entries keep",
        "their characters: `selection.modules='[\"*.mlp.*\", model.layers.0.self_attn.q_proj]'`. `\\${` stands for `${`.",
    ]
    for section, rows in sections.items():
        lines += ["", f"## {section or 'Run'}", ""]
        lines += [_row(["setting", "default", "meaning", "to change it later"]), "|---|---|---|---|", *rows]
    lines += [
        "",
        "## Chosen by name",
        "",
        "`liftdist/registry.py` lists what can be chosen and where it is implemented.",
    ]
    for entry in vars(registry).values():
        if isinstance(entry, registry.Registry):
            folder = entry.package.replace(".", "/")
            lines += [
                "",
                f"### {entry.kind.capitalize()}",
                "",
                f"In `{folder}/`.",
                "",
                "| name | meaning |",
                "|---|---|",
            ]
            lines += [_row([f"`{name}`", meaning]) for name, meaning in entry.meanings.items()]
    return "\n".join(lines) + "\n"


def _bounds(leaf: dataclasses.Field) -> str:
    words = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}
    given = [(words[name], leaf.metadata[name]) for name in words if leaf.metadata[name] is not None]
    return f" ({', '.join(f'{word} {value}' for word, value in given)})" if given else ""


def commands() -> str:
    """Every command of ``liftdist`` with its arguments."""
    lines = [
        _front("Every command of liftdist with its arguments."),
        "# Commands",
        "",
        "| command | what it does |",
        "|---|---|",
    ]
    lines += [_row([f"[`liftdist {name}`](#liftdist-{name})", command.help]) for name, command in cli.COMMANDS.items()]
    lines += ["", "[Exit codes](launching.md#exit-codes) are the same for all."]
    for name, command in cli.COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"liftdist {name}")
        command.arguments(parser)
        lines += ["", f"## liftdist {name}", "", f"{command.help[0].upper()}{command.help[1:]}.", ""]
        lines += ["| argument | meaning |", "|---|---|", *(_row(cells) for cells in _arguments(parser))]
    return "\n".join(lines) + "\n"


def _arguments(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        value = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else action.dest.upper())
        if not action.option_strings:
            shown = str(action.metavar or action.dest.upper())
        else:
            names = ", ".join(action.option_strings)
            shown = names if action.nargs == 0 else f"{names} {value}"
        needed = " (required)" if action.required and action.option_strings else ""
        yield [f"`{shown}`", f"{(action.help or '') % vars(action)}{needed}"]


def variables() -> str:
    """Every environment variable that means something, by who sets it."""
    about = "Every environment variable that means something, and who sets it."
    lines = [_front(about), "# Environment variables", "", "A config can read any variable by `${oc.env:NAME}`."]
    table = list(environment.table())
    makers = {variable.by: None for variable in table}
    for maker in sorted(makers, key=lambda maker: maker != environment.USER):
        title = "For you to set" if maker == environment.USER else f"Set by {maker}"
        lines += ["", f"## {title}", "", "| variable | meaning |", "|---|---|"]
        lines += [_row([f"`{one.name}`", one.meaning]) for one in table if one.by == maker]
        if maker == environment.USER:
            lines += ["", "## Of other software", "", "| variable | meaning |", "|---|---|"]
            lines += [_row([f"`{name}`", meaning]) for name, meaning in OTHERS.items()]
            lines += ["", "## Not used", "", NOT_USED]
    return "\n".join(lines) + "\n"


def llms() -> str:
    """An index of the guide for language models, in the form of llmstxt.org."""
    project = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
    lines = [f"# {project['site_name']}", "", f"> {project['site_description']}", ""]
    for entry in project["nav"]:
        for title, target in entry.items():
            pages = [{title: target}] if isinstance(target, str) else target
            lines += [f"## {title}", ""]
            lines += [
                f"- [{name}]({page}): {description(DOCS / page)}" for found in pages for name, page in found.items()
            ]
            lines += [""]
    return "\n".join(lines)


def description(page: Path) -> str:
    """What a page says of itself in its front matter."""
    found = re.match(r"---\ndescription: (.+)\n---\n", page.read_text())
    if found is None:
        raise SystemExit(f"{page}: must begin with a description")
    return found[1]


def _front(text: str) -> str:
    return f"---\ndescription: {text}\n---\n\n<!-- generated by launch/generate_docs.py -->\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


#: In this order: the last reads the others.
PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings,
    "commands.md": commands,
    "environment.md": variables,
    "llms.txt": llms,
}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make())
