"""Call the function that the rule names in ``params.function``, with its inputs, outputs and params as arguments."""

from kv_transition.worker.rules import carry_out

carry_out(snakemake.params.function, snakemake.input, snakemake.output, snakemake.params, snakemake.log[0])
