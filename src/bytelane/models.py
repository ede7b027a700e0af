"""A transformers model with bytelane's layers in it.

`load_model` builds the architecture without weights (parameters on the meta device, buffers real, so rotary tables and
the like come out of the model's own constructor), reads the checkpoint's headers and refuses it there if anything is
wrong, then puts a `QuantLinear` or `QuantEmbedding` in place of each quantized module and streams the tensors in. A
dense copy of a quantized weight never exists. The result is an ordinary transformers model: `generate`, chat templates
and streamers work as they do on any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from bytelane.cache import KVCacheChoice, install_kv_cache
from bytelane.checkpoint import Checkpoint, QuantizedModule, QuantizedTensors, open_checkpoint
from bytelane.checkpoint.container import read_json
from bytelane.checkpoint.plausible import check_counts, check_generation
from bytelane.decoder import FloatOps, install_decoder
from bytelane.dispatch import FLOATS
from bytelane.errors import (
    CheckpointError,
    ConfigError,
    FileFormatError,
    MissingTensorError,
    ModelConfigError,
    RemoteCodeError,
    UnsupportedFormatError,
)
from bytelane.layers import QuantEmbedding, QuantLinear
from bytelane.overrides import Overrides, OverridesSource, ScaleOverride, round_layer
from bytelane.scheme import Kind, Numerics
from bytelane.shipped import SHIPPED_NAME, shipped_model

HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")
"""What is fetched of a hub repository: weights, configuration, tokenizer. Never code, never pickles."""

TOWERS = {"gemma4": ("vision_config", "audio_config")}
"""By model type, the sub-configurations a model can do without: set to None, the towers are not built."""

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


def resolve_checkpoint(path: str | Path, *, revision: str | None = None) -> Path:
    """A local folder as it is, `bytelane:small` for the model that comes with bytelane, or a hub id fetched.

    Raises:
        FileFormatError: neither a folder nor a repository that can be fetched.
    """
    if str(path) == SHIPPED_NAME:
        return shipped_model()
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise FileFormatError("a checkpoint is a folder with config.json and safetensors files", file=local)
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileFormatError(
            f"no such folder, and the hub did not give a repository of this name ({type(error).__name__})", file=path
        ) from error


def load_config(directory: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's configuration, by transformers.

    Raises:
        ModelConfigError: no readable config.json, or a model type transformers does not know.
        RemoteCodeError: the checkpoint needs its own code and `trust_remote_code` is off.
    """
    file = directory / "config.json"
    if not file.exists():
        raise ModelConfigError("the folder has no config.json", file=directory)
    raw = read_json(file, ModelConfigError)
    check_counts(raw, file)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StrictDataclassError) as error:
        if "auto_map" in raw and not trust_remote_code:
            raise RemoteCodeError(
                "the model's code lies in the checkpoint; allow it with trust_remote_code if you trust its author",
                file=file,
                tensor="auto_map",
            ) from error
        raise ModelConfigError(f"transformers cannot read it: {error}", file=file) from error
    if config.is_encoder_decoder:
        raise ModelConfigError("must be false: no causal language model", file=file, tensor="is_encoder_decoder")
    _answer_plainly(config)
    return config


def _answer_plainly(config: PretrainedConfig) -> None:
    """Undo what a file says about how calls answer: that is the caller's to say, and odd values end in odd places."""
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            _answer_plainly(part)


def load_generation_config(directory: Path) -> GenerationConfig | None:
    """The checkpoint's settings of generation; None where it has none.

    Raises:
        ConfigError: generation_config.json is no JSON object, or holds what no token can be chosen by.
    """
    file = directory / "generation_config.json"
    if not file.exists():
        return None
    check_generation(read_json(file, ConfigError), file)
    try:
        return GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ConfigError(f"transformers cannot read it: {error}", file=file) from error


