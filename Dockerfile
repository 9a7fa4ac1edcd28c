# raylora and Ray in one image: a command line, or a node of a cluster.
#
# For GPUs (PyTorch's ordinary wheels bring CUDA; the host needs only its driver and container toolkit):
#   docker build --tag raylora .
#   docker run --gpus all --shm-size 8g --volume "$PWD/results:/home/raylora/results" raylora train /home/raylora/results/job.yaml
# For CPUs only, a few GB smaller (the address of the CPU wheels is on PyTorch's "Get Started" page):
#   docker build --tag raylora:cpu --build-arg TORCH_INDEX=ADDRESS .
#   docker run --shm-size 2g raylora:cpu train jobs/quickstart.yaml
# As a Ray node: docker run --entrypoint ray raylora start --block --address HEAD:6379
#
# Never run where it was written: docker itself (build, --gpus, volumes). Its pip commands were, in
# an empty virtual environment. A mounted folder must be writable for user 1000.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0

WORKDIR /opt/raylora
# torch is the largest layer and changes least. The [t] lets the file be absent.
COPY constraints.tx[t] ./
RUN touch constraints.txt \
    && if [ -n "$TORCH_INDEX" ]; then \
         pip install --no-deps --constraint constraints.txt --index-url "$TORCH_INDEX" torch; \
       else \
         pip install --constraint constraints.txt torch; \
       fi
COPY pyproject.toml README.md LICENSE ./
COPY raylora raylora
RUN pip install --constraint constraints.txt ".[ray]" && pip check

RUN useradd --create-home --uid 1000 raylora
USER raylora
WORKDIR /home/raylora
COPY --chown=raylora:raylora jobs jobs
COPY --chown=raylora:raylora tune_spaces tune_spaces
# Made here, so that a volume put on it belongs to the user.
RUN mkdir results

ENTRYPOINT ["raylora"]
CMD ["--help"]
