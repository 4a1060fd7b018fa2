# make demo   aligns the embedded model and writes a report     make test   checks everything
# Another interpreter: make demo PYTHON=python3.12. On Linux without a GPU, PyTorch's CPU build is
# much smaller: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
PYTHON ?= python3
install = .venv/bin/pip install -qq --disable-pip-version-check -c constraints.txt -e

.PHONY: demo test check browser

demo: .venv/run.stamp
	@.venv/bin/craftune run recipes/demo.toml

test: check browser
	@echo "test: pytest"
	@OMP_NUM_THREADS=1 .venv/bin/pytest -q -n auto --maxprocesses 4 --dist loadfile

check: .venv/dev.stamp
	@echo "check: ruff, pyright"
	@.venv/bin/ruff check -q .
	@.venv/bin/ruff format -q --check .
	@.venv/bin/pyright

# The report's tests drive Debian's chromium; where it cannot be installed they say so and skip.
browser:
	@command -v chromium >/dev/null || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	  && echo "install: chromium, for the tests of the report" && apt-get update -qq \
	  && apt-get install -y -qq --no-install-recommends chromium >/dev/null 2>&1; } \
	  || echo "install: no chromium here, so the browser tests will skip"

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"craftune needs Python 3.11 or newer, this is {v[0]}.{v[1]}; try: make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv

.venv/run.stamp: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "install: craftune into .venv (once; a few minutes)"
	@$(install) .
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "install: craftune[dev] into .venv (once; a few minutes)"
	@$(install) '.[dev]'
	@touch $@ .venv/run.stamp
