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
    && python3 -m venv /opt/pip \
    && python3 -m venv --without-pip /opt/venv

# pip.conf and ca-certificates.crt are there when the control node needs them to reach its package
# index; they stay in this stage.
COPY requirements.lock digits.lock pip.con[f] ca-certificates.cr[t] /build/
ENV PIP_CONFIG_FILE=/build/pip.conf PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 \
    PIP_REQUIRE_HASHES=1 PIP_ONLY_BINARY=:all: PIP_PROGRESS_BAR=off
RUN /opt/pip/bin/pip --python /opt/venv/bin/python install --no-compile \
      --requirement /build/requirements.lock
# The digits of scikit-learn without scikit-learn: the data set of a lab without internet.
RUN /opt/pip/bin/pip download --no-deps --dest /build --requirement /build/digits.lock \
    && mkdir /opt/flowerbed \
    && python3 -m zipfile --extract /build/scikit_learn-*.whl /build/scikit-learn \
    && cp /build/scikit-learn/sklearn/datasets/data/digits.csv.gz /opt/flowerbed/

# What run time never reads: headers, a compiler's library, installers, tests, RPC of Arrow, and
# symbols where they weigh. Libraries that auditwheel has patched are not stripped: it breaks them.
WORKDIR /opt/venv/lib/python3.13/site-packages
RUN /opt/pip/bin/pip --python /opt/venv/bin/python uninstall --yes libclang setuptools wheel \
    && rm -rf /opt/venv/bin/uv /opt/venv/bin/uvx /opt/venv/include \
      tensorflow/xla_aot_runtime_src tensorflow/tools/pip_package \
      pyarrow/*flight* \
    && find . -depth -type d '(' -name tests -o -name include ')' -exec rm -rf {} + \
    && find . '(' -name '*.a' -o -name '*.h' -o -name '*.hpp' ')' -delete \
    && find aiohttp fontTools kiwisolver pyarrow sqlalchemy tensorflow uvloop \
      -type f -name '*.so*' -exec strip --strip-unneeded {} + \
    && echo /app > flowerbed.pth \
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
ENV PATH=/opt/venv/bin:/usr/bin:/bin \
    HOME=/tmp \
    FLWR_HOME=/tmp/.flwr \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TF_CPP_MIN_LOG_LEVEL=2
