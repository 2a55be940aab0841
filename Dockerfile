# localagg on CPUs: docker build -t localagg .
FROM python:3.12-slim
# hadolint ignore=DL3013
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install --no-cache-dir '/source[timm]' && useradd --create-home --uid 1000 localagg
USER 1000
# Any user of docker run --user may write caches here.
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["localagg"]
