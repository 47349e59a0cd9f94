"""The model type ``kv_transition`` of lm-evaluation-harness; the package lm-eval is needed, the extra ``lm-eval``."""
