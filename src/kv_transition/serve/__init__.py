"""An OpenAI-compatible server over the local engine, whose requests name policy and budget."""
