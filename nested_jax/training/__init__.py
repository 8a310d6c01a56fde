"""Training: state, optimizer, step, loop, checkpoints and metrics. Imports nothing by itself, so that bad input is met early."""
