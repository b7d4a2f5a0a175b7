"""A tiny Qwen3 with a byte-level tokenizer, problems and a reward, in files as verl reads them."""

import json
from pathlib import Path

import torch

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWARD = "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
REWARD += "    return sum(c.isalpha() for c in solution_str) / max(len(solution_str), 1)\n"


def model(folder: Path, for_vllm: bool = False) -> Path:
    """Write the model: 2 layers, 64 wide, 14 linear layers. vLLM for CPUs wants heads of 64, and in its rollouts verl
    draws no token that the tokenizer has not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(fast) if for_vllm else 320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64 if for_vllm else 16,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def problems(folder: Path, count: int) -> Path:
    """Write `count` problems as verl's data sets hold them."""
    import pandas

    rows = [
        {
            "data_source": "tiny",
            "prompt": [{"role": "user", "content": f"{n} + {n}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * n)},
            "extra_info": {"index": n},
        }
        for n in range(count)
    ]
    file = folder / "problems.parquet"
    pandas.DataFrame(rows).to_parquet(file)
    return file


def experiment(folder: Path, **parts: object) -> Path:
    """Write the experiment: 2 steps in bfloat16."""
    content = {
        "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
        "training": {
            "steps": 2,
            "train_batch_size": 4,
            "mini_batch_size": 2,
            "rollout_n": 2,
            "lr": 1e-2,
            "algorithm": "grpo",
            "max_prompt_length": 64,
            "max_response_length": 8,
            "kl_loss_coef": 0.0,
            "rollout_correction": {"rollout_is": "token"},
        },
        "evaluation": {"count": 4, "max_new_tokens": 8, "profiles": ["full", "w4a16"]},
        "engine": "verl",
        "seed": 7,
    } | parts
    file = folder / "experiment.yaml"
    file.write_text(json.dumps(content))
    return file
