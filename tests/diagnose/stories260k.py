"""The trained 260 k-parameter Llama of the shared data as a transformers model, and its tokenizer.

Layout of the file (llama2.c, version 1): 256 bytes of header, then float32 arrays kind by kind, each over all layers.
"""

import struct
from itertools import pairwise
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def load_stories(folder: Path) -> LlamaForCausalLM:
    raw = (folder / "checkpoint_v1.bin").read_bytes()
    magic, version, dim, hidden, layers, heads, kv_heads, vocab, longest = struct.unpack("<IiIIIIIII", raw[:36])
    assert (magic, version) == (0x616B3432, 1)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=longest,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    values, at = torch.frombuffer(bytearray(raw[256:]), dtype=torch.float32), 0

    def take(*shape):
        nonlocal at
        size = torch.Size(shape).numel()
        at += size
        return values[at - size : at].view(shape).clone()

    kv = dim // heads * kv_heads
    state = {}
    for name, shape in (
        ("input_layernorm", (dim,)),
        ("post_attention_layernorm", (dim,)),
        (None, (dim,)),
        ("embed", (vocab, dim)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv, dim)),
        ("self_attn.v_proj", (kv, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ):
        if name is None:
            state["model.norm.weight"] = take(*shape)
        elif name == "embed":
            state["model.embed_tokens.weight"] = state["lm_head.weight"] = take(*shape)
        else:
            for layer in range(layers):
                state[f"model.layers.{layer}.{name}.weight"] = take(*shape)
    for layer in range(layers):
        for name, count in (("q_proj", heads), ("k_proj", kv_heads)):
            key = f"model.layers.{layer}.self_attn.{name}.weight"
            state[key] = _halves_from_pairs(state[key], count)
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def _halves_from_pairs(weight, heads):
    """llama2.c rotates neighbouring pairs of a head, transformers its two halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def encode(folder: Path, text: str) -> list[int]:
    """Greedy merging by score, as llama2.c does; text of known characters only."""
    raw, at = (folder / "tokenizer.bin").read_bytes(), 4
    pieces, scores = {}, {}
    for index in range(512):
        score, length = struct.unpack_from("<fi", raw, at)
        piece = raw[at + 8 : at + 8 + length].decode("utf-8", errors="replace")
        at += 8 + length
        pieces.setdefault(piece, index)
        scores[index] = score
    by_index = {index: piece for piece, index in pieces.items()}
    tokens = [pieces[" "], *(pieces[c] for c in text if c in pieces)]
    while True:
        merges = [(scores[pieces[p]], i) for i, p in enumerate(_pairs(tokens, by_index)) if p in pieces]
        if not merges:
            return [1, *tokens]
        _, i = max(merges, key=lambda merge: (merge[0], -merge[1]))
        tokens[i : i + 2] = [pieces[by_index[tokens[i]] + by_index[tokens[i + 1]]]]


def _pairs(tokens, by_index):
    return [by_index[a] + by_index[b] for a, b in pairwise(tokens)]
