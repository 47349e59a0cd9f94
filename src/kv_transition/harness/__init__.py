"""The model type ``kv_transition`` of lm-evaluation-harness; it needs the extra ``lm-eval``."""
