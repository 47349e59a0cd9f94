# The cells of the grid, and the files that a cell needs in addition to its bin and prefills.
from kv_transition.specs.policies import recall_of
from kv_transition.studies.grid import specs as grid_specs

CELLS = [FILES.cell(task, *key, bin) for task in TASKS for key in grid_specs.cells(SETTINGS) for bin in BINS]
CALIBRATION = FILES.file("calibration/{task}.json")


# Whether any cell needs the output of another job. If not, no function is called for each cell.
RECALLING = any(recall_of(SETTINGS, policy) is not None for policy in POLICIES)


# Cells of entropy_recall need files of other jobs: a tau calibrated on examples that no cell uses, and, for controls, the
# cell with the same number of recalls. Other cells need none.
def calibration_of(wildcards):
    return CALIBRATION.format(task=wildcards.task) if grid_specs.calibrated(SETTINGS, wildcards.policy) else []


def treated_of(wildcards):
    treated = grid_specs.treated(SETTINGS, wildcards.policy)
    if treated is None:
        return []
    return PIECES.cell("{task}", "{mode}", treated, "{budget}", "{bin}").format(**dict(wildcards.items()))


@cache
def cell_spec(mode, policy, budget):
    """A cell's spec and the hash that its rows carry."""
    return grid_specs.cell(SETTINGS, mode, policy, budget)


@cache
def cell_json(mode, policy, budget):
    return as_json(cell_spec(mode, policy, budget))


@for_each_cell
def spec_of_cell(wildcards):
    return cell_json(wildcards.mode, wildcards.policy, wildcards.budget)


@for_each_cell
def longest_first(wildcards):
    return int(wildcards.bin)
