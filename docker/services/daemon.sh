#!/bin/bash
# The daemon. Its jobs may report to Weights & Biases, so it alone gets that key, and not through its command line.
if [[ -r /run/dropforge/secrets/WANDB_API_KEY ]]; then
	WANDB_API_KEY=$(</run/dropforge/secrets/WANDB_API_KEY)
	export WANDB_API_KEY
fi
exec /opt/venv/bin/dropforge watch
