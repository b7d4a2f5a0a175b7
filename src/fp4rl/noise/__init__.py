"""Floor 2: noise. Adaptive quantization noise (AQN): scheduled, bit-exactly undone, and proven to be there."""
