# Everything of the application image but its code, so that a change of code rebuilds in seconds
# and sends kilobytes. The role `images` builds it on a Debian 13 base, and Dockerfile on top.
ARG BASE
FROM ${BASE} AS builder
LABEL flowerbed.image=builder

# No version: the Debian release of the base fixes it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends binutils python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/uv \
    && python3 -m venv --without-pip /opt/venv

# index.env and ca-certificates.crt tell pip and uv how the control node reaches its package index.
# The role writes them; they stay in this stage.
COPY requirements.lock digits.lock index.en[v] ca-certificates.cr[t] /build/
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_PROGRESS_BAR=off \
    UV_NO_CACHE=1 UV_NO_PROGRESS=1 UV_LINK_MODE=copy UV_INDEX_STRATEGY=unsafe-best-match
# pip installs uv by its entry in the lock, and uv everything else: uv downloads and unpacks in
# parallel. The digits of scikit-learn, without scikit-learn, are the data set of a lab without
# internet.
# hadolint ignore=SC1091
RUN touch /build/index.env && . /build/index.env \
    && sed --quiet '/^uv==/,/[^\\]$/p' /build/requirements.lock > /build/uv.lock \
    && /opt/uv/bin/pip install --no-deps --require-hashes --only-binary :all: \
      --requirement /build/uv.lock \
    && /opt/uv/bin/uv pip install --python /opt/venv/bin/python \
      --require-hashes --only-binary :all: --requirement /build/requirements.lock \
    && /opt/uv/bin/uv pip install --python /opt/venv/bin/python --target /build/digits --no-deps \
      --require-hashes --only-binary :all: --requirement /build/digits.lock \
    && mkdir /opt/flowerbed \
    && cp /build/digits/sklearn/datasets/data/digits.csv.gz /opt/flowerbed/

# What run time never reads: headers, a compiler's library, installers, tests, RPC of Arrow, and
# symbols where they weigh. Libraries that auditwheel has patched are not stripped: it breaks them.
# uv stays, because it resolves the further dependencies of an app (flowerbed.server.layer).
WORKDIR /opt/venv/lib/python3.13/site-packages
RUN /opt/uv/bin/uv pip uninstall --python /opt/venv/bin/python libclang setuptools wheel \
    && rm -rf /opt/venv/bin/uvx /opt/venv/include \
      tensorflow/xla_aot_runtime_src tensorflow/tools/pip_package \
      pyarrow/*flight* \
    && find . -depth -type d '(' -name tests -o -name include ')' -exec rm -rf {} + \
    && find . '(' -name '*.a' -o -name '*.h' -o -name '*.hpp' ')' -delete \
    && find aiohttp fontTools kiwisolver pyarrow sqlalchemy tensorflow uvloop \
      -type f -name '*.so*' -exec strip --strip-unneeded {} + \
    && echo /runtime > flowerbed.pth \
    && /opt/venv/bin/python -m compileall -q -j0 --invalidation-mode unchecked-hash .

FROM ${BASE}
LABEL flowerbed.image=dependencies
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin flowerbed
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /opt/flowerbed /opt/flowerbed
# A container's root file system is read-only: what is written goes to /tmp. Nothing calls home.
# By itself TensorFlow takes oneDNN's kernels on processors with AVX-512 alone; without that the
# default network trains 1.7 times as fast with them.
ENV PATH=/opt/venv/bin:/usr/bin:/bin \
    HOME=/tmp \
    FLWR_HOME=/tmp/.flwr \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TF_CPP_MIN_LOG_LEVEL=2 \
    TF_ENABLE_ONEDNN_OPTS=1
