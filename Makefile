# make demo    all training stages on the built-in data, offline: six minutes on two CPU cores
# make demo-rl further steps: a calculator, thoughts, reinforcement learning; about five minutes more
# make doctor  what this machine, its libraries, the data and the checkpoints lack for it, each with its fix
# make experiments  what happens without RMSNorm, without RoPE, …: a picture and a sentence each; out/experiments
# make test    the tests, on all cores;   make check    format, lint, types, bandit, audit, tests
# make audit   known vulnerabilities of the packages in requirements.txt; needs pip-audit and a network
# make faults  all fault tests: kills, full disks, damaged files, request floods; an hour; prints a table of counts
# make docs-check  every command of docs/course on the results of make demo, with its seconds; about five minutes
# Windows has no make: README.md lists the plain commands.

PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python
# One worker per core, at most 8: each needs about 1.5 GB. An idle worker takes tests from another one.
PARALLEL = -n logical --maxprocesses 8 --dist worksteal

.PHONY: demo demo-rl demo-clean docs-check test faults check audit format clean doctor experiments

demo: $(VENV)/.core
	$(RUN) demo.py

demo-rl: $(VENV)/.core
	$(RUN) demo.py --rl

experiments: $(VENV)/.core
	$(RUN) demo.py --experiment all

demo-clean:
	rm -rf out/demo out/experiments

doctor:
	@if test -x $(RUN); then $(RUN) -m evaluation.doctor; else $(PYTHON) -m evaluation.doctor; fi

test: $(VENV)/.dev
	$(RUN) -m pytest $(PARALLEL) -m "not slow"

faults: $(VENV)/.dev
	FAULTS=full $(RUN) -m pytest $(PARALLEL) tests/faults

docs-check: $(VENV)/.dev
	$(RUN) -m tests.docs.commands

check: $(VENV)/.dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m bandit -q -r . -c pyproject.toml
	$(MAKE) audit
	$(MAKE) test

# Fails if a vulnerability is found. pip-audit also reports "none found" if the index contains no package, so the number
# of packages it looked up is printed. If pip-audit or the index is missing, one line says so.
AUDITED = import json, sys; rows = json.load(open(sys.argv[1]))["dependencies"]; \
    looked_up = [row for row in rows if "vulns" in row]; bad = [row["name"] for row in looked_up if row["vulns"]]; \
    print(f"audit: {len(looked_up)} of {len(rows)} packages looked up, vulnerable: {bad or None}" if looked_up \
    else f"audit: nothing was looked up, the index has no advisories for {len(rows)} packages"); sys.exit(bool(bad))

audit: $(VENV)/.dev
	@rm -f $(VENV)/audit.json
	@if ! $(RUN) -c "import pip_audit" 2>/dev/null; then \
	    echo "audit: skipped, pip-audit is missing: $(RUN) -m pip install pip-audit"; \
	else \
	    $(RUN) -m pip_audit --progress-spinner off -r requirements.txt -f json -o $(VENV)/audit.json >/dev/null 2>&1; \
	    if [ -s $(VENV)/audit.json ]; then $(RUN) -c '$(AUDITED)' $(VENV)/audit.json; \
	    else echo "audit: skipped, no package index answers"; fi; \
	fi

format: $(VENV)/.dev
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

$(VENV)/.core: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch and the other packages into $(VENV): a few minutes, nothing is printed meanwhile"
	@echo "正在把 PyTorch 等包装进 $(VENV)：需要几分钟，其间没有输出"
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

# DeepSpeed builds its package with the installed torch; only its launcher is tested, so no compiler is needed.
$(VENV)/.dev: $(VENV)/.core requirements-dev.txt
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	$(RUN) -m pip install --disable-pip-version-check -q setuptools wheel
	$(RUN) -m pip install --disable-pip-version-check -q --no-build-isolation "deepspeed>=0.19,<0.20"
	touch $@

clean: demo-clean
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
