"""Cuts a contiguous range of layers out of any Hugging Face rotary decoder, without code per model.

1. The modules are the model's own, unmodified: transformers builds the whole model without weights, the range is cut
   out of it, and transformers loads the tensors of that range alone, renumbered from zero.
2. What a range does not need is never allocated: embeddings outside the first stage, norm and head outside the last.
3. A folder is hostile until it has loaded: everything that is wrong with it is a ModelUnsupported that says what to do.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging as transformers_logging

LAYER_NUMBER = re.compile(r"(^|\.)(layers)\.(\d+)\.")
LAYERS_MAX = 1024  # the deepest public decoders have 126; each costs time before any weight is read
CONFIG_BYTES_MAX = 1 << 20  # real ones stay under 50 kB, per-layer lists included
INDEX_BYTES_MAX = 64 << 20  # the index of the largest public checkpoint (671 B parameters) is 9 MB

Progress = Callable[[str, float], None]


class ModelUnsupported(ValueError):
    """This model cannot be served here; the message is one sentence that says why and what would help."""


@dataclass(slots=True)
class Slice:
    """Layers [first, stop) of a model. `core` turns ids or hidden states into hidden states, `causal` adds the head."""

    causal: Any
    core: Any
    config: Any
    layers: tuple[int, int]
    num_layers_total: int

    @property
    def is_first(self) -> bool:
        return self.layers[0] == 0

    @property
    def is_last(self) -> bool:
        return self.layers[1] == self.num_layers_total


class Stub(nn.Module):  # type: ignore[misc]
    """Stands where the core was, so that the model's own forward turns given hidden states into logits.

    Scales, soft caps and whatever else a family does to its logits thus come from the family's own code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None
        self.output_type: Any = BaseModelOutputWithPast  # what the real core returned when it was probed

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output_type(last_hidden_state=self.hidden)


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's config. Raises ModelUnsupported for anything but a plain text decoder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelUnsupported(f"{folder} holds no config.json: give the folder of a Hugging Face model.")
    if path.stat().st_size > CONFIG_BYTES_MAX:
        raise ModelUnsupported(f"config.json is over {CONFIG_BYTES_MAX} bytes: this is no model.")
    try:
        raw = json.loads(path.read_bytes())
        if not isinstance(raw, dict):
            raise TypeError("it is not an object")
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelUnsupported(f"config.json is not valid JSON ({error}): download the model again.") from error
    kind = raw.get("model_type")
    known = isinstance(kind, str) and kind in transformers.CONFIG_MAPPING
    if not known and "auto_map" not in raw:
        raise ModelUnsupported(
            f"transformers {transformers.__version__} does not know model type {str(kind)[:60]!r}: serve it with "
            "another engine, or upgrade transformers."
        )
    if not known and not trust_remote_code:
        raise ModelUnsupported(
            "this model runs code of its own, which is off: allow remote code for it, or choose a model type that "
            "transformers knows."
        )
    if raw.get("quantization_config"):
        raise ModelUnsupported("quantised checkpoints cannot be served yet: use the float16 or bfloat16 original.")
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        except Exception as error:  # transformers raises whatever the hostile file provokes
            raise ModelUnsupported(f"transformers cannot read config.json ({_sentence(error)}).") from error
    check_config(config)
    return config


