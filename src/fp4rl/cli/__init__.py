"""Floor 6: the command line, one file a verb. `--help` never imports torch."""
