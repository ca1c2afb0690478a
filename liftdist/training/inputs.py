"""The inputs of a run that are available before weights are read: the model's folder and the tokenised data."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from liftdist import hub
from liftdist.console import Console
from liftdist.data import mixture, records, sources, tokenised
from liftdist.data.chat import Encoder
from liftdist.data.mixture import Mixture
from liftdist.data_settings import DataSource
from liftdist.distributed.collectives import gather, together
from liftdist.distributed.mesh import Mesh
from liftdist.errors import UserError
from liftdist.models import build
from liftdist.models import hub as models
from liftdist.models.hub import resolve_model
from liftdist.models.tokenizer import load_tokenizer
from liftdist.registry import LOSSES
from liftdist.runs import claims
from liftdist.schema import Config
from liftdist.training.losses import masked_thought


@dataclass(frozen=True)
class Inputs:
    """The model's folder, and the samples to train and to evaluate on."""

    folder: Path
    samples: Mixture
    held_out: Mapping[str, tokenised.Samples]  # by name
    mask_token: int | None = None  # id of what replaces tokens of the input, if the loss has that done


def prepare_inputs(
    config: Config,
    console: Console,
    shares: Sequence[tuple[int, int]] = (),
    check: Callable[[], None] = lambda: None,
    encoding: Encoding | None = None,
) -> Inputs:
    """Check the model's folder and its tokenizer, and tokenise the data. Not collective.

    Args:
        shares: of each source's parts, to tokenise first, and next: see :func:`liftdist.data.tokenised.tokenise`.
        check: called at any progress; what it raises ends the work.
        encoding: what :func:`encoding_of` gives, if it is at hand.

    Raises:
        UserError: the folder, the tokenizer or the data cannot be used.
    """
    folder, encoder_of, text_config = encoding or encoding_of(config)
    mask_token = mask_token_of(config, encoder_of, text_config, console)
    sources.check_splits(config.data)
    hash_files(config, console, check)
    vocabulary = text_config.vocab_size

    def samples_of(source: DataSource) -> tokenised.Samples:
        path = source.path
        with console.progress(f"tokenising {path}", "records") as progress:

            def show(done: int, total: int) -> None:
                progress(done, total)
                check()

            samples = tokenised.tokenise(
                source,
                config.data,
                encoder_of(source),
                vocabulary,
                Path(config.cache_dir),
                shares,
                show,
            )
        longest, context = int(samples.lengths.max()), getattr(text_config, "max_position_embeddings", None)
        if context and longest > context:
            raise UserError(
                f"data.max_length={config.data.max_length}: {path} has a sample of {longest} tokens, "
                f"the model's context is {context}; lower data.max_length"
            )
        learned = int(samples.learned.sum())
        tokens = int(samples.lengths.sum())
        label = sources.label(path, source.split)
        console.say(f"data {label}: {len(samples)} samples, {tokens} tokens, {learned} of them learned")
        for line in samples.report.lines():
            console.say(f"data {label}: {line}")
        return samples

    held_out = {source.name: samples_of(source) for source in config.data.held_out_sources}
    training = config.data.training_sources
    found = [samples_of(source) for source in training]
    if (share := config.data.eval_share) is not None:
        split = mixture.hold_out(training, found, share)
        held_out = {source.name: chosen for source, (_, chosen) in zip(training, split, strict=True)}
        found = [kept for kept, _ in split]
        for source, (kept, chosen) in zip(training, split, strict=True):
            label = sources.label(source.path, source.split)
            console.say(f"data {label}: {len(chosen)} samples are held out, {len(kept)} are left to train on")
    samples = Mixture.of([source.name for source in training], found, mixture.taken(training, list(map(len, found))))
    for line in samples.lines():
        console.say(line)
    return Inputs(folder, samples, held_out, mask_token)


