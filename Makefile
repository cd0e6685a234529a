PYTHON ?= python3
BIN := .venv/bin
# A list file or folder of videos for `make demo`; if empty, the demo writes its own videos.
DATA ?=


.PHONY: demo demo-stage1 demo-finetune demo-text test test-kernels test-dali gate mutate soak fuzz lint doctor clean bench bench-gpu bench-kernels rehearse test-gpu

# With DATA only stage 1 runs, with a random teacher: the demo's own teacher knows only moving shapes.
demo: demo-stage1 ## pre-train a small student from video files and fine-tune it; results in runs/demo and runs/demo-finetune
ifeq ($(DATA),)
	$(MAKE) demo-finetune
endif

demo-stage1: .venv/.run ## the first half of `make demo`: pre-train; results in runs/demo
	rm -rf runs/demo
ifeq ($(DATA),)
	$(BIN)/python -m umt_fast.data.synthetic runs/demo-videos --count 192
	$(BIN)/python -m train.demo_teacher --out runs/demo-teacher/teacher.safetensors
	$(BIN)/python -m train.pretrain --recipe tiny --run.name demo --data.train runs/demo-videos/train.csv \
		--teacher-weights runs/demo-teacher/teacher.safetensors --teacher.width 64 --teacher.heads 2 \
		--student.image-size 64 --teacher.image-size 64 --optim.epochs 30 --optim.warmup-epochs 2 \
		--compute.precision fp32
else
	$(BIN)/python -m train.pretrain --recipe tiny --run.name demo --data.train "$(DATA)"
endif

# Uses the stage-1 checkpoint of `make demo`.
demo-finetune: .venv/.run ## the second half of `make demo`: fine-tune from random weights and from its encoder
	rm -rf runs/demo-finetune
	$(BIN)/python -m train.demo --init "$$(ls runs/demo/checkpoints/*.pth | tail -1)" --out runs/demo-finetune

