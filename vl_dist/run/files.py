"""Names of what a run leaves in its output directory. Apart from what needs torch, which a report does not load."""

CONFIG = "config.yaml"
OUTCOME = "outcome.json"
METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
METADATA = "training_metadata.json"
WANDB_RUN = "wandb_run.json"
TENSORBOARD = "tensorboard"
