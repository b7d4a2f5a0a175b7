"""Load a model folder from this disk: weights or modules without weights, tokenizer, and a LoRA adapter if any."""

import json
import warnings
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from fp4rl.models.fit import joining_shards, keep_endings_alone, readable, require_bare_texts, require_ids_inside
from fp4rl.models.packed.folder import IN_CONFIG, PackedFolder, opened
from fp4rl.models.packed.into_model import decoded_into
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.numerics.device import accelerator
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.model import Embedded, ExpertsImplementation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Any one of these makes a tokenizer; `tokenizer_config.json` alone does not, though transformers would invent one.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tiktoken.model")


def load(
    path: str | Path, dtype: torch.dtype | str = torch.float32, experts: ExpertsImplementation | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in evaluation mode and its left-padding tokenizer; nothing is downloaded, no remote code is run.

    A folder with `adapter_config.json` is a peft adapter: its base model is loaded from the path that the file names. A
    tokenizer without a padding token pads with its end-of-text token. `experts` is how stacked experts are computed.
    Packed weights are decoded as the library of their layout does it, and hold its rounding.
    Raises NotFoundError for a folder, configuration, tokenizer or weight that is missing, InvalidValueError for what
    cannot be read, for weights quantized by a method not known here, for a tokenizer that closes its prompts or does
    not fit the embedding, and for `experts` where there is no choice.
    """
    folder, kind = _folder(path), dtype_named(dtype)
    base = base_of(folder)
    # The tokenizer first: where it is missing, nobody should have to wait for the weights.
    tokenizer = tokenizer_of(folder)
    model = _weights(base or folder, kind, experts, folder)
    require_ids_inside(model, tokenizer, base or folder)
    keep_endings_alone(model, tokenizer)
    return (model if base is None else _adapted(model, folder)).eval(), tokenizer


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer for a model folder: its own, or that of an adapter's base."""
    base = base_of(folder)
    return load_tokenizer(folder if base is None or _has_tokenizer(folder) else base)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the folder's tokenizer, padding on the left, with a padding token in any case."""
    if not _has_tokenizer(folder):
        raise NotFoundError(f"model folder {str(folder)!r} has no tokenizer; save one there (save_pretrained)")
    with readable("the tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InvalidValueError(f"the tokenizer in {str(folder)!r} has no pad and no eos token; set one and save again")
    with readable("the tokenizer", folder):
        require_bare_texts(tokenizer, folder)
    return tokenizer


def dtype_named(dtype: torch.dtype | str) -> torch.dtype:
    """Return torch.bfloat16 for `"bfloat16"`; a torch dtype as it is."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InvalidValueError(f"no dtype {dtype!r} for a model{nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


def _folder(path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise NotFoundError(f"model folder {str(path)!r} does not exist; give a Hugging Face folder on this disk")
    described = any((Path(path) / name).is_file() for name in ("config.json", "adapter_config.json"))
    if not described and (joining := joining_shards(Path(path))) is not None:
        raise NotFoundError(f"{str(path)!r} holds the parts of verl's ranks: `{joining}` joins them, in bfloat16")
    return Path(path)


def _require_weights(folder: Path) -> PackedFolder | None:
    """Return what is packed in a folder, None where its weights are as they are."""
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"model folder {str(folder)!r} has no config.json; is it a Hugging Face model folder?")
    return opened(folder)


def _weights(folder: Path, dtype: torch.dtype, experts: str | None, own: Path) -> Any:
    packed = _require_weights(folder)
    with readable("the model", folder):
        how: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, **_attention(dtype)}
        how["experts_implementation"] = experts or _experts_of(own, folder)
        config = _config(folder)
        if packed is None:
            model, report = _auto_class(config).from_pretrained(folder, local_files_only=True, **how)
        else:
            model, report = decoded_into(_auto_class(config), config, packed, how)
    _require_choice(model, experts)
    _name_backbone(model)
    if report["missing_keys"]:  # transformers would go on with random numbers in their place
        missing = sorted(report["missing_keys"])
        raise NotFoundError(f"the model in {str(folder)!r} lacks {len(missing)} weights ({missing[0]!r}); copy it anew")
    return model


def _config(folder: Path) -> Any:
    """Return the configuration of the unquantized model."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for part, key in product((config, *vars(config).values()), IN_CONFIG):
        if isinstance(part, PreTrainedConfig) and key in vars(part):
            delattr(part, key)
    return config


def _auto_class(config: Any) -> Any:
    """Return what opens a model whole: a multimodal one with its towers, so that it is saved as it came."""
    multimodal = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM


def _experts_of(*folders: Path) -> str | None:
    """Return how the first folder that says so computes stacked experts; kernels out of reach are not taken."""
    files = [folder / "config.json" for folder in folders]
    said = [
        json.loads(file.read_text(encoding="utf-8")).get("experts_implementation") for file in files if file.exists()
    ]
    return next((how for how in said if how in get_args(ExpertsImplementation)), None)


def _name_backbone(model: Any) -> None:
    """Correct the name under which a class says that the part below its head stands (Llama-4: where none is)."""
    if model.base_model is model:
        head = model.get_output_embeddings()
        around = [module for module in model.modules() if any(child is head for child in module.children())]
        below = [part for module in around for part in module.children() if isinstance(part, PreTrainedModel)]
        if below:  # kept beside the modules, so that no weight has two names: it may stand deeper than one level
            vars(model)["below_head"], model.base_model_prefix = below[0], "below_head"


def _require_choice(model: Any, experts: str | None) -> None:
    if experts is not None and not model._can_set_experts_implementation():
        kind = type(model).__name__
        raise InvalidValueError(f"model.experts_implementation: {kind} computes its experts in one way; leave it out")


def _attention(dtype: torch.dtype) -> dict[str, str]:
    """Return the attention to load with: one that gives a query the same bits alone and among many.

    The CPU's fused kernel rounds 16-bit products differently while decoding and in one pass, which with 4-bit inputs
    becomes up to 0.01 nats a token. With the eager formula it is 0.
    """
    apart = dtype in (torch.bfloat16, torch.float16) and accelerator() is None
    return {"attn_implementation": "eager"} if apart else {}


def base_of(folder: Path) -> Path | None:
    """Return the base model's folder where `folder` holds an adapter, else None."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        return None
    with readable("adapter_config.json", folder):
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        is_local = bool(base) and Path(base).is_dir()
    if not is_local:
        raise NotFoundError(f"{config}: base model {base!r} is no folder here; set base_model_name_or_path to one")
    if (Path(base) / config.name).is_file():
        raise InvalidValueError(f"{config}: base model {base!r} is an adapter; merge it first (merge_and_unload)")
    return Path(base)


def embedded_skeleton(recipe: Embedded) -> PreTrainedModel:
    """Build the embedded model before its warm-up."""
    return build(recipe, build_tokenizer())


def skeleton(path: str | Path, experts: ExpertsImplementation | None = None, *, tokenizer: bool = True) -> Any:
    """Build the modules of a Hugging Face folder on the meta device, an adapter's on its base, enough to resolve what
    would be rounded, without memory. Raises what `load` does, of weights nothing, of the `tokenizer` unless it is not
    needed."""
    own = _folder(path)
    folder = base_of(own) or own
    _require_weights(folder)
    ids = load_tokenizer(folder) if tokenizer else None
    with readable("the config.json", folder):
        config = _config(folder)
        config._experts_implementation = experts or _experts_of(own, folder)
        with torch.device("meta"):
            model = _auto_class(config).from_config(config)
    _require_choice(model, experts)
    if ids is not None:
        require_ids_inside(model, ids, folder)
    return model if folder == own else _adapted_skeleton(model, own)


def _adapted_skeleton(model: Any, folder: Path) -> Any:
    from peft import PeftConfig, get_peft_model

    with readable("the adapter", folder):
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = False  # as `load` opens it, to be trained
        return get_peft_model(model, config, low_cpu_mem_usage=True)


def names_in_memory(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Return what `model` calls each tensor of its files, which may have older names, as transformers renames it."""
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    return {name: rename_source_key(name, renamings, [])[0] for name in stored}


def _adapted(model: Any, folder: Path) -> Any:
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    with readable("the adapter", folder):
        given = load_peft_weights(str(folder), device="cpu")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error, raised below
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=True)
    missing = sorted(set(get_peft_model_state_dict(adapted)) - set(given))
    if missing:  # such weights start at zero effect: the base model would be measured under the adapter's name
        raise NotFoundError(f"the adapter in {str(folder)!r} lacks {len(missing)} weights ({missing[0]!r}); save anew")
    return adapted


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)
