# `make` alone lists the targets. Another interpreter: make .venv PYTHON=python3.12

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-floors mutants faults fuzz gpu-check bench docs lint audit clean

PYTHON ?= python3
KILLS ?= 20
VENV := .venv/bin/python
INSTALLED := .venv/.installed  # written last: without it the environment is incomplete

help:  ## list the targets
	@awk -F ':.*## ' '/^[-.a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv: $(INSTALLED)  ## create or update the virtual environment (PYTHON=python3.12 to choose)

$(INSTALLED): pyproject.toml constraints.txt
	@rm -f $@
	@if ! $(VENV) -m pip --version > /dev/null 2>&1; then \
		version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') \
			|| { echo "make: $(PYTHON) does not run; name another: make .venv PYTHON=python3.12" >&2; exit 1; }; \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
			|| { echo "make: $(PYTHON) is Python $$version, adni-ldm needs 3.11 or newer; name another: make .venv PYTHON=python3.12" >&2; exit 1; }; \
		$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null \
			|| { echo "make: $(PYTHON) has no venv module; on Debian or Ubuntu: apt install python$$version-venv" >&2; exit 1; }; \
		$(PYTHON) -m venv --clear .venv; \
	fi
	$(VENV) -m pip install -e '.[test]' -c constraints.txt
	@touch $@

demo: .venv runs/demo/data  ## synthetic cohort, VAE, diffusion model, samples and a summary, in runs/demo
	@$(VENV) examples/demo_estimate.py
	rm -rf runs/demo/vae runs/demo/ldm runs/demo/samples
	$(VENV) train_vae.py --config configs/demo/vae.yaml
	$(VENV) train_ldm.py --config configs/demo/ldm.yaml
	$(VENV) sample.py --class all --num_images 64 --model runs/demo/ldm --output_dir runs/demo/samples --trajectory
	$(VENV) examples/demo_report.py

runs/demo/data: | .venv
	$(VENV) prepare_data.py phantom --output_dir $@ --subjects 200 --slices 10 --image_size 64 --seed 0

test: .venv  ## run the tests
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n 2 --dist loadfile

test-floors:  ## run the quick tests with the oldest versions that pyproject.toml admits, in .venv-floors
	$(PYTHON) -m venv --clear .venv-floors
	.venv-floors/bin/python -m pip install uv
	.venv-floors/bin/uv pip install --python .venv-floors/bin/python --resolution lowest-direct \
		'.[scans,eval,lora,app]'
	.venv-floors/bin/uv pip install --python .venv-floors/bin/python pytest scikit-learn
	OMP_NUM_THREADS=1 .venv-floors/bin/python -m pytest -m 'not slow' \
		tests/test_loading.py tests/test_pipeline.py tests/test_config.py tests/models tests/data

mutants: .venv  ## break the code behind each claim, and see that a test notices; half an hour on 2 cores
	$(VENV) tests/mutations.py

faults: .venv  ## interrupt and damage every command in every known way, and resume it (KILLS=100: half an hour)
	$(VENV) tests/faults/run_faults.py
	$(VENV) benchmarks/faults.py --kills $(KILLS)
	OMP_NUM_THREADS=1 $(VENV) -m pytest tests/faults/test_launches.py

fuzz: .venv  ## read 10,000 mutated files of each format, as untrusted ones are; goes on if interrupted
	$(VENV) tests/fuzz/run_fuzz.py --write --workers 2 --resume runs/fuzz

gpu-check: .venv  ## checks that need a CUDA device: fp16, bit-identical resume, speed and memory
	$(VENV) benchmarks/gpu_check.py

bench: .venv | runs/demo/ldm  ## speed, scaling, and sample quality beside other methods; two hours on 2 cores
	$(VENV) benchmarks/throughput.py
	$(VENV) benchmarks/scaling.py
	$(VENV) benchmarks/baselines.py
	$(VENV) benchmarks/end_to_end.py
	$(VENV) benchmarks/samplers.py --run runs/demo
	$(VENV) benchmarks/finetune.py --model runs/demo/ldm
	$(VENV) benchmarks/counterfactual.py --run runs/demo

runs/demo/ldm: | .venv
	$(MAKE) demo

docs: .venv  ## generate the pages of settings in docs/settings from the code
	$(VENV) docs/make_settings.py

lint: .venv  ## check style and format
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

audit:  ## known vulnerabilities of constraints.txt; needs pip-audit and the network; not part of CI
	@command -v pip-audit > /dev/null || { echo "make: audit needs pip-audit: pipx install pip-audit" >&2; exit 1; }
	@status=0; found=$$(pip-audit --requirement constraints.txt --no-deps --disable-pip 2>&1) || status=$$?; \
	echo "$$found" | tail -n 40; \
	case "$$found" in \
		*"could not be audited"*) echo "make: audit: not all versions could be looked up from here" >&2; exit 1;; \
		*"known vulnerabilit"*) exit $$status;; \
		*) echo "make: audit: the advisories cannot be reached from here; nothing was checked" >&2; exit 1;; \
	esac

clean:  ## remove caches and build files; keeps .venv, data and runs
	rm -rf build dist .pytest_cache .ruff_cache .venv-floors *.egg-info
	find . -path ./.venv -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf
