# The curation image: Ray, the funnel and its embedded backends. No GPU, no weights.
# Build from the root of the tree: docker build -f docker/curation.Dockerfile -t openwaver/curation:0.1.0 .
FROM python:3.12-slim

# Health checks (compose and KubeRay) call wget.
RUN apt-get update \
    && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray

WORKDIR /opt/openwaver
COPY pyproject.toml constraints.txt README.md LICENSE pipelines.yaml ./
COPY waver_core ./waver_core
COPY curation ./curation

# Editable, so that the driver and every worker import the one copy that lies beside pipelines.yaml.
RUN pip install --no-cache-dir -c constraints.txt -e ".[s3,gs]"

ENV PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
USER ray
CMD ["python", "curation/run_funnel.py", "--help"]
