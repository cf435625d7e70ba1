# make demo   re-spells two adapters of real shape, there and back, and proves that nothing changed; then
#             makes one smaller, merges two, takes one out of a model and bakes it into another
# make test   runs the whole suite
#
# Each sets up .venv by itself, the first time in a few minutes. The machine needs Python 3.11 or
# newer, pip and make; PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
BIN     = .venv/bin
INSTALL = $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test clean

define run
	@echo
	@echo '$$ $(1)'
	@$(BIN)/$(1)
endef

demo: .venv/core.stamp
	@rm -rf demo
	@mkdir demo
	@$(BIN)/python benchmarks/make_files.py demo
	$(call run,adapterkit inspect demo/sdxl_kohya.safetensors)
	$(call run,adapterkit convert demo/sdxl_kohya.safetensors --to diffusers -o demo/sdxl_diffusers.safetensors --plan)
	$(call run,adapterkit convert demo/sdxl_kohya.safetensors --to diffusers -o demo/sdxl_diffusers.safetensors)
	$(call run,adapterkit convert demo/sdxl_diffusers.safetensors --to kohya -o demo/sdxl_kohya_again.safetensors)
	$(call run,adapterkit diff demo/sdxl_kohya.safetensors demo/sdxl_kohya_again.safetensors)
	$(call run,adapterkit inspect demo/flux_kohya.safetensors)
	$(call run,adapterkit convert demo/flux_kohya.safetensors --to diffusers -o demo/flux_diffusers.safetensors)
	$(call run,adapterkit convert demo/flux_diffusers.safetensors --to kohya -o demo/flux_kohya_again.safetensors)
	$(call run,adapterkit diff demo/flux_kohya.safetensors demo/flux_kohya_again.safetensors)
	$(call run,adapterkit resize demo/sdxl_kohya.safetensors --size 40MB -o demo/sdxl_small.safetensors)
	$(call run,adapterkit merge demo/sdxl_kohya.safetensors=0.8 demo/sdxl_other.safetensors=-0.3 --rank 16 -o demo/sdxl_mix.safetensors)
	$(call run,adapterkit extract demo/tuned demo/base -o demo/lora)
	$(call run,adapterkit bake demo/base demo/lora -o demo/baked)
	@echo
	@echo 'The files are in demo/; try $(BIN)/adapterkit --help'

test: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q

clean:
	rm -rf .venv demo build dist

# Without pip inside, so that no ensurepip is needed; the interpreter's own pip installs into it.
# What builds the package is pinned as well, so it is built without isolation.
.venv/core.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "adapterkit needs Python 3.11 or newer")'
	@echo 'Setting up .venv (the first time takes a few minutes)'
	@$(PYTHON) -m venv --without-pip .venv
	@$(INSTALL) hatchling editables
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

.venv/test.stamp: .venv/core.stamp
	@echo 'Adding what the tests need to .venv'
	@$(INSTALL) --no-build-isolation --editable '.[test]'
	@touch $@
