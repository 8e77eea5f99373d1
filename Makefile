# What is typed on the control node; `make` alone lists it. ARGS goes to ansible-playbook:
#   make lab INVENTORY=inventory/lab ARGS="--check --diff"
# APP is the directory of a Flower App, from where make is called:
#   make train APP=my-app
PYTHON    ?= python3
VENV      ?= .venv
INVENTORY ?= inventory/local
APP       =
ARGS      ?=
SCENARIO  ?= docker default

bin  = $(abspath $(VENV))/bin
# With make -C the directory of the call is PWD, and make itself runs in CURDIR. JSON and quotes,
# because a path may hold spaces.
from = $(if $(filter /% ~%,$(firstword $(APP))),,$(or $(PWD),$(CURDIR))/)
app  = $(if $(APP),-e '$(subst ','\'',{"training_app": "$(subst ",\",$(subst \,\\,$(from)$(APP)))"})')
play = $(bin)/ansible-playbook -i $(INVENTORY) $(app) $(ARGS)
pip  = $(bin)/python -m pip install --quiet --disable-pip-version-check
# Written when an installation is complete, so that one which broke off is done again.
control_node = $(VENV)/.control-node-is-ready
test_tools   = $(VENV)/.test-tools-are-ready
# The last one removes the images in the end.
TIERS        = lint-and-images unit app rules role lab-test

.PHONY: help
help: ## List the targets
	@awk -F ':[^#]*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- the lab -----------------------------------------------------------------------------------

.PHONY: lab train measure watch status logs report down
lab: $(control_node) ## Deploy the lab of INVENTORY and train once; APP=directory: another Flower App
	$(play) playbooks/site.yml

train: $(control_node) ## Start another run on a lab that stands; APP=directory: another Flower App
	$(play) playbooks/train.yml

measure: $(control_node) ## Measure the memory that a device needs for the app of APP=directory
	$(play) playbooks/measure.yml

watch: $(control_node) ## Watch the run that is under way
	$(play) playbooks/watch.yml

logs: $(control_node) ## Collect the logs of all containers into the newest run's results
	$(play) playbooks/logs.yml

report: $(control_node) ## Write a report anew, of RUNS=name, or compare RUNS=one,other
	$(play) playbooks/report.yml -e runs=$(RUNS)

status: $(control_node) ## Show devices, containers and the newest run
	$(play) playbooks/status.yml

down: $(control_node) ## Remove the lab; ARGS="-e teardown_purge=true": its data and images too
	$(play) playbooks/teardown.yml

# --- the tests ---------------------------------------------------------------------------------

.PHONY: quick
quick: lint unit app ## Run the tests that need no machine and no lab

.PHONY: test
test: ## Run the tests that CI runs, tier by tier, up to the first that fails
	@begin=$$(date +%s); \
	for tier in $(TIERS); do \
	  from=$$(date +%s); \
	  printf '\n======== %s ========\n' "$$tier"; \
	  $(MAKE) --no-print-directory "$$tier" || { \
	    printf '======== %s FAILED after %d s ========\n' "$$tier" $$(($$(date +%s) - from)) >&2; \
	    exit 1; }; \
	  printf '======== %s passed in %d s ========\n' "$$tier" $$(($$(date +%s) - from)); \
	done; \
	printf '\nAll tests passed in %d s.\n' $$(($$(date +%s) - begin))

.PHONY: test-all
test-all: test ## Run every test, and the roles on an emulated virtual machine
	$(MAKE) --no-print-directory role SCENARIO=vm

# Images wait for the network most of the time, linters never.
.PHONY: lint-and-images
lint-and-images:
	$(MAKE) --no-print-directory --jobs 2 lint images

.PHONY: lint ansible-lint yamllint ruff mypy hadolint shellcheck
lint: ansible-lint yamllint ruff mypy hadolint shellcheck ## Check style and types (no machine)

