"""A plug-in that rounds, streams, adds noise and leaves evidence in the engine and trainer of verl, without a fork."""
