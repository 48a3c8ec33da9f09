# make demo   a real result in one command: three papers re-measured, and the page
# make test   everything the tests need, and the tests
# make docs   the documentation, with a page a paper, as a static site
# make readme the READMEs' table of papers, from the cards and the published evidence
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev,peers,rl,search,ray,browser,docs
DEMO ?= confident_learning soft_nearest_neighbor decision_transformer

.PHONY: demo test lint docs readme clean

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'saigen needs Python 3.11 or later; this is ' + sys.version.split()[0])"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/core: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/all: $(VENV)/core
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo: $(VENV)/core
	$(BIN)/saigen run $(DEMO)
	$(BIN)/saigen report --out saigen-report

test: $(VENV)/all
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST)

lint: $(VENV)/all
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

$(VENV)/docs: $(VENV)/core
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

docs: $(VENV)/docs
	$(BIN)/python -m mkdocs build --strict --site-dir site
	@echo "the documentation is at $(CURDIR)/site/index.html"

readme: $(VENV)/core
	$(BIN)/python docs/readme.py

clean:
	rm -rf $(VENV) saigen-report saigen-digest site
