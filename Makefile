# make demo   train, export INT8, measure and report on the embedded digits; about five minutes on 2 CPU cores
# make test   everything the project checks of itself
# make arm64, make interpreters   what test leaves out, because it downloads: a bundle on emulated arm64, and under every
#                                 CPython 3.8 to 3.13 of this machine; RECORD=FILE writes down what was seen
# make docs   the documentation site, into site/
# All set up .venv first, once. PYTHON=/path/to/python3.12 chooses the interpreter; ARGS="-k cli" goes to pytest, which
# tests in two processes, each file in one of them (WORKERS=0: in one).
#
# Names are relative and quoted throughout, and the programs of .venv are called as `python -m ...`: the checkout may lie
# in a folder with a space in its name, which neither a make target nor the first line of a script survives.

.PHONY: demo test docs arm64 interpreters setup lock clean
.DEFAULT_GOAL := setup

PY := .venv/bin/python
WORKERS := 2
# Written last, so that an interrupted set-up is repaired by the next run (.venv/installing says that one was begun).
# Holds the folder, because .venv and the editable install name it: a checkout that was moved is set up again.
STAMP := .venv/installed
$(shell { [ -f $(STAMP) ] && [ "$$(cat $(STAMP))" = "$$(pwd)" ] && $(PY) -c ''; } 2>/dev/null || rm -f $(STAMP))

demo: $(STAMP)
	@set -e; \
	run="runs/demo-$$(date +%Y%m%d-%H%M%S)"; \
	kdedge() { printf '\n$$ kdedge %s\n' "$$*"; $(PY) -m kdedge "$$@"; }; \
	kdedge train-recipe mobilenet --data digits --labels 40 --out "$$run"; \
	kdedge export "$$run" --int8; \
	kdedge bench "$$run" --effort quick; \
	kdedge report "$$run"

test: $(STAMP)
	$(PY) -m ruff check .
	@$(PY) -m mypy & types=$$!; $(PY) -m pytest -n $(WORKERS) --dist loadfile $(ARGS); tests=$$?; \
	wait $$types || { echo "mypy found errors; they stand above."; exit 1; }; exit $$tests

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -f docs/mkdocs.yml
	@echo "Open site/index.html"

# Downloads go to ~/.cache/kdedge/proofs. BUNDLE=FOLDER takes a bundle of yours.
arm64: $(STAMP)
	BUNDLE="$(BUNDLE)" RECORD="$(RECORD)" $(PY) -m tests.device.arm64.prove

interpreters: $(STAMP)
	BUNDLE="$(BUNDLE)" RECORD="$(RECORD)" $(PY) -m tests.device.prove_interpreters

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@set -e; \
	python=; \
	for candidate in "$(PYTHON)" python3 python3.13 python3.12 python3.11 python; do \
	  if [ -n "$$candidate" ] && "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    python="$$candidate"; break; \
	  elif [ -n "$(PYTHON)" ]; then break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "kdedge needs Python 3.11, 3.12 or 3.13 with the venv module (on Debian: apt install python3-venv)." >&2; \
	  echo "$(if $(PYTHON),PYTHON=$(PYTHON) is not one.,None was found on PATH. Install one or name it: make PYTHON=/path/to/python3.12)" >&2; \
	  exit 2; \
	fi; \
	if [ -e .venv/installing ] || ! $(PY) -c 'import pip' 2>/dev/null; then \
	  echo "Making .venv with $$("$$python" --version)."; \
	  rm -rf .venv; "$$python" -m venv .venv; \
	fi; \
	touch .venv/installing; \
	echo "Installing the pinned packages into .venv: once, some minutes, errors only."; \
	$(PY) -m pip install -qq --disable-pip-version-check --require-hashes -r requirements.lock; \
	rm .venv/installing; \
	$(PY) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	$(PY) -c 'import torch, torchvision' || { \
	  echo "torch and torchvision do not fit each other: was another torch installed into .venv? Try: make clean, then again." >&2; \
	  exit 2; \
	}; \
	pwd > $(STAMP)

# Keeps the pins that still fit; `make lock ARGS=--upgrade` moves all of them. No host name ends up in the file.
lock:
	@command -v uv >/dev/null || { echo "make lock needs uv: install it with pip install uv" >&2; exit 2; }
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --group dev $(ARGS) pyproject.toml -o requirements.lock

# Keeps runs/: they are the user's.
clean:
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