# It runs its neighbours, and looks for them on the PATH.
ansible-lint: $(test_tools)
	PATH="$(bin):$$PATH" ansible-lint -q

yamllint: $(test_tools)
	$(bin)/yamllint --strict .

ruff: $(test_tools)
	$(bin)/ruff check --quiet .
	$(bin)/ruff format --quiet --diff .

# runtime and app run on the Python of their image, everything else on the oldest of the control
# node.
mypy: $(test_tools)
	$(bin)/mypy --python-version 3.13 runtime
	MYPYPATH=runtime $(bin)/mypy --cache-dir .cache/mypy-app --python-version 3.13 app
	$(bin)/mypy --python-version 3.11 plugins tests benchmarks
	$(bin)/mypy --python-version 3.11 molecule

hadolint: $(test_tools)
	find . -name '*Dockerfile' -not -path './.*' -exec $(bin)/hadolint {} +

shellcheck: $(test_tools)
	PATH="$(bin):$$PATH" shellcheck .ci/run tests/app molecule/shared/machine/init

.PHONY: unit images app rules role lab-test
unit: $(test_tools) ## Test roles, inventory, templates and dashboards (no machine)
	$(bin)/python -m pytest --numprocesses auto tests/unit

images: $(test_tools)
	$(bin)/ansible-playbook -i inventory/local tests/image.yml

app: images ## Test runtime and app in the application image, which is built if need be (Docker)
	VENV="$(abspath $(VENV))" tests/app "$$(cat .cache/application-image)"

rules: images ## Test the rules and queries of Prometheus with its promtool (Docker)
	$(bin)/python -m pytest tests/rules

# Molecule finds ansible-playbook on the PATH, and its frame around the output helps nobody.
role: $(test_tools) ## Verify every role on test machines over ssh (Docker); SCENARIO=docker: one scenario
	for scenario in $(SCENARIO); do \
	  printf '\n---- molecule test -s %s ----\n' "$$scenario"; \
	  PATH="$(bin):$$PATH" MOLECULE_COMMAND_BORDERS=false molecule test -s "$$scenario" || exit 1; \
	done

lab-test: images browser ## Deploy, train, disturb and remove the local lab (Docker)
	$(bin)/python -m pytest --exitfirst --verbose --capture=no --durations 12 tests/lab

.PHONY: screenshot
screenshot: $(test_tools) browser ## Take the picture of a report that the pages show, RUN=name
	$(bin)/python tests/lab/browser.py results/$(RUN)/report.html files/report.png

# --- the benchmarks ----------------------------------------------------------------------------

BENCHMARKS = rounds learning memory deployment scale watching strategies faults apps bookkeeping

.PHONY: bench $(BENCHMARKS:%=bench-%)
bench: $(BENCHMARKS:%=bench-%) ## Measure all that the pages quote, on an idle machine; or one: bench-rounds

$(BENCHMARKS:%=bench-%): bench-%: images
	$(bin)/python benchmarks/$*.py

# --- what the above needs ----------------------------------------------------------------------

# Debian's Python has the module venv, but not what that needs to put pip into one.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than 3.11; name another one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "$(PYTHON) cannot make virtual environments yet: installing python3-venv"; \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq --yes install \
	      --no-install-recommends python3-venv >/dev/null; \
	  fi; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: install python3-venv as root" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

.PHONY: browser
browser:
	@command -v chromium >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "Installing chromium, in which the tests look at the report"; \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq --yes install \
	      --no-install-recommends chromium >/dev/null; \
	  fi; }
	@command -v chromium >/dev/null || { echo "Install chromium as root" >&2; exit 1; }

$(control_node): requirements.txt | $(VENV)/bin/pip
	@echo "Setting the control node up in $(VENV) (about a minute, once)"
	$(pip) --requirement requirements.txt
	@touch $@

$(test_tools): tests/requirements.txt $(control_node)
	@echo "Installing what the tests need into $(VENV)"
	$(pip) --requirement tests/requirements.txt
	@touch $@
