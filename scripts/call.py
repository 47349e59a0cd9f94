"""Call the function that the rule names in ``params.function``, with its inputs, outputs and params as arguments."""

from kv_transition.script import call, logged

with logged(snakemake.log[0]):
    call(snakemake.params.function, snakemake.input, snakemake.output, snakemake.params)
