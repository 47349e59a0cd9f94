"""Call the function in ``params.function`` of the rule, with the rule's inputs, outputs and params as arguments."""

from kv_transition.worker.rules import carry_out

carry_out(snakemake.params.function, snakemake.input, snakemake.output, snakemake.params, snakemake.log[0])
