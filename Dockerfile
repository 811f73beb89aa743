# CARE Deploy in a container, on a CPU:
#
#     docker build -t care-deploy .
#     docker run --rm -v "$PWD":/work care-deploy run pipeline.yaml
#
# Any Debian or Ubuntu with Python 3.11 or newer is a base, such as one that debootstrap makes:
#
#     docker build --build-arg BASE=debian:bookworm -t care-deploy .
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# What a bare Debian lacks; images of Python have it.
RUN python3 -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null \
    || (apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*)

WORKDIR /opt/care-deploy
COPY constraints.txt setup.cfg pyproject.toml README.md LICENSE pipeline.yaml ./
COPY care care
COPY calibration calibration
COPY pipeline pipeline
COPY configs configs
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[sign]' \
    && useradd --create-home --uid 1000 care

ENV PATH=/opt/venv/bin:$PATH
USER care
WORKDIR /work
ENTRYPOINT ["care-deploy"]
CMD ["--help"]
