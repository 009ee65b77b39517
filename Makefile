# Two commands do everything on a fresh machine: make demo, make test.  PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# pip would compile all 15,000 modules of the libraries for a minute; Python compiles those that it imports, and keeps them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow lint clean

demo: $(VENV)/installed
	$(RUN) visualize_diffusion.py --dataset digits --num_images 6 --save_path outputs/forward_diffusion.png
	$(RUN) visualize_diffusion.py --what schedules --save_path outputs/schedules.png
	$(RUN) train.py --dataset digits --output_dir outputs/demo --overwrite
	$(RUN) sample.py --checkpoint outputs/demo/model_final.pt --num_images 64 --show_intermediate
	$(RUN) sample.py --checkpoint outputs/demo/model_final.pt --num_images 16 --output outputs/demo/denoising.gif
	@echo
	@echo "The pictures are in outputs/: open"
	@echo "  outputs/demo/generated_samples.png     64 digits sampled from noise"
	@echo "  outputs/demo/denoising.gif             how they appear (frames: outputs/demo/intermediate/)"
	@echo "  outputs/demo/training_loss.png         the loss, training and held out"
	@echo "  outputs/forward_diffusion.png          how noise covers real digits"
	@echo "  outputs/schedules.png                  the noise schedules side by side"

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal

# They wait for processes and for the disk a sixth of their time: one more at once than there are cores.
test-slow: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $$($(RUN) -c "import os; print(os.cpu_count() + 1)") --dist worksteal -m slow

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(RUN) -m pip install --quiet --no-compile -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV)