def mask_token_of(
    config: Config, encoder_of: Callable[[DataSource], Encoder], text_config: Any, console: Console
) -> int | None:
    """The id of the token that replaces others, if the loss has that done. Raises ``UserError`` if there is none."""
    if LOSSES.load(config.train.loss).make(config.train).masking is None:
        return None
    tokenizer = encoder_of(config.data.training_sources[0]).tokenizer
    found = masked_thought.token_id(tokenizer, config.train, text_config.vocab_size)
    console.say(f"response tokens of the input are replaced by {tokenizer.convert_ids_to_tokens(found)} (id {found})")
    return found


def hash_files(config: Config, console: Console, check: Callable[[], None]) -> None:
    """Keep the digests of data files in the cache. Raises ``UserError`` for one that cannot be read; what ``check`` raises."""
    with console.progress("hashing data", "MiB") as progress:
        read = itertools.count(1)

        def beat() -> None:
            progress(next(read), 0)
            check()

        sources.remember_digests(config.data, Path(config.cache_dir), beat)


def date_of(run_dir: Path) -> datetime:
    """When a run was claimed first, or now: the date that chat templates write is that of the run, however often it continues."""
    first = next(iter(sorted(claims.attempts(run_dir).items())), None)
    return datetime.fromtimestamp(first[1][0]["time"] if first is not None else time.time()).astimezone()


class Encoding(NamedTuple):
    """How records become tokens for a model."""

    folder: Path  # the model's
    encoder_of: Callable[[DataSource], Encoder]
    text_config: Any  # the model's configuration as transformers has it, of its language part


def encoding_of(config: Config, weights: bool = True) -> Encoding:
    """What makes tokens of records. Raises ``UserError`` if the model's folder or its tokenizer cannot be used.

    Args:
        weights: fetch those of a model on the hub, too.
    """
    folder, data = resolve_model(config.model.path, config.model.revision, weights), config.data
    text_config = build.check_type(folder, config.model).get_text_config()
    tokenizer = load_tokenizer(folder, config.model)
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(build.stop_ids(folder))]
    template, date = chat_template(data.chat_template), date_of(Path(config.run_dir).expanduser())

    def encoder_of(source: DataSource) -> Encoder:
        return Encoder(
            tokenizer,
            template,
            data.template_arguments,
            stops=stops,
            date=date,
            learn=source.learn,
            turns=source.turns,
        )

    return Encoding(folder, encoder_of, text_config)


def check_first_records(config: Config) -> None:
    """Encode the first records as training does, chat templates included. Takes seconds.

    Raises:
        UserError: naming file and line.
    """
    _, encoder_of, text_config = encoding_of(config)
    mask_token_of(config, encoder_of, text_config, Console(False))
    for given in config.data.all_sources:
        source = sources.open_records(given)
        first = source.read(0, records.CHECKED_RECORDS)
        read = records.reader(source, given)
        tokenised.encode_all(first, read, encoder_of(given), text_config.vocab_size, config.data)


def chat_template(given: str | None) -> str | None:
    """The text of ``data.chat_template``. Raises ``UserError`` for a file that cannot be read."""
    if given is None or not given.endswith((".jinja", ".jinja2")):
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"data.chat_template {given}: {getattr(error, 'strerror', None) or error}") from None


def commits(config: Config, training: bool = True) -> dict[str, str]:
    """``NAME@COMMIT`` of what is on the hub, the model and, for training, the data, by setting. Raises ``UserError``."""
    found = {"model.path": models.repository(config.model.path, config.model.revision)}
    for source in config.data.all_sources if training else ():
        found[source.key] = sources.repository(source.path, source.revision)
    pairs = [(key, repo.name, repo.commit()) for key, repo in found.items() if repo is not None]
    return {key: f"{name}@{commit}" for key, name, commit in pairs if commit is not None}


def agree_on_commits(config: Config, mesh: Mesh, training: bool = True) -> None:
    """Make all ranks read the hub at the commits that rank 0 finds. Collective."""
    with together():
        if mesh.is_main:
            commits(config, training)
    hub.adopt(gather(hub.resolved())[0])
