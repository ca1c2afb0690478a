"""Sets up a run before its first step: a sharded model with its base weights, and the method attached to it."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from liftdist.distributed import collectives
from liftdist.distributed.collectives import together
from liftdist.distributed.sharding import advice_on_padding, fsdp_modules, reshard
from liftdist.errors import UserError
from liftdist.method_settings import BY_GRADIENTS
from liftdist.methods.base import Method
from liftdist.models import build, check, weights
from liftdist.models.head import in_chunks, is_plain
from liftdist.models.hub import resolve_model
from liftdist.models.load import load
from liftdist.models.names import NameMap
from liftdist.registry import METHODS
from liftdist.runs.context import RunContext
from liftdist.training import gradients, packing, routing
from liftdist.training.inputs import Inputs, agree_on_commits


def model_and_method(
    context: RunContext,
    folder: Path,
    base_digest: str,
    from_checkpoint: bool = False,
    inputs: Inputs | None = None,
    loaded: tuple[PreTrainedModel, NameMap] | None = None,
) -> tuple[PreTrainedModel, NameMap, Method]:
    """The sharded model, the names of its tensors in the folder, and the attached method. Collective.

    Args:
        base_digest: digest of the folder's weights.
        from_checkpoint: select nothing, because a checkpoint will be loaded.
        inputs: the data to train on, if any: with ``data.packing``, it is checked that the model keeps packed samples apart.
        loaded: the model and its names as another run with the same settings of both got them from here, and has left it.

    Raises:
        UserError: it does not, or weights are selected by gradients and there is no data.
    """
    config = context.config
    for reason, unused in config.unused().items():
        context.console.say(f"not used {reason}: {', '.join(unused)}")
    model, names = loaded or _model(context, folder, inputs)
    backwards = None if inputs is None else gradients.of_batches(context, inputs, model)
    chosen = METHODS.load(config.method)
    method: Method = chosen.attach(context, model, names, base_digest, from_checkpoint, backwards)
    return model, names, method


def _model(context: RunContext, folder: Path, inputs: Inputs | None) -> tuple[PreTrainedModel, NameMap]:
    """The sharded model, tried out, and the names of its tensors in the folder. Collective."""
    config, mesh = context.config, context.mesh
    chosen = METHODS.load(config.method)

    def prepare(model: PreTrainedModel, names: NameMap) -> NameMap:
        chosen.extend(config, model)
        return chosen.prepare(config, model, names)

    model, names = load(folder, config.model, mesh, context.cancellation.check, prepare)
    if (settings := check.quantisation(check.read_json(folder / "config.json"))) is not None:
        held = f", and rounded to {config.model.base_dtype}" if config.model.base_dtype else ""
        context.console.say(
            f"the base model's weights come quantised ({settings['quant_method']}): they are read as those that they stand "
            f"for{held}, onto which exports and deltas put what is learned"
        )
    if rates := build.dropout(model.config):
        named = ", ".join(f"{key}={rate:g}" for key, rate in rates.items())
        context.console.say(f"config.json of the model asks for dropout, with which it is trained: {named}")
    if build.is_emulated(build.computing_dtype(model), mesh.device):
        context.console.say(
            "this processor has no instructions for bfloat16, which makes it about ten times slower than model.dtype=float32"
        )
    if config.model.offload_activations and mesh.device.type == "cpu":
        context.console.say("model.offload_activations=true saves nothing here: the model is on the CPU as well")
    replicas, shards = mesh.device_mesh.shape
    if padded := advice_on_padding((param.shape for param in model.parameters()), replicas, shards):
        context.console.say(padded)
    if routing.wants_auxiliary_loss(model):
        context.console.say(
            "config.json of the model asks for the routers' auxiliary loss (output_router_logits): routers are frozen, and it is "
            "measured (experts/auxiliary_loss), not added"
        )
    if inputs is not None and config.data.packing:
        packing.keep_apart(model, mesh.device, config.data.max_length, config.train.micro_batch_size)
    if not collectives.agree(not is_plain(model, mesh.device)):
        in_chunks(model)
    reshard(fsdp_modules(model))  # what the trials above have gathered
    return model, names


def select_only(context: RunContext) -> None:
    """Select the principal weights and write the selection to the cache. Collective."""
    config = context.config
    if config.method != "lift":
        raise UserError(f"method={config.method} selects no weights")
    if config.selection.criterion in BY_GRADIENTS:
        raise UserError(
            f"selection.criterion={config.selection.criterion} selects by gradients, when a run starts, and keeps no selection"
        )
    agree_on_commits(config, context.mesh, training=False)
    with together():
        folder = resolve_model(config.model.path, config.model.revision)
    _, _, method = model_and_method(
        context, folder, weights.digest(folder, Path(config.cache_dir), context.cancellation.beat)
    )
    context.console.say(f"selection kept in {method.selection}")