def without_towers(config: PretrainedConfig) -> PretrainedConfig:
    """The same configuration for text alone: the model it builds has no vision or audio tower, and the same names.

    A configuration that has no towers, or an architecture that cannot do without them, comes back equal.
    """
    text = copy.deepcopy(config)
    for key in TOWERS.get(config.model_type, ()):
        setattr(text, key, None)
    return text


def has_towers(config: PretrainedConfig) -> bool:
    """Whether the configuration has towers that `without_towers` leaves out."""
    return any(getattr(config, key, None) is not None for key in TOWERS.get(config.model_type, ()))


def build_skeleton(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    file: Path | None = None,
) -> PreTrainedModel:
    """The causal language model of a configuration: parameters on the meta device, buffers real.

    Raises:
        ModelConfigError: transformers has no causal language model for it, or cannot build one from its values.
    """
    chosen = dtype or config.dtype or torch.float32
    if chosen not in FLOATS:
        raise ModelConfigError(f"must be float32, bfloat16 or float16, found {chosen}", file=file, tensor="dtype")
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=trust_remote_code)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        AssertionError,
        RuntimeError,
        ArithmeticError,
        StrictDataclassError,
    ) as error:
        raise ModelConfigError(f"transformers cannot build the model: {error}", file=file) from error
    _compute_buffers(model, model)
    return model.eval()


def _compute_buffers(module: nn.Module, owner: PreTrainedModel) -> None:
    """Give the buffers that no checkpoint holds the values `from_pretrained` gives them.

    Constructors run with the model's dtype as the default, so a table of frequencies may have been computed in
    bfloat16. transformers computes such buffers again after loading, in float32, by the model's `_init_weights`.
    """
    owner = module if isinstance(module, PreTrainedModel) else owner
    if module._non_persistent_buffers_set:
        owner._init_weights(module)
    for child in module.children():
        _compute_buffers(child, owner)


