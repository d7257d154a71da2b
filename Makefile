# `make` alone lists the targets. Everything is installed into .venv; nothing else on the machine is touched.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
VENV_STAMP := $(VENV)/.stamp-venv
RUN_STAMP := $(VENV)/.stamp-run
DEV_STAMP := $(VENV)/.stamp-dev
MODELS_STAMP := $(VENV)/.stamp-models
CODE := waver_core curation training serving benchmarks tests

# Folders reach the shell by the environment, so that names with spaces need no care.
VIDEOS ?=
OUT ?=
PROFILE ?= embedded
CLIPS ?= 480
MINUTES ?= 4
BASE ?=
REFINER ?=
PORT ?= 8000
export VIDEOS OUT PROFILE CLIPS MINUTES BASE REFINER PORT

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo demo-training demo-serving serve test check format bench models fetch-models check-backends clean setup setup-dev setup-models constraints

help:  ## List the targets
	@echo "make demo                  Render a collection, curate it, train a tiny model, serve it (about nine minutes)"
	@echo "make demo VIDEOS=/folder   Curate your own videos"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | grep -v '^demo:' | awk -F ':.*## ' '{printf "make %-21s %s\n", $$1, $$2}'

demo: $(RUN_STAMP)  ## Curate, train and serve rendered collections, or curate VIDEOS=/folder, into OUT=/folder
	@set -e; out="$$OUT"; profile=""; \
	if [ -z "$$VIDEOS" ]; then \
	  out="$${out:-out/demo}"; VIDEOS="$$out/videos"; profile="--profile demo"; \
	  $(PY) -m waver_core.synthetic --output "$$VIDEOS"; \
	else \
	  out="$${out:-out/run-$$(basename "$$VIDEOS")}"; \
	fi; \
	$(PY) curation/run_funnel.py $$profile --input "$$VIDEOS" --output "$$out"; \
	if [ -n "$$profile" ]; then \
	  $(MAKE) --no-print-directory demo-training OUT="$$out/training"; \
	  $(MAKE) --no-print-directory demo-serving OUT="$$out/served" BASE="$$out/training/run/t2v_192p_12fps/export" \
	    REFINER="$$out/training/run/refine_1080p/export"; \
	fi

demo-training: $(RUN_STAMP)  ## Render and curate CLIPS=480 small clips, train a tiny model on them for MINUTES=4, sample it
	@set -e; out="$${OUT:-out/demo/training}"; stage=t2v_192p_12fps; \
	$(PY) -m waver_core.synthetic --training "$$CLIPS" --output "$$out/videos"; \
	$(PY) curation/run_funnel.py --profile tiny --input "$$out/videos" --output "$$out/curated"; \
	$(PY) training/stage.py --profile embedded --profile tiny --stage "$$stage" --curated "$$out/curated" --output "$$out/run" \
	  --set "training.stages.$$stage.schedule.max_minutes=$$MINUTES"; \
	$(PY) training/sample.py --export "$$out/run/$$stage/export" --output "$$out/samples/sample.mp4" --sheet "$$out/samples/sheet.jpg" \
	  --prompt "A medium-sized red disc moves to the left over a white background." \
	  --prompt "A medium-sized green disc moves to the right over a beige background." \
	  --prompt "A medium-sized blue disc moves up over a white background." \
	  --prompt "A medium-sized magenta disc moves down over a beige background."; \
	echo "Filmstrips of the four: $$out/samples/sheet.jpg"; \
	$(PY) training/stage.py --profile embedded --profile tiny --stage refine_1080p --curated "$$out/curated" --output "$$out/run" \
	  --set "training.stages.refine_1080p.after=$$stage" --set training.stages.refine_1080p.schedule.max_minutes=1

demo-serving: $(RUN_STAMP)  ## Start a server on BASE=/export [REFINER=/export], make videos through HTTP into OUT=/folder, stop it
	@set -e; out="$${OUT:-out/demo/served}"; base="$${BASE:-out/demo/training/run/t2v_192p_12fps/export}"; \
	$(PY) serving/demo.py --base "$$base" $${REFINER:+--refiner "$$REFINER"} --output "$$out"

serve: $(RUN_STAMP)  ## Serve BASE=/export [REFINER=/export] on 127.0.0.1, PORT=8000, page and all (default: what make demo trained)
	@demo=out/demo/training/run; base="$$BASE"; refiner="$$REFINER"; \
	if [ -z "$$base" ]; then \
	  base="$$demo/t2v_192p_12fps/export"; if [ -d "$$demo/refine_1080p/export" ]; then refiner="$$demo/refine_1080p/export"; fi; \
	fi; \
	exec $(PY) serving/run.py --profile embedded --profile tiny --base "$$base" $${refiner:+--refiner "$$refiner"} --port "$$PORT" $(ARGS)

test: $(DEV_STAMP)  ## Run the tests; ARGS="-k name" chooses among them
	@$(PY) -m pytest $(ARGS)

check: $(DEV_STAMP)  ## Lint, format, types, and who may import whom
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(DEV_STAMP)  ## Format the code and mend what the linter can
	$(PY) -m ruff check --fix $(CODE)
	$(PY) -m ruff format $(CODE)

bench: $(DEV_STAMP)  ## List the benchmarks; each is a script with its own --help
	@for script in benchmarks/[a-z]*.py; do case "$$script" in */common.py) ;; *) echo "$(PY) $$script";; esac; done

models: $(RUN_STAMP)  ## List the checkpoints and packages that PROFILE=small needs, and which are here
	@$(PY) curation/models.py list --profile "$$PROFILE"

fetch-models: $(RUN_STAMP)  ## Download the checkpoints of PROFILE=small that are missing
	@$(PY) curation/models.py fetch --profile "$$PROFILE"

check-backends: $(RUN_STAMP)  ## Load every backend of PROFILE=small and let it answer on one clip
	@$(PY) curation/models.py check --profile "$$PROFILE"

setup: $(RUN_STAMP)  ## Install what running needs into .venv
setup-dev: $(DEV_STAMP)  ## Install what running, tests and checks need into .venv
setup-models: $(MODELS_STAMP)  ## Install what backends with weights need into .venv (transformers, diffusers, open_clip)

clean:  ## Remove .venv, caches and builds; results in out/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(CODE) -type d -name __pycache__ -prune -exec rm -rf {} +

constraints:  ## Resolve every dependency anew and write constraints.txt
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(PYTHON) -m venv "$$folder/venv"; \
	"$$folder/venv/bin/pip" install ".[dev,models,s3,gs]"; \
	{ grep '^#' constraints.txt; "$$folder/venv/bin/pip" freeze --exclude openwaver; } > "$$folder/constraints.txt"; \
	cp "$$folder/constraints.txt" constraints.txt

$(VENV_STAMP):
	@command -v "$(PYTHON)" >/dev/null || { echo "error: no '$(PYTHON)' on this machine: install Python 3.11 or newer, or run make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1), OpenWaver needs 3.11 or newer: run make PYTHON=python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: '$(PYTHON)' lacks the venv module: install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

$(RUN_STAMP): pyproject.toml constraints.txt | $(VENV_STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(VENV_STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,models]"
	@touch $(RUN_STAMP) $@

$(MODELS_STAMP): pyproject.toml constraints.txt | $(VENV_STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[models]"
	@touch $(RUN_STAMP) $@
