"""Floor 2: heal. Adaptive quantization noise (AQN): scheduled, bit-exactly undone, and proven to be there."""
