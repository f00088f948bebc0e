# dad-fast on CUDA 13 or 12, with DALI and xformers. Not yet built on a GPU host.
#   docker build -t dad-fast .
#   docker build -t dad-fast --build-arg CUDA=12 --build-arg TORCH_INDEX=URL .
#   docker run --gpus all --ipc host -v /data:/data -v "$PWD/runs:/app/runs" dad-fast train --preset demo
# URL: the index of torch's wheels for CUDA 12, from pytorch.org; those on PyPI are for CUDA 13.
#
# NVIDIA's image for PyTorch (YY.MM with torch 2.11 or newer) has apex and DALI; there this is enough:
#   docker run --gpus all --ipc host -v "$PWD:/src" nvcr.io/nvidia/pytorch:YY.MM-py3 \
#       sh -c 'pip install /src && dad-fast train --preset demo'
ARG CUDA=13

FROM nvidia/cuda:12.8.1-devel-ubuntu24.04 AS devel12
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04 AS runtime12
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS devel13
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04 AS runtime13

# The wheel, with the CUDA half of csrc, which needs nvcc.
# hadolint ignore=DL3006
FROM devel${CUDA} AS wheel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# hadolint ignore=DL3013
RUN python3 -m venv /build \
    && /build/bin/pip install --no-cache-dir build \
    && /build/bin/python -m build --wheel --outdir /wheels

# hadolint ignore=DL3006
FROM runtime${CUDA}
ARG CUDA
ARG TORCH_INDEX=""
# The commit, for run.json: --build-arg COMMIT="$(git rev-parse HEAD)"
ARG COMMIT=""
# Triton compiles a C file for each of its kernels: it needs gcc and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/dad-fast \
    && install --directory --owner 1000 --group 1000 /app /app/runs
ENV PATH=/opt/dad-fast/bin:$PATH \
    DAD_FAST_COMMIT=$COMMIT
COPY constraints.txt /wheels/
COPY --from=wheel /wheels/*.whl /wheels/
# constraints.txt pins the releases that were tested, which are those for CUDA 13.
# hadolint ignore=DL3013
RUN wheel="$(echo /wheels/*.whl)" \
    && if [ "$CUDA" = 13 ]; then \
        pip install --no-cache-dir --constraint /wheels/constraints.txt "${wheel}[cuda13,demo,export,log]"; \
    elif [ -n "$TORCH_INDEX" ]; then \
        pip install --no-cache-dir --index-url "$TORCH_INDEX" 'torch>=2.11,<2.16' torchvision \
        && pip install --no-cache-dir "${wheel}[cuda12,demo,export,log]"; \
    else \
        echo "CUDA=$CUDA needs --build-arg TORCH_INDEX=URL (see the top of the Dockerfile)" >&2 && exit 1; \
    fi
# The user "ubuntu" of the image.
USER 1000
WORKDIR /app
ENTRYPOINT ["dad-fast"]
CMD ["doctor"]
