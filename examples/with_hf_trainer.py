"""The same in a Hugging Face Trainer: attach before it starts, take it out when it is done."""

import tempfile

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

import fp4rl


def main(steps: int = 4) -> list[dict]:
    """Train a tiny random Qwen2 under W4A16 on random tokens; returns the evidence, one row per phase and site."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    rows = torch.randint(0, 64, (32, 16))
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder, fp4rl.attach(model, fp4rl.Injection.named("w4a8")) as injected:
        arguments = TrainingArguments(folder, max_steps=steps, report_to=[], disable_tqdm=True, save_strategy="no")
        Trainer(model=model, args=arguments, train_dataset=data).train()
        evidence = injected.evidence()
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear  # taken out again
    return evidence


if __name__ == "__main__":
    for row in main()[:4]:
        print(row)