def open_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    text_only: bool = False,
) -> tuple[Checkpoint, PreTrainedModel]:
    """A checkpoint and the weightless model it belongs to; reads headers and scales only.

    With `text_only` the model has no vision or audio tower, and `Checkpoint.skipped` names the tensors of theirs, of
    which nothing is read.

    Raises:
        CheckpointError: the class that names the broken rule.
    """
    directory = resolve_checkpoint(path, revision=revision)
    config = load_config(directory, trust_remote_code=trust_remote_code)
    file = directory / "config.json"
    model = build_skeleton(config, dtype=dtype, trust_remote_code=trust_remote_code, file=file)
    if not text_only or not has_towers(config):
        return open_checkpoint(directory, model), model
    text_config = without_towers(config)
    text = build_skeleton(text_config, dtype=dtype, trust_remote_code=trust_remote_code, file=file)
    return open_checkpoint(directory, text, whole=model), text


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    numerics: Numerics | str = "integer",
    kv_cache: KVCacheChoice = "auto",
    float_ops: FloatOps = "auto",
    text_only: bool = False,
    overrides: OverridesSource | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load a wNa8o8 checkpoint as a transformers model.

    Args:
        path: a local folder, or a hub id.
        device: where the model goes.
        dtype: of activations and unquantized tensors; None takes the checkpoint's own.
        numerics: `"integer"` (what the phone computes) or `"emulated"` (what vLLM and Hugging Face compute).
        kv_cache: what `generate` keeps keys and values in when it is given no cache: `"int8"` codes with the
            checkpoint's scales, `"float"`, or `"auto"`: int8 in integer numerics where the checkpoint has the scales.
            A bare `model(input_ids)` is not affected: it keeps transformers' own cache.
        float_ops: who computes what lies between the layers (norms, rotary embedding, attention, activation
            functions): `"native"`, bytelane's kernels, fast and the same bits in any batch; `"torch"`, transformers'
            modules; or `"auto"`: native in integer numerics on the CPU where the architecture is one of those of
            `bytelane.decoder`.
        text_only: leave the vision and audio towers of a multimodal model out, and never read their tensors. What is
            left has the same names and gives the same logits for text.
        overrides: scales the checkpoint lacks, as a JSON file or a mapping: see `bytelane.overrides`.
        revision: of the hub repository.
        trust_remote_code: allow the checkpoint's own Python code to run. Never needed for supported models.
        progress: called with the bytes read and the bytes in all.

    Returns:
        The model, in eval mode, with its generation configuration.

    Raises:
        CheckpointError: the class that names the broken rule; nothing is left half-loaded.
        ConfigError: `float_ops="native"` for a model that has no such form.
        ValueError: unknown numerics, or an unknown kind of cache or of float operations.
    """
    chosen = Numerics(numerics)
    given = Overrides(overrides)
    checkpoint, model = open_model(
        path, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, text_only=text_only
    )
    with checkpoint:
        generation = load_generation_config(checkpoint.directory)
        install_kv_cache(model, checkpoint.kv_scales, choice=kv_cache, numerics=chosen, file=checkpoint.directory)
        _place(checkpoint, model, given.resolve(checkpoint), torch.device(device), chosen, progress)
    install_decoder(model, float_ops, numerics=chosen)
    if generation is not None:
        model.generation_config = generation
    model.name_or_path = str(path)
    return model


def _place(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    overrides: Mapping[str, ScaleOverride],
    device: torch.device,
    numerics: Numerics,
    progress: Progress | None,
) -> None:
    """Replace the quantized modules and fill in every plain tensor."""
    total = sum(m.weight_bytes for m in checkpoint.modules.values()) + sum(
        model.get_parameter_or_buffer(name).nbytes for name in checkpoint.plain
    )
    done = 0

    def taken(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    originals = {name: model.get_submodule(name) for name in checkpoint.modules}
    place_quantized(checkpoint, model, originals, overrides, model.dtype, device, numerics, taken)
    for name in checkpoint.plain:
        if name.rpartition(".")[0] in overrides:  # rounded, so a quantized layer by now
            taken(checkpoint.plain_bytes(name))
        else:
            taken(_place_plain(model, name, checkpoint.read_plain(name, copy=True), device))
    _tie_plain(model)
    missing = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if missing:
        raise MissingTensorError(
            "the checkpoint has no value for it", file=checkpoint.directory, tensor=", ".join(missing[:5])
        )
    for module_ in model.modules():
        for leaf, buffer in module_._buffers.items():
            if buffer is not None and buffer.device != device:
                module_._buffers[leaf] = buffer.to(device)


def place_quantized(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    originals: Mapping[str, nn.Module],
    overrides: Mapping[str, ScaleOverride],
    dtype: torch.dtype,
    device: torch.device,
    numerics: Numerics,
    taken: Callable[[int], None] = lambda _: None,
) -> None:
    """Put bytelane's layers into a model: the quantized modules, the tied heads, the layers an override rounds.

    Args:
        checkpoint: the open checkpoint.
        model: gets the layers.
        originals: the architecture's own modules by the names of the quantized ones, for what they know beside weights.
        overrides: by the names of linear layers.
        dtype: of activations.
        device: where the layers go.
        numerics: of the layers.
        taken: called with the bytes of each module.
    """
    for name, module in checkpoint.modules.items():
        override = overrides.get(name, ScaleOverride())
        try:
            layer = _layer(checkpoint, module, originals[name], override, dtype, numerics, device)
        except CheckpointError as error:
            # What a layer refuses by itself (an overridden scale that its bias does not fit) knows neither.
            raise error if error.file is not None else error.within(checkpoint.directory, name) from error
        model.set_submodule(name, layer)
        taken(module.weight_bytes)
    for head, source in checkpoint.tied.items():
        override = overrides.get(head, ScaleOverride())
        model.set_submodule(head, _tied_head(model.get_submodule(source), override, numerics, checkpoint, head))
    for name, override in overrides.items():
        if override.num_bits is not None:
            model.set_submodule(name, round_layer(checkpoint, name, override, numerics=numerics, device=device))


def _tie_plain(model: PreTrainedModel) -> None:
    """Share the parameters the architecture ties, where both sides are still plain and one of them is empty."""
    for target, source in model.all_tied_weights_keys.items():
        path, _, leaf = target.rpartition(".")
        owner: Any = model.get_submodule(path)
        given: Any = model.get_submodule(source.rpartition(".")[0])
        if leaf in owner._parameters and owner._parameters[leaf].is_meta and leaf in given._parameters:
            owner._parameters[leaf] = given._parameters[leaf]


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _layer(
    checkpoint: Checkpoint,
    module: QuantizedModule,
    original: nn.Module,
    override: ScaleOverride,
    dtype: torch.dtype,
    numerics: Numerics,
    device: torch.device,
) -> QuantLinear | QuantEmbedding:
    # A linear gets memory of its own: it is streamed every token, and must not fault on a file that changes underneath.
    tensors = checkpoint.read(module.name, copy=module.kind is Kind.LINEAR)
    weight = module.scheme.weight
    if module.kind is Kind.EMBEDDING:
        if type(original) is not nn.Embedding and not hasattr(original, "scalar_embed_scale"):
            raise UnsupportedFormatError(
                f"{type(original).__name__} does more than look up rows, and bytelane does not know what",
                file=checkpoint.directory,
                tensor=module.name,
            )
        return QuantEmbedding(
            tensors.rows.to(device),
            tensors.weight_scale.to(device),
            embedding_dim=module.shape[1],
            num_bits=weight.num_bits,
            group_size=weight.group_size,
            embed_scale=float(getattr(original, "scalar_embed_scale", 1.0)),
            dtype=dtype,
        )
    return build_linear(module, tensors, override, numerics=numerics, device=device)


def build_linear(
    module: QuantizedModule,
    tensors: QuantizedTensors,
    override: ScaleOverride | None = None,
    *,
    numerics: Numerics = Numerics.INTEGER,
    device: torch.device | str = "cpu",
) -> QuantLinear:
    """The layer of a checkpoint's quantized linear module.

    Args:
        module: what the checkpoint says of it.
        tensors: as `Checkpoint.read` gives them, with memory of their own.
        override: scales that stand in for the checkpoint's.
        numerics: of the layer.
        device: where it goes.

    Raises:
        CheckpointError: the scales do not fit the layer, under the class that names the rule.
    """
    weight = module.scheme.weight
    input_scale, output_scale = (override or ScaleOverride()).sides(tensors.input_scale, tensors.output_scale)
    return QuantLinear(
        tensors.rows.to(device),
        tensors.weight_scale.to(device),
        in_features=module.shape[1],
        num_bits=weight.num_bits,
        group_size=weight.group_size,
        input_scale=input_scale,
        output_scale=output_scale,
        bias=None if tensors.bias is None else tensors.bias.to(device),
        numerics=numerics,
    )


def _tied_head(
    source: nn.Module, override: ScaleOverride, numerics: Numerics, checkpoint: Checkpoint, head: str
) -> nn.Module:
    """A head that shares the embedding's codes; weight-only unless overridden, since tables have no sides."""
    if not isinstance(source, QuantEmbedding):
        raise UnsupportedFormatError(
            "a head can share the codes of a quantized embedding only", file=checkpoint.directory, tensor=head
        )
    return QuantLinear(
        source.packed,
        source.weight_scale,
        in_features=source.embedding_dim,
        num_bits=source.num_bits,
        group_size=source.scheme.weight.group_size,
        input_scale=override.input_scale,
        output_scale=override.output_scale,
        numerics=numerics,
    )


def _place_plain(model: PreTrainedModel, name: str, tensor: torch.Tensor, device: torch.device) -> int:
    path, _, leaf = name.rpartition(".")
    owner: Any = model.get_submodule(path)
    if leaf in owner._parameters:
        wanted = owner._parameters[leaf].dtype
        owner._parameters[leaf] = nn.Parameter(tensor.to(device, wanted), requires_grad=False)
    else:
        owner._buffers[leaf] = tensor.to(device, owner._buffers[leaf].dtype)
    return tensor.nbytes
