# localagg on CPUs: docker build -t localagg .
FROM python:3.12-slim
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install --no-cache-dir '/source[timm]' && useradd --create-home localagg
USER localagg
# Any user of docker run --user may write caches here.
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["localagg"]
