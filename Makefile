# `make demo` and `make test` set up .venv themselves; nothing else is needed than Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
OLDEST := $(VENV)/oldest
RUN := $(VENV)/bin/python

.PHONY: demo test test-all test-oldest lint format sync clean

demo: $(VENV)/ready
	$(VENV)/bin/samlight demo --out outputs/demo

test: $(VENV)/ready
	$(RUN) -m pytest -n 2 -q -m "not slow"

# Those too that a release needs, and a change to what they are about.
test-all: $(VENV)/ready
	$(RUN) -m pytest -n 2 -q

# The oldest transformers that pyproject.toml allows, laid over the environment.
test-oldest: $(OLDEST)/ready
	PYTHONPATH=$(abspath $(OLDEST)) $(RUN) -c "import transformers; assert transformers.__version__ == '5.17.0'"
	PYTHONPATH=$(abspath $(OLDEST)) $(RUN) -m pytest -n 2 -q

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The documentation site, in outputs/site: guides from docs/, the API from the docstrings. With --quiet, --strict would see no warning.
.PHONY: docs
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# The page of examples/web on 127.0.0.1, with the model of any checkpoint; fetches transformers.js with npm.
MODEL ?= checkpoints/sam-lightening-tiny
PORT ?= 8000
WEB := examples/web
.PHONY: web
web: $(WEB)/vendor/transformers.min.js $(WEB)/model/config.json
	$(RUN) $(WEB)/serve.py --port $(PORT)

$(WEB)/vendor/transformers.min.js: $(WEB)/package.json $(WEB)/vendor.mjs
	@command -v npm >/dev/null || { echo "make web needs npm (Node.js 20 or newer): https://nodejs.org"; exit 1; }
	cd $(WEB) && npm install --ignore-scripts --no-package-lock --no-audit --no-fund && node vendor.mjs
	mkdir -p $(WEB)/images && cp examples/images/*.jpg $(WEB)/images/
	touch $@

ifeq ($(origin MODEL),command line)
.PHONY: $(WEB)/model/config.json
endif
$(WEB)/model/config.json: $(VENV)/ready $(wildcard $(MODEL)/*.safetensors)
	$(VENV)/bin/samlight export $(MODEL) --format onnx --out $(WEB)/model --dtype fp32 fp16 int8

format: $(VENV)/ready
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Checkpoints in the repository carry a copy of modeling/, and the package one of the model card's template.
sync:
	for folder in checkpoints/*/; do rm -f "$$folder"*.py && cp modeling/[!_]*.py "$$folder" || exit 1; done
	cp model_card.md samlight_hf/publishing/model_card.md

clean:
	rm -rf $(VENV) outputs build dist *.egg-info

$(VENV)/ready: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

$(OLDEST)/ready: $(VENV)/ready
	rm -rf $(OLDEST)
	$(RUN) -m pip install --quiet --target $(OLDEST) transformers==5.17.0 'huggingface-hub<2'
	touch $@
