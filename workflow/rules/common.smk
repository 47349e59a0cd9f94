# The experiment, its paths and its grid, as the rules use them.
import atexit
import gc
import inspect
import json
import os
import shlex
import sys
from functools import cache

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

from kv_transition import settings as settings_module
from kv_transition import paths as paths_module
from kv_transition import locks, preflight, specs, yaml_text
from kv_transition.studies.grid import specs as grid_specs
from kv_transition.errors import UserError
from kv_transition.paths import Paths
from kv_transition.studies import registry
from kv_transition.report.section import template_folders
from kv_transition.worker import runs
from kv_transition.provenance import code_hash, content_digest, digest, read_metadata

# A plan of 10,000 jobs creates a million objects that are kept until the end, so a search for garbage takes time and
# finds none. The search is done again from the first job on, without the objects of the plan.
gc.set_threshold(2_000_000)
atexit.register(gc.freeze)  # otherwise Python searches all of them when it ends


def experiment():
    """The checked configuration; `--config set='model.device=cpu ...'` changes single keys of it."""
    plain = dict(config)
    for file in workflow.configfiles:  # Snakemake has read it, but does not detect duplicate keys
        yaml_text.read_yaml(file, "experiment file")
    given = plain.pop("set", "")  # text, or a list if values contain blanks
    assignments = [str(a) for a in given] if isinstance(given, list) else shlex.split(str(given))
    settings = settings_module.parse(settings_module.override(plain, assignments))
    specs.check(settings)
    return settings


def refusing(work, *arguments):
    """Return what a function returns; on bad input end with its sentence and status 2, as the command line does."""
    try:
        return work(*arguments)
    except UserError as error:
        if not workflow.is_main_process:
            raise WorkflowError(str(error)) from None
        print(error, file=sys.stderr)
        sys.exit(2)


SETTINGS = refusing(experiment)
POLICIES = {name: dict(options or {}) for name, options in SETTINGS.kv.policies.items()}
FILES = Paths(SETTINGS.output.dir, SETTINGS.experiment)

# A killed run leaves Snakemake's lock behind. This record shows the next run that no process holds the lock.
if workflow.is_main_process and not workflow.dryrun:
    locks.enter(FILES.root)


onstart:
    gc.freeze()
    gc.set_threshold(10_000)
    if not os.environ.get(preflight.CHECKED):  # the command line has looked already
        refusing(preflight.check, SETTINGS)


REPO = os.path.dirname(os.path.dirname(workflow.current_basedir.get_path_or_uri(secret_free=True)))
TASKS = SETTINGS.tasks
BINS = range(SETTINGS.binning.n_bins)

# With adaptive allocation a bin runs in shards, each in its own folder; otherwise it runs as a whole.
ADAPTIVE = SETTINGS.adaptive.enabled
SHARDS = SETTINGS.adaptive.shards
PIECES = FILES.shard("{shard}") if ADAPTIVE else FILES

# Answers of an endpoint need no GPU on this machine and no prefill.
REMOTE = SETTINGS.engine.kind == "openai"
ON_GPU = SETTINGS.model.device != "cpu" and not REMOTE
GPU = (
    {
        "gpu": 1,
        "gpu_model": SETTINGS.hardware.gpu_model,
        "mem_mb": lambda wildcards, attempt: SETTINGS.hardware.mem_gb * 1000 * attempt,
        "runtime": lambda wildcards, attempt: SETTINGS.hardware.runtime_min * attempt,
    }
    if ON_GPU
    else {"gpu": 0}
)


wildcard_constraints:
    task=paths_module.TASK,
    mode=paths_module.MODE,
    policy=paths_module.POLICY,
    budget=paths_module.BUDGET,
    bin=paths_module.BIN,
    shard=paths_module.SHARD,
    look=paths_module.LOOK,


# How requests are sent to an endpoint; no answer depends on it. If the resource "endpoint" has the limit 1, one job sends
# requests at a time, and its measured times do not include other jobs.
REQUEST = SETTINGS.engine.request
ALONE = getattr(workflow.global_resources.get("endpoint"), "value", None) == 1


# Jobs import the package from the checkout in every environment: conda's if it is enabled, otherwise Snakemake's own. The
# location of prefills and their additional statistics change no result, so they are environment variables, not params.
# A worker that runs jobs of this run ends with it.
os.environ[runs.VARIABLE] = runs.current()
IN_CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
shell.prefix(
    f"export PYTHONPATH={shlex.quote(os.path.join(REPO, 'src'))}"
    f" KVT_PREFILL_STORE={shlex.quote(f'{FILES.prefill_store}:{SETTINGS.prefill.store}:{SETTINGS.prefill.max_gb}')}"
    f" KVT_MODELS={shlex.quote(FILES.models)}"
    f" KVT_STATISTICS={','.join(specs.statistics(SETTINGS))}"
    f" KVT_REQUESTS={REQUEST.retries}:{REQUEST.concurrency}:{int(ALONE)}:{SETTINGS.engine.api_key_env or ''}"
    + ("" if IN_CONDA else f" PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH")
    + "; "
)


def calling(function, *modules):
    """Return the params of a job that calls ``module:function``: that name, and a hash of its code and of ``modules``."""
    return {"function": function, "code": code_hash(function.partition(":")[0], *modules)}


def in_report(figure, ext):
    """Return the path of a figure, marked for Snakemake's own report."""
    return report(FILES.plot(figure, ext), caption="../report/plot.rst", category="Figures", labels={"figure": figure})


def figures(names):
    """Return the outputs of a plotting job, each figure as SVG (shown in Snakemake's report) and as PNG."""
    svg = {f"{name}_svg": in_report(name, "svg") for name in names}
    return svg | {f"{name}_png": FILES.plot(name, "png") for name in names}


def for_each_cell(function):
    """Return the function with its signature stored: Snakemake asks for it several times for each job."""
    function.__signature__ = inspect.signature(function)
    return function


def as_json(value):
    return json.dumps(value, sort_keys=True)


# What each study adds: result files, tables that the report shows by name, and files that must exist before the report
# is written.
TARGETS = []
TABLES = {}
BEFORE_REPORT = []
