"""Train your own model under 4-bit rounding: plain PyTorch, and one `with` around the loop."""

import torch
from torch import nn

import fp4rl


def main(steps: int = 20) -> float:
    """Fit a small network under W4A4 (MXFP4 weights and matmul inputs); returns the last loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = torch.randn(256, 64)
    y = x[:, :1] * x[:, 1:2]

    injection = fp4rl.Injection.named("w4a4", deployment="compressed_tensors")
    with fp4rl.attach(model, injection) as injected:
        for _ in range(steps):
            loss = nn.functional.mse_loss(model(x), y)  # forward and grad_input meet the rounded weights
            optimizer.zero_grad()
            loss.backward()  # grad_weight reaches the master weights
            optimizer.step()  # the rounded copies are thrown away by themselves
        print(injected.report())  # what was rounded, how often, and by how much
    return loss.item()  # outside the `with` the model is as it was: only its weights were trained


if __name__ == "__main__":
    print(f"last loss {main():.4f}")