# Uses the stage-1 checkpoint and teacher of `make demo`, and makes them first if they are missing.
DEMO_TEXT := --recipe tiny --data.videos runs/demo-text-videos/train.json --student.image-size 64 --compute.precision fp32
demo-text: .venv/.run ## train stage 2 on captioned videos of moving shapes, fine-tune and test retrieval; results in runs/demo-text*
	ls runs/demo/checkpoints/*.pth runs/demo-teacher/teacher.safetensors >/dev/null 2>&1 || $(MAKE) demo-stage1 DATA=
	rm -rf runs/demo-text runs/demo-text-finetune runs/demo-text-retrieval
	$(BIN)/python -m umt_fast.data.synthetic runs/demo-text-videos --captions
	$(BIN)/python -m train.stage2 $(DEMO_TEXT) --run.name demo-text --teacher.image-size 64 \
		--init "$$(ls runs/demo/checkpoints/*.pth | tail -1)" \
		--teacher-weights runs/demo-teacher/teacher.safetensors --teacher.width 64 --teacher.heads 2
	$(BIN)/python -m train.stage2 $(DEMO_TEXT) --run.name demo-text-finetune --job retrieval \
		--init "$$(ls runs/demo-text/checkpoints/*.pth | tail -1)" \
		--optim.epochs 20 --optim.lr 5e-4 --optim.min-lr 5e-6
	$(BIN)/python -m train.evaluate --job retrieval --run.name demo-text-retrieval --data.workers 1 \
		--checkpoint "$$(ls runs/demo-text-finetune/checkpoints/*.pth | tail -1)" \
		--data.test runs/demo-text-videos/test.json --compute.precision fp32

# One thread per process, since there is one process per core.
test: lint ## install what is needed and run every check and test, in plain PyTorch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The golden tests with the Triton kernels in Triton's interpreter. Then umt-kernels alone, in an environment with only
# torch, triton and the test tools, in plain PyTorch and in the interpreter.
test-kernels: .venv/.dev .venv-kernels/.done ## run the Triton kernels in the interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_golden.py tests/models
	.venv-kernels/bin/python -m pytest -c kernels/pyproject.toml kernels/tests
	TRITON_INTERPRET=1 .venv-kernels/bin/python -m pytest -c kernels/pyproject.toml kernels/tests

# Decodes on the CPU; test-gpu runs the GPU tests if PY has DALI.
test-dali: .venv/.dali ## test the DALI loader against PyAV's
	$(BIN)/python -m pytest tests/data/test_dali_loader.py tests/train/test_dali_run.py

soak: .venv/.dev ## kill runs at random and compare with an undisturbed one; about half an hour
	PYTHONPATH=.:kernels:tests/support $(BIN)/python -m tests.soak

gate: .venv/.dev ## compile every kernel for sm_80, sm_90 and sm_100 and check registers, spills and SASS; needs no GPU
	$(BIN)/python -m benchmarks.kernels.compile_report --gate -q

FUZZ_MINUTES ?= 20
fuzz: .venv/.dev ## read damaged and hostile files of every kind for FUZZ_MINUTES (20)
	nice $(BIN)/python tests/soak/fuzz.py --minutes $(FUZZ_MINUTES) --keep runs/fuzz

mutate: .venv/.dev ## break the kernels in over 180 ways and check that a test fails for each; about 10 minutes
	$(BIN)/python kernels/tests/mutate.py

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.:kernels $(BIN)/lint-imports --no-cache

doctor: .venv/.run ## what is installed, in use and missing
	$(BIN)/python -m umt_fast.doctor

clean: ## remove everything that the other targets wrote, runs included
	rm -rf .venv .venv-kernels runs build kernels/build *.egg-info kernels/*.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml kernels/pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e kernels -e '.[train]'
	touch $@

.venv/.dev: .venv/bin/python pyproject.toml kernels/pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e kernels -e '.[dev]'
	touch $@ .venv/.run

.venv/.dali: .venv/.dev
	$(BIN)/python -m pip install -q -c constraints.txt -e kernels -e '.[dali]'
	touch $@

.venv-kernels/.done: kernels/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-kernels
	.venv-kernels/bin/python -m pip install -q -c constraints.txt torch
	.venv-kernels/bin/python -m pip install -q -c constraints.txt -e 'kernels[test]'
	touch $@

# For a machine with a GPU. From a plain checkout, with a Python that has the dependencies: make bench-gpu PY=python3
PY ?= .venv/bin/python
ifneq ($(PY),.venv/bin/python)
export PYTHONPATH := .:kernels$(if $(PYTHONPATH),:$(PYTHONPATH))
endif
ON_GPU := $(if $(filter .venv/bin/python,$(PY)),.venv/.dev)

bench: .venv/.dev ## time the training step on this machine, rung by rung
	$(BIN)/python -m benchmarks.step_time

MINUTES ?= 9
bench-gpu: $(ON_GPU) ## measure this GPU in MINUTES (9): smoke, best rungs, ladder, kernels, decoding; call again to continue
	$(PY) -m benchmarks.gpu_session --minutes $(MINUTES)

rehearse: .venv/.dev ## the stages of bench-gpu on the CPU, with tiny models, in 3 minutes
	$(BIN)/python -m benchmarks.gpu_session --rehearse --out runs/rehearsal

bench-kernels: $(ON_GPU) ## time the kernels on this GPU; results in benchmarks/results/<gpu>
	$(PY) -m benchmarks.kernels

test-gpu: $(ON_GPU) ## run every test on this GPU, and every kernel's opcheck under compute-sanitizer
	@$(PY) -m benchmarks.environment
	env -u TRITON_INTERPRET $(PY) -m pytest kernels/tests tests -m "gpu or not gpu"
	@if ! command -v compute-sanitizer >/dev/null; then \
		echo "compute-sanitizer is not on the PATH: memory accesses were not checked"; exit 0; fi; \
	env -u TRITON_INTERPRET PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(PY) -m pytest -q -o timeout=0 -k "opcheck or implicit" \
		kernels/tests/test_library.py kernels/tests/test_patch_embed.py