def check_config(config: Any) -> None:
    """Raises ModelUnsupported for what is not a text decoder, or has absurd sizes."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelUnsupported(f"{config.model_type} is an encoder-decoder: only decoders can be served.")
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
        raise ModelUnsupported(f"{config.model_type} is not a causal language model known to transformers.")
    for name in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"):
        value = getattr(config, name, None)
        most = LAYERS_MAX if name == "num_hidden_layers" else 1 << 24
        if not isinstance(value, int) or not 0 < value <= most:
            raise ModelUnsupported(f"config.json gives {name} = {value!r}: a text decoder needs a positive integer.")


def load_slice(
    folder: Path,
    *,
    config: Any,
    layers: tuple[int, int],
    dtype: torch.dtype,
    attention: str,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Slice:
    """Loads layers [first, stop) from a folder with *.safetensors, reading only the tensors they need."""
    files = checkpoint_files(folder)
    numbers = {int(match[3]) for match in map(LAYER_NUMBER.search, files) if match is not None}
    if numbers and config.num_hidden_layers > len(numbers):
        raise ModelUnsupported(
            f"config.json describes {config.num_hidden_layers} layers and the files hold {len(numbers)}: they do not "
            "belong together."
        )
    tensors = dict(_read_tensors(folder, files, layers, config, progress))
    return build_slice(
        config,
        tensors,
        layers=layers,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
        code_folder=folder,
    )


def build_slice(
    config: Any,
    tensors: dict[str, torch.Tensor],
    *,
    layers: tuple[int, int],
    dtype: torch.dtype,
    attention: str,
    trust_remote_code: bool = False,
    code_folder: Path | None = None,
) -> Slice:
    """The slice of a model whose tensors are at hand. `tensors` are named as in a checkpoint, layers from 0."""
    total = config.num_hidden_layers
    if not 0 <= layers[0] < layers[1] <= total:
        raise ModelUnsupported(f"layers {layers[0]}:{layers[1]} are not inside 0:{total}.")
    cut = copy.deepcopy(config)
    # A tied head is the embedding table, so only a slice with both ends, or the last one, keeps the tie.
    cut.tie_word_embeddings = bool(config.tie_word_embeddings and layers[1] == total)
    with quiet():
        try:
            wanted = _cut_class(_model_class(cut, trust_remote_code, code_folder), layers, total)
            _check_size(wanted, cut, tensors)
            causal, info = wanted.from_pretrained(
                None,
                config=cut,
                state_dict=tensors,
                dtype=dtype,
                attn_implementation=attention,
                ignore_mismatched_sizes=True,  # they are reported below, in our words
                output_loading_info=True,
            )
        except ModelUnsupported:
            raise
        except Exception as error:  # whatever a hostile config or checkpoint provokes
            raise ModelUnsupported(
                f"transformers {transformers.__version__} cannot build {config.model_type} ({_sentence(error)})."
            ) from error
    missing = sorted(info["missing_keys"])
    if missing or info["mismatched_keys"]:
        what = missing[0] if missing else str(sorted(info["mismatched_keys"])[0][0])
        raise ModelUnsupported(f"the checkpoint lacks {what} or has it in another shape: download the model again.")
    core = causal.base_model
    if core is causal:
        raise ModelUnsupported(f"{config.model_type} has no core beside its head: it cannot be served.")
    _layers_of(core)
    causal.eval().requires_grad_(False)
    freeze_rotation(core, getattr(cut, "max_position_embeddings", None) or 1)
    for name, child in causal.named_children():
        if child is core:
            causal._modules[name] = Stub()
    return Slice(causal=causal, core=core, config=cut, layers=layers, num_layers_total=total)


def _check_size(wanted: Any, config: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Raises ModelUnsupported for a config that describes a far larger model than the files hold.

    What a checkpoint lacks transformers would allocate, and a hostile config could ask for more than there is.
    """
    with torch.device("meta"):
        empty = wanted(copy.deepcopy(config))
    described = sum(parameter.numel() for parameter in empty.parameters())
    held = sum(tensor.numel() for tensor in tensors.values())
    if described > held * 1.5 + 1_000_000:
        raise ModelUnsupported(
            f"config.json describes {described:,} parameters and the files hold {held:,}: they do not belong together."
        )


def freeze_rotation(core: Any, context_tokens: int) -> None:
    """Fixes rotations that would change with the longest sequence in a batch to those of the full context.

    Longrope has one set of frequencies for short sequences and one for long ones; transformers switches when any row
    of a batch grows long, which makes a row depend on its company. Like vLLM we take the set of the whole context.
    """
    for module in core.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds == "longrope":
            module(torch.zeros(1), torch.tensor([[context_tokens - 1]]))  # its own update, at the last position
            module.rope_type = "longrope-frozen"
        elif isinstance(kinds, dict):
            for layer_type, kind in list(kinds.items()):
                if kind == "longrope":
                    module(torch.zeros(1), torch.tensor([[context_tokens - 1]]), layer_type)
                    kinds[layer_type] = "longrope-frozen"


def _model_class(config: Any, trust_remote_code: bool, code_folder: Path | None) -> Any:
    known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if known is not None:
        return known[0] if isinstance(known, (list, tuple)) else known
    if not trust_remote_code or code_folder is None:
        raise ModelUnsupported(f"{config.model_type} needs code of its own, which is off: allow remote code for it.")
    config.name_or_path = str(code_folder)
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config, trust_remote_code=True))


