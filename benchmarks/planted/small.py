"""A small experiment that still goes the whole way: a warmed-up embedded model, real rollouts, real updates."""

SMALL = {
    "model": {"embedded": {"warm_up_steps": 60}},
    "task": {"name": "arithmetic", "difficulty": 1, "train_count": 64},
    "training": {
        "steps": 2,
        "train_batch_size": 4,
        "mini_batch_size": 2,
        "rollout_n": 4,
        "max_response_length": 32,
        "overlong_buffer": {"len": 8},
        "filter_groups": {"enable": False},
        "entropy_coeff": 1e-3,  # every update moves the weights, with and without spread in the few answers
    },
}
