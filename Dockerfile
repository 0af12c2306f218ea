# docker build -t adapter-server .
# docker run -p 8000:8000 adapter-server
# docker run -p 8000:8000 -v ./adapters:/adapters adapter-server \
#     serve Qwen/Qwen3-0.6B --adapters /adapters --host 0.0.0.0 --insecure

FROM python:3.12-slim AS build
# Where torch comes from: pip's own index, which has CUDA's wheels, unless --build-arg TORCH_INDEX=URL names another
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /venv
WORKDIR /src
COPY constraints.txt ./
RUN /venv/bin/pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} torch
COPY . .
RUN /venv/bin/pip install --constraint constraints.txt .

FROM python:3.12-slim
# The kernels for this machine's processor, and Triton's launchers, are compiled where they run
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 server
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE ADAPTER_SERVER_PORT=8000
USER server
WORKDIR /home/server
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['ADAPTER_SERVER_PORT']}/readyz\")"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["adapter-server"]
# Inside a container the port is published by whoever runs it; who reaches it is their network's matter.
CMD ["demo", "--host", "0.0.0.0", "--insecure"]