def _cut_class(base: Any, layers: tuple[int, int], total: int) -> Any:
    """`base`, dropping on the meta device, before any weight is allocated, what this range does not need.

    Every layer is built with its true number first, because families decide by number which layers are dense, sliding
    or without rotation; only then are the range cut out, renumbered, and the config's per-layer lists cut alike.
    """
    first, stop = layers
    if layers == (0, total):
        return base

    class Cut(base):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            core = self.base_model
            core.layers = nn.ModuleList(list(_layers_of(core))[first:stop])
            for number, layer in enumerate(core.layers):
                for module in layer.modules():
                    if hasattr(module, "layer_idx"):
                        module.layer_idx = number
            for name, value in list(vars(config).items()):
                if isinstance(value, (list, tuple)) and len(value) == total:
                    setattr(config, name, value[first:stop])
            config.num_hidden_layers = stop - first
            if stop < total:
                self.set_output_embeddings(nn.Identity())
                for name, child in core.named_children():
                    if "Norm" in type(child).__name__:
                        core._modules[name] = nn.Identity()
            if first > 0 and not config.tie_word_embeddings:
                core.set_input_embeddings(nn.Identity())

    Cut.__name__, Cut.__qualname__, Cut.__module__ = base.__name__, base.__qualname__, base.__module__
    return Cut


def _layers_of(core: Any) -> nn.ModuleList:
    layers = getattr(core, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelUnsupported(f"{type(core).__name__} keeps its layers where we do not look: it cannot be served.")
    return layers


def checkpoint_files(folder: Path) -> dict[str, str]:
    """Tensor name → file name, from the index or from the files themselves. Raises ModelUnsupported."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        if index.stat().st_size > INDEX_BYTES_MAX:
            raise ModelUnsupported(f"{index.name} is over {INDEX_BYTES_MAX} bytes: this is no checkpoint.")
        try:
            names = json.loads(index.read_bytes())["weight_map"]
            if not all(isinstance(key, str) and isinstance(value, str) for key, value in names.items()):
                raise TypeError("weight_map is not a map of names")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelUnsupported(f"{index.name} cannot be read ({error}): download the model again.") from error
        for file_name in set(names.values()):
            if Path(file_name).name != file_name or not (folder / file_name).is_file():
                raise ModelUnsupported(f"the index names {file_name!r}, which is missing: download the model again.")
        return dict(names)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelUnsupported(f"{folder} holds no *.safetensors: other weight formats are not read, convert it.")
    names = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names.update(dict.fromkeys(opened.keys(), file.name))
        except SafetensorError as error:
            raise ModelUnsupported(f"{file.name} is not a safetensors file ({error}): download it again.") from error
    return names


def _read_tensors(
    folder: Path, files: dict[str, str], layers: tuple[int, int], config: Any, progress: Progress | None
) -> Iterator[tuple[str, torch.Tensor]]:
    first, stop = layers
    total = config.num_hidden_layers
    by_file: dict[str, list[tuple[str, str]]] = {}
    for name, file_name in files.items():
        wanted = _renumbered(name, first, stop, total, tied=bool(config.tie_word_embeddings))
        if wanted is not None:
            by_file.setdefault(file_name, []).append((name, wanted))
    for done, (file_name, pairs) in enumerate(sorted(by_file.items())):
        if progress is not None:
            progress("load", done / len(by_file))
        try:
            with safe_open(folder / file_name, framework="pt") as opened:
                for name, wanted in pairs:
                    # A copy, so that a file changed under a running node cannot change the weights we verified.
                    yield wanted, opened.get_tensor(name).clone()
        except SafetensorError as error:
            raise ModelUnsupported(f"{file_name} cannot be read ({error}): download it again.") from error
    if progress is not None:
        progress("load", 1.0)


def _renumbered(name: str, first: int, stop: int, total: int, *, tied: bool) -> str | None:
    """The name this tensor has in the slice, or None when the slice does not need it."""
    match = LAYER_NUMBER.search(name)
    if match is not None:
        number = int(match[3])
        if not first <= number < stop:
            return None  # another stage's, or an extra prediction layer behind the last
        return f"{name[: match.start(3)]}{number - first}{name[match.end(3) :]}"
    is_first, is_last = first == 0, stop == total
    if "embed" in name and "embed_out" not in name:
        return name if is_first or (is_last and tied) else None
    return name if is_last else None  # norm and head


@contextmanager
def quiet() -> Iterator[None]:
    """transformers reports loading on stderr; what matters of it comes back as an exception or in the loading info."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
